"""Cross-layer equalization before depthwise layers: what it gains on one source of images, what it loses on another.

    python benchmarks/equalization.py --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors \
        --data imagenette --class-index class_index.json --other-data birds

A channel that uses little of its tensor's range is scaled up in the batch norm that makes it, and down again in the
weights of the depthwise layer that reads it, whose scales are one a channel: no weight loses anything by it (Nagel et
al., 2019, "Data-Free Quantization", section 4.1). With a ReLU6 between, the channel is then cut off where the range
ends, so all depends on how the channel's peak is known: from the calibration images, or from the batch norm's own
statistics over all of training (mean + K standard deviations, as the same paper takes them). Rows: float and int8
(`effort: fast`), each with the agreement with the untouched float model and the SQNR of its logits, on the images'
own source and on the other.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit, calibration_indices, open_data
from edgecompress.exporting.parity import sqnr_db, top1_agreement
from edgecompress.int8.capture import capture
from edgecompress.int8.post_training import quantize
from edgecompress.int8.scheme import resolve_scheme
from edgecompress.machine import describe_machine, summarize_machine
from edgecompress.models.checkpoint import example_input
from edgecompress.models.model_building import create_model
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DataSettings, QuantizeStage
from edgecompress.settings.target import load_target

aten = torch.ops.aten
_CLAMPS = {aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default}
_MOST = 8.0  # times that a channel is scaled up
_BATCH = 16


@dataclass(frozen=True)
class Pair:
    """A batch norm, the clamp behind it and the depthwise convolution that alone reads that, by parameter name."""

    clamp: Node
    norm_weight: str
    norm_bias: str
    reader_weight: str


def pairs_of(graph: GraphModule) -> list[Pair]:
    """Every batch norm whose channels can be scaled without a weight losing anything."""
    found = []
    for reader in graph.graph.nodes:
        if reader.target is not aten.conv2d.default or len(reader.args) < 7 or reader.args[6] == 1:
            continue
        clamp = reader.args[0]
        norm = clamp.args[0] if clamp.target in _CLAMPS and len(clamp.users) == 1 else None
        if norm is not None and norm.target is aten.batch_norm.default and len(norm.users) == 1:
            found.append(Pair(clamp, *(str(node.target) for node in (norm.args[1], norm.args[2], reader.args[1]))))
    return found


@torch.no_grad()
def peaks_of(graph: GraphModule, pairs: list[Pair], images: Tensor) -> dict[str, Tensor]:
    """The largest value of each channel [C] behind each clamp, on these images."""
    names = {pair.clamp: pair.norm_weight for pair in pairs}
    peaks: dict[str, Tensor] = {}

    class Watching(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n in names:
                highest, name = value.amax((0, 2, 3)), names[n]
                peaks[name] = torch.maximum(peaks[name], highest) if name in peaks else highest
            return value

    for part in torch.split(images, _BATCH):
        Watching(graph).run(part)
    return peaks


@torch.no_grad()
def equalized(module: nn.Module, pairs: list[Pair], peaks: dict[str, Tensor], deviations: float | None) -> nn.Module:
    """A copy in which each channel's peak fills its tensor's range; with `deviations`, the peak that the batch norm's
    statistics let expect, where that is higher than the calibration images'."""
    twin = copy.deepcopy(module)
    parameters = dict(twin.named_parameters())
    for pair in pairs:
        weight, bias = parameters[pair.norm_weight], parameters[pair.norm_bias]
        seen = peaks[pair.norm_weight]
        peak = seen if deviations is None else torch.maximum(seen, bias + deviations * weight.abs())
        top = seen.max()
        factor = (top / peak.clamp(1e-6, float(top))).clamp(1.0, _MOST)
        factor[seen <= 0] = 1.0
        weight.mul_(factor)
        bias.mul_(factor)
        parameters[pair.reader_weight].div_(factor.view(-1, 1, 1, 1))
    return twin


def pixels(split: PreparedSplit, indices: np.ndarray) -> Tensor:
    """Prepared images, uint8 [N, C, H, W]."""
    return torch.cat([batch for batch, _ in split.batches(_BATCH, indices=torch.from_numpy(np.sort(indices)))])


def drawn(split: PreparedSplit, count: int) -> Tensor:
    """A seeded choice of a split's images."""
    return pixels(split, np.random.default_rng(0).permutation(len(split))[:count])


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Logits [N, classes]."""
    batches = torch.split(images, _BATCH)
    return np.concatenate([model(preprocessing.normalize(batch)).numpy() for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="image folders of calibration and evaluation")
    parser.add_argument("--class-index", type=Path)
    parser.add_argument("--other-data", type=Path, required=True, help="image folders of another source")
    parser.add_argument("--samples", type=int, default=96, help="calibration images")
    parser.add_argument("--images", type=int, default=500, help="of each source, to judge by")
    parser.add_argument("--deviations", type=float, nargs="*", default=[4.0, 6.0])
    arguments = parser.parse_args()
    data = open_data(DataSettings(name="image_folder", root=arguments.data, class_index=arguments.class_index))
    torch.manual_seed(0)
    created = create_model(ModelSettings(name=arguments.model, checkpoint=arguments.checkpoint), data)
    module, preprocessing = created.module.eval(), created.architecture.preprocessing
    train = data.splits["train"].prepare(preprocessing, cache=False)
    chosen = calibration_indices(train.labels.numpy(), arguments.samples, 0)
    calibration = preprocessing.normalize(pixels(train, np.asarray(chosen)))
    other_data = open_data(DataSettings(name="image_folder", root=arguments.other_data))
    sources = [
        drawn(found.splits[found.report_split].prepare(preprocessing, cache=False), arguments.images)
        for found in (data, other_data)
    ]
    wanted = [logits_of(module, images, preprocessing) for images in sources]
    example = example_input(created.architecture)
    graph = capture(module, example)
    pairs = pairs_of(graph)
    if not pairs:
        raise SystemExit(f"{arguments.model}: no batch norm, clamp and depthwise convolution in a row")
    peaks = peaks_of(graph, pairs, calibration)
    tried = {"as it is": module, "peaks of calibration": equalized(module, pairs, peaks, None)}
    for count in arguments.deviations:
        tried[f"batch norm's mean + {count:g} deviations"] = equalized(module, pairs, peaks, count)

    stage = QuantizeStage.model_validate({"kind": "quantize", "id": "int8", "effort": "fast", "placement": "full"})
    scheme, _ = resolve_scheme(stage, load_target("x86"))
    table = Table(title=f"{arguments.model}: {len(pairs)} pairs equalized, {arguments.samples} calibration images")
    for column in ("channel peaks from", "float, own source", "other source", "int8, own source", "other source"):
        table.add_column(column)
    for name, candidate in tried.items():
        int8 = quantize(
            candidate,
            stage=stage,
            scheme=scheme,
            calibration=lambda: iter(torch.split(calibration, _BATCH)),
            batches=-(-len(calibration) // _BATCH),
            example=example,
        ).simulation()
        cells = []
        for model in (candidate, int8):
            for images, reference in zip(sources, wanted, strict=True):
                got = logits_of(model, images, preprocessing)
                cells.append(f"{top1_agreement(reference, got):.2%}, {sqnr_db(reference, got):.1f} dB")
        table.add_row(name, *cells)
    console = Console(width=140)
    console.print(table)
    console.print(summarize_machine(describe_machine()))


if __name__ == "__main__":
    main()
