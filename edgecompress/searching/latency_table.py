"""A table of layer times, measured once on the target: what a network will take, before it is trained.

What enters: an architecture, and later networks cut from it. What leaves: predicted milliseconds in int8. The
architecture is written in several widths with random weights, since time does not depend on them, and profiled layer by
layer. A layer of a shape that was measured takes its own time; another is interpolated, for each kind of layer, from
its multiply-accumulates and the values that it reads and writes. Measuring decides in the end: this only ranks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from edgecompress import console
from edgecompress.errors import EdgeCompressError
from edgecompress.int8.placement_trial import write_for_timing
from edgecompress.int8.post_training import quantize
from edgecompress.int8.scheme import resolve_scheme
from edgecompress.measure.operator_times import segment_times
from edgecompress.models.checkpoint import Checkpoint, example_input
from edgecompress.models.complexity import observe_layers
from edgecompress.models.model_building import Architecture, build, copy_of
from edgecompress.pruning.prune import ChannelPruner
from edgecompress.run_directory import Json, read_json, versioned, write_json
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import CalibrationSettings, QuantizeStage
from edgecompress.settings.target import Target

_RATIOS = (0.0, 0.5, 0.75)  # shares of the channels that go, in the networks that are measured
_SECONDS = 0.5  # for each file
_IMAGES = 4  # to calibrate on: scales do not change times


@dataclass(frozen=True)
class LayerShape:
    """What a layer's time depends on: its kind, and how much it computes, reads and writes for one image."""

    kind: str
    macs: int
    read: int
    written: int
    weights: int

    @property
    def features(self) -> tuple[float, float, float]:
        """What an unknown layer's time is interpolated from."""
        return float(self.macs), float(self.read + self.written), float(self.weights)


def layer_shapes(module: nn.Module, example: Tensor) -> list[LayerShape]:
    """The layers with weights in the order in which they run; `example` is [N, C, H, W] on the module's device."""
    found: list[LayerShape] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        macs = output[:1].numel() * weight[0].numel()
        found.append(LayerShape(_kind(layer), macs, inputs[0][:1].numel(), output[:1].numel(), weight.numel()))

    observe_layers(module, example, note)
    return found


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d):
        return "linear"
    size = "x".join(str(side) for side in layer.kernel_size)
    grouped = "depthwise " if layer.groups == layer.in_channels > 1 else "grouped " if layer.groups > 1 else ""
    return f"{grouped}convolution {size}"


@dataclass
class LatencyTable:
    """Measured layers, kept in one file; `architectures` names those whose widths were measured."""

    path: Path
    target: Target
    rows: dict[LayerShape, float]
    architectures: list[str]

    @classmethod
    def open(cls, path: Path, target: Target) -> LatencyTable:
        """The table at `path`, or an empty one."""
        document = read_json(path) if path.is_file() else {"rows": [], "architectures": []}
        rows = {LayerShape(**row["layer"]): float(row["ms"]) for row in document["rows"]}
        return cls(path, target, rows, list(document["architectures"]))

    def measure(self, architecture: Architecture) -> None:
        """Measure an architecture's layers in several widths, unless that was done. What cannot be measured is said."""
        name = f"{architecture.name} {architecture.to_dict()}"
        if name in self.architectures:
            return
        with console.progress(f"measuring the layers of {architecture.name}", len(_RATIOS)) as advance:
            for ratio in _RATIOS:
                try:
                    for shape, ms in self._measured(architecture, ratio):
                        self.rows[shape] = ms
                except EdgeCompressError as error:
                    console.note(f"the layers of {architecture.name} without {ratio:.0%} of its channels: {error}")
                advance()
        self.architectures.append(name)
        write_json(self.path, versioned(self.to_json()))

    def predict_ms(self, layers: Sequence[LayerShape]) -> float | None:
        """Milliseconds of a network's layers together; None where the table holds no layer of a kind."""
        total = 0.0
        for kind in {layer.kind for layer in layers}:
            known = {shape: ms for shape, ms in self.rows.items() if shape.kind == kind}
            if not known:
                return None
            fit = LinearRegression(positive=True).fit(
                np.array([shape.features for shape in known]), np.array(list(known.values()))
            )
            for layer in (layer for layer in layers if layer.kind == kind):
                total += known.get(layer) or float(fit.predict(np.array([layer.features]))[0])
        return total

    def to_json(self) -> Json:
        """The table as its file holds it."""
        rows = [{"layer": shape.__dict__, "ms": ms} for shape, ms in self.rows.items()]
        return {"target": self.target.name, "architectures": self.architectures, "rows": rows}

    def _measured(self, architecture: Architecture, ratio: float) -> Iterator[tuple[LayerShape, float]]:
        torch.manual_seed(0)
        example = example_input(architecture)
        module = build(architecture).eval()
        if ratio:
            # Never deeper than a multiple allows: then this width was measured already.
            stage = PruneStage(kind="prune", id="width", channel_ratio=ratio, scope="layer")
            multiple = self.target.channel_multiple
            pruner = ChannelPruner(module, stage=stage, channel_multiple=multiple, example=example, scoring_batches=[])
            scored = pruner.score()
            pruner.cut_to(pruner.plan(ratio, scored), scored)
        source = Checkpoint(module, architecture)
        stage_int8 = QuantizeStage(
            kind="quantize", id="int8", effort="fast", calibration=CalibrationSettings(method="minmax")
        )
        images = torch.randn(_IMAGES, *example.shape[1:])
        graph = quantize(
            copy_of(module),
            stage=stage_int8,
            scheme=resolve_scheme(stage_int8, self.target)[0],
            calibration=lambda: iter([images]),
            batches=1,
            example=example,
        ).graph
        shapes = layer_shapes(module, example[:1])
        with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
            int8 = write_for_timing(graph, source, Path(scratch) / "int8.onnx", self.target)
            times = segment_times(int8, threads=self.target.threads, seconds=_SECONDS)
        if len(times) == len(shapes):
            yield from zip(shapes, times, strict=True)
        else:
            console.note(
                f"{architecture.name} has {len(shapes)} layers and its file {len(times)}: their times cannot "
                "be told apart, so this network is left out of the table"
            )
