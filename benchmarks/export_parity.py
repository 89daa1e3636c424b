"""Whether exported files give PyTorch's answers: plain, and with the preprocessing inside, on photographs of odd sizes.

    python benchmarks/export_parity.py --data imagenette --class-index class_index.json \\
        --model timm/tf_efficientnet_lite0=tf_efficientnet_lite0.safetensors \\
        --model torchvision/squeezenet1_1=squeezenet1_1.safetensors \\
        --model timm/mobilenetv3_small_100 --model torchvision/resnet18 --model torchvision/resnet50

`--model NAME=WEIGHTS` takes trained weights; without them they are random and seeded, batch norms set by a few images,
so that logits are of a natural size, and only logits are compared. The images are those of the data's val split. As a
data set may hold images of one size, each is also resized or cropped to a random size and shape first (`odd`, seeded),
as the camera would have taken it: PIL resizes it back for PyTorch, the graph for itself. `crop` asks both for a centre
crop of 0.875 besides. Agreement is of the predicted class; differences are shares of the largest logit.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData, open_data
from edgecompress.exporting.onnx_export import (
    INPUT_NAME,
    OUTPUT_NAME,
    Provenance,
    export_onnx,
    export_with_preprocessing,
    open_session,
)
from edgecompress.exporting.parity import largest_differences, top1_agreement
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.models.model_building import build, resolve_architecture
from edgecompress.models.weights import load_checkpoint
from edgecompress.settings.recipe import DataSettings, ModelSettings
from edgecompress.settings.target import Target, load_target

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
FP32_LIMIT = 1e-4
INSIDE_LIMIT = 0.995
_BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """One kind of image: what PyTorch, the plain file and the file with preprocessing inside made of it."""

    samples: int
    fp32_relative: float
    fp32_agreement: float
    inside_relative: float
    inside_agreement: float
    accuracy: float


def odd(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The image at a random size from 120 to 800 pixels a side: resized, cropped, or cropped and then resized."""
    width, height = (int(side) for side in generator.integers(120, 801, 2))
    way = generator.integers(3)
    if way > 0:
        kept_width, kept_height = (max(32, int(side * generator.uniform(0.7, 1.0))) for side in image.size)
        left = int(generator.integers(image.width - kept_width + 1))
        top = int(generator.integers(image.height - kept_height + 1))
        image = image.crop((left, top, left + kept_width, top + kept_height))
    return image if way == 1 else image.resize((width, height), Image.Resampling.BICUBIC)


def photographs(data: ImageData, indices: NDArray[np.int64], seed: int | None) -> Iterator[Pixels]:
    """The chosen images, uint8 [H, W, 3], as they are or, with a seed, at odd sizes."""
    items = data.splits["val"].items
    for index in indices:
        pixels = items.decode_whole(int(index), 3)
        if seed is not None:
            pixels = np.asarray(odd(Image.fromarray(pixels), np.random.default_rng([seed, int(index)])))
        yield pixels


def compare(
    module: nn.Module, preprocessing: Preprocessing, target: Target, images: Iterator[Pixels], labels: NDArray[np.int64]
) -> Comparison:
    """Export `module` twice and run both files beside it."""
    size = preprocessing.input_size
    example = torch.zeros(2, preprocessing.channels, size, size)
    provenance = Provenance((), "benchmark", "", versions())
    with tempfile.TemporaryDirectory() as scratch:
        plain, inside = Path(scratch) / "plain.onnx", Path(scratch) / "inside.onnx"
        export_onnx(
            module, example, plain, target=target, preprocessing=preprocessing, provenance=provenance, extra_metadata={}
        )
        export_with_preprocessing(plain, inside)
        plain_session, inside_session = open_session(plain), open_session(inside)
        torch_logits: list[Logits] = []
        plain_logits: list[Logits] = []
        inside_logits: list[Logits] = []
        waiting: list[Pixels] = []

        def run_waiting() -> None:
            inputs = preprocessing.normalize(torch.from_numpy(np.stack(waiting)))
            with torch.no_grad():
                torch_logits.append(module(inputs).numpy())
            plain_logits.append(plain_session.run([OUTPUT_NAME], {INPUT_NAME: inputs.numpy()})[0])
            waiting.clear()

        for pixels in images:
            waiting.append(preprocessing.prepare(Image.fromarray(pixels)))
            inside_logits.append(inside_session.run([OUTPUT_NAME], {INPUT_NAME: pixels[None]})[0])
            if len(waiting) == _BATCH:
                run_waiting()
        if waiting:
            run_waiting()
    reference, exported, embedded = (np.concatenate(part) for part in (torch_logits, plain_logits, inside_logits))
    return Comparison(
        samples=len(reference),
        fp32_relative=largest_differences(reference, exported)[1],
        fp32_agreement=top1_agreement(reference, exported),
        inside_relative=largest_differences(reference, embedded)[1],
        inside_agreement=top1_agreement(reference, embedded),
        accuracy=float(np.mean(reference.argmax(axis=1) == labels)),
    )


