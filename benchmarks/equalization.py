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
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from two_sources import BATCH, TwoSources, add_arguments

from edgecompress.int8.capture import capture
from edgecompress.machine import describe_machine, summarize_machine

aten = torch.ops.aten
_CLAMPS = {aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default}
_MOST = 8.0  # times that a channel is scaled up


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

    for part in torch.split(images, BATCH):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, samples=96)
    parser.add_argument("--deviations", type=float, nargs="*", default=[4.0, 6.0])
    arguments = parser.parse_args()
    bench = TwoSources(arguments)
    module, calibration = bench.module, bench.calibration()
    graph = capture(module, bench.example)
    pairs = pairs_of(graph)
    if not pairs:
        raise SystemExit(f"{arguments.model}: no batch norm, clamp and depthwise convolution in a row")
    peaks = peaks_of(graph, pairs, calibration)
    tried = {"as it is": module, "peaks of calibration": equalized(module, pairs, peaks, None)}
    for count in arguments.deviations:
        tried[f"batch norm's mean + {count:g} deviations"] = equalized(module, pairs, peaks, count)

    table = Table(title=f"{arguments.model}: {len(pairs)} pairs equalized, {arguments.samples} calibration images")
    for column in ("channel peaks from", "float, own source", "other source", "int8, own source", "other source"):
        table.add_column(column)
    for name, candidate in tried.items():
        models = (candidate, bench.int8(candidate, "fast", calibration))
        found = [result for model in models for result in bench.compare(model)]
        cells = [f"{agreement:.2%}, {decibels:.1f} dB" for agreement, decibels in found]
        table.add_row(name, *cells)
    console = Console(width=140)
    console.print(table)
    console.print(summarize_machine(describe_machine()))


if __name__ == "__main__":
    main()
