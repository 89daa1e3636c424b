"""What int8 costs a trained MobileNetV3-small: after training, and with quantization-aware training.

    python benchmarks/qat.py --set data.name=fashion_mnist --output results
    python benchmarks/qat.py --model timm/mobilenetv3_small_100 --set data.name=image_folder --set data.root=cifar10

For each seed: the model is trained from random weights at the images' own size, then made int8 by post-training
quantization (the default `quantize` stage) and, from the same weights, by a `qat` stage. Accuracy is that of the last
epoch on the test split; whether `qat` keeps what it trained is decided on val. Every seed leaves three run directories
under --output, and a stopped benchmark goes on where it was. Latency plays no part here: `placement: full`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from edgecompress import pipeline
from edgecompress.machine import describe_machine, summarize_machine


def recipes(model: str, size: int | None, epochs: int, qat_epochs: int) -> dict[str, dict[str, Any]]:
    """The three recipes of a seed; the last two are given the first one's weights."""
    description: dict[str, Any] = {"name": model}
    if size is not None:
        description["preprocessing"] = {"input_size": size, "crop_fraction": 1.0}
    base = {"model": description, "data": {"name": "fashion_mnist"}, "gates": {"max_accuracy_drop": 1.0}}
    quantize = {"placement": "full"}
    augment = {"horizontal_flip": True, "shift_pixels": 2}
    train = {"kind": "train", "id": "dense", "epochs": epochs, "learning_rate": 0.2, "weight_decay": 1e-4}
    return {
        "dense": base | {"stages": [train | {"augment": augment}, {"kind": "quantize", "id": "int8"} | quantize]},
        "qat": base
        | {
            "stages": [
                {"kind": "qat", "id": "int8_trained", "epochs": qat_epochs, "batch_size": 128, "augment": augment}
                | quantize
            ]
        },
    }


def _accuracy(manifest: dict[str, Any], stage: str) -> float:
    return float(next(entry["accuracy"] for entry in manifest["stages"] if entry["id"] == stage))


def run_seed(seed: int, made: dict[str, dict[str, Any]], folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Accuracies of one seed on the test split, and whether the trained int8 model was kept."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, recipe in made.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        given = [f"seed={seed}", *overrides]
        if name != "dense":
            given.append(f"model.checkpoint={folder / 'dense' / 'stages' / 'dense' / 'model.safetensors'}")
        manifest = pipeline.apply(str(path), overrides=given, output=folder / name, resume=True).manifest
        if name == "dense":
            results |= {"fp32": _accuracy(manifest, "dense"), "post-training": _accuracy(manifest, "int8")}
        else:
            entry = next(entry for entry in manifest["stages"] if entry["id"] == "int8_trained")
            results |= {"qat": float(entry["accuracy"]), "kept": entry.get("kept_trained"), "why": entry["summary"]}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision/mobilenet_v3_small")
    parser.add_argument("--size", type=int, default=28, help="input side in pixels; 0 for the model's own")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    made = recipes(arguments.model, arguments.size or None, arguments.epochs, arguments.qat_epochs)
    table = Table(title=f"{arguments.model}, {arguments.epochs} epochs, test accuracy")
    for column in ("seed", "fp32", "post-training int8", "points", "QAT int8", "points", "kept"):
        table.add_column(column, justify="right")
    console = Console(width=140)
    rows = []
    for seed in arguments.seeds:
        found = run_seed(seed, made, arguments.output / f"seed{seed}", arguments.overrides)
        points = [100 * (found[name] - found["fp32"]) for name in ("post-training", "qat")]
        rows.append(points)
        table.add_row(
            str(seed),
            f"{found['fp32']:.2%}",
            f"{found['post-training']:.2%}",
            f"{points[0]:+.2f}",
            f"{found['qat']:.2%}",
            f"{points[1]:+.2f}",
            "trained" if found["kept"] else "post-training",
        )
        console.print(f"seed {seed}: {found['why']}")
    means = np.mean(rows, axis=0)
    table.add_row("mean", "", "", f"{means[0]:+.2f}", "", f"{means[1]:+.2f}", "")
    console.print(table)
    console.print(f"machine: {summarize_machine(describe_machine())}")


if __name__ == "__main__":
    main()