def create(name: str, weights: Path | None, data: ImageData) -> tuple[nn.Module, Preprocessing]:
    """The module in eval mode, and its own preprocessing."""
    torch.manual_seed(0)
    architecture = resolve_architecture(ModelSettings(name=name, num_classes=1000), data)
    module, preprocessing = build(architecture), architecture.preprocessing
    if weights is not None:
        load_checkpoint(module, weights, allow_new_head=False)
        return module.eval(), preprocessing
    module.train()  # batch norms take their statistics from images, else random logits shrink to nothing
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = None
    chosen = np.linspace(0, len(data.splits["val"]) - 1, 32).astype(np.int64)
    prepared = [preprocessing.prepare(Image.fromarray(pixels)) for pixels in photographs(data, chosen, None)]
    with torch.no_grad():
        module(preprocessing.normalize(torch.from_numpy(np.stack(prepared))))
    return module.eval(), preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an image folder with train/ and val/")
    parser.add_argument("--class-index", type=Path)
    parser.add_argument("--model", action="append", required=True, metavar="NAME[=WEIGHTS]")
    parser.add_argument("--images", type=int, help="a seeded choice of so many; left out, all of val")
    parser.add_argument("--random-images", type=int, default=128, help="images for models with random weights")
    parser.add_argument("--kinds", nargs="+", default=["as they are", "odd", "odd, crop"])
    parser.add_argument("--target", default="x86")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bar", action="store_true", help="end with 1 where a limit is missed")
    arguments = parser.parse_args()

    settings: dict[str, Any] = {"name": "image_folder", "root": arguments.data, "class_index": arguments.class_index}
    data = open_data(DataSettings(**settings)).with_num_classes(1000)
    split, target = data.splits["val"], load_target(arguments.target)
    console = Console()
    console.print(summarize_machine(describe_machine()), versions(), markup=False)
    table = Table(title="Against PyTorch with PIL")
    for column in ("model", "weights", "images", "n", "top-1", "fp32 difference", "fp32 top-1 agreement"):
        table.add_column(column)
    table.add_column("inside: difference")
    table.add_column("inside: top-1 agreement")
    missed: list[str] = []
    for text in arguments.model:
        name, _, path = text.partition("=")
        module, preprocessing = create(name, Path(path) if path else None, data)
        wanted = arguments.images if path else arguments.random_images
        count = min(wanted or len(split), len(split))
        indices = np.sort(np.random.default_rng(arguments.seed).choice(len(split), count, replace=False))
        for kind in arguments.kinds:
            images = photographs(data, indices, arguments.seed if kind.startswith("odd") else None)
            prepared_by = replace(preprocessing, crop_fraction=0.875 if kind.endswith("crop") else 1.0)
            found = compare(module, prepared_by, target, images, split.labels[indices])
            trained = bool(path)
            table.add_row(
                name,
                "trained" if trained else "random",
                kind,
                str(found.samples),
                f"{found.accuracy:.1%}" if trained else "",
                f"{found.fp32_relative:.1e}",
                f"{found.fp32_agreement:.2%}",
                f"{found.inside_relative:.1e}",
                f"{found.inside_agreement:.2%}" if trained else f"({found.inside_agreement:.1%})",
            )
            console.print(f"{name}, {kind}: {found}", markup=False)
            checks = {
                f"fp32 differs by {found.fp32_relative:.1e}": found.fp32_relative < FP32_LIMIT,
                f"fp32 agrees on {found.fp32_agreement:.2%}": not trained or found.fp32_agreement == 1.0,
                f"inside agrees on {found.inside_agreement:.2%}": not trained or found.inside_agreement >= INSIDE_LIMIT,
            }
            missed += [f"{name}, {kind}: {words}" for words, holds in checks.items() if not holds]
    console.print(table)
    for words in missed:
        console.print(f"missed: {words}", markup=False)
    if arguments.bar and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
