"""The grids that activations are rounded to, beside the values that meet them.

What enters: a calibrated int8 model, held-out images and the calibration images. What leaves: for each grid (scale and
zero point, shared by the tensors that only move values) what the float values do on it: how many are clipped, how wide
the bulk of them is, how many steps each channel uses; and other ways to round the same tensors, to try what they would
change.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgecompress.int8.calibration import ErrorObserver
from edgecompress.int8.histogram import Range, percentile_range
from edgecompress.int8.mixed import MixedModel
from edgecompress.int8.quantizer import is_share

Rounders = dict[str, Callable[..., Any]]  # by the name of the simulation's rounding node

# Calibration settings that are tried: the method, and its percentile.
METHODS: dict[str, float | None] = {"minmax": None, "percentile 99.99": 99.99, "percentile 99.9": 99.9, "mse": None}
_BULK = 99.9  # percent of the values that are called the bulk
_CHUNK = 8  # images observed at once, so that the sample which is counted is taken from all of them
_FAKE_QUANTIZE = torch.fake_quantize_per_tensor_affine


@dataclass(eq=False)
class Grid:
    """One grid, and what the float values of its tensors do on it.

    `rounders` are the nodes of the simulation that round to it, each with the name of the float node it rounds.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    rounders: dict[str, str] = field(default_factory=dict)
    values: int = 0
    clipped: int = 0
    channels: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # least and largest, by float node

    def __post_init__(self) -> None:
        self.observer, self.calibration = self._observer(), self._observer()

    def _observer(self) -> ErrorObserver:
        return ErrorObserver(
            dtype=torch.uint8 if self.low == 0 else torch.int8,
            quant_min=self.low,
            quant_max=self.high,
            qscheme=torch.per_tensor_affine,
        )

    @property
    def sources(self) -> frozenset[str]:
        """The float nodes whose values are rounded to it."""
        return frozenset(self.rounders.values())

    @property
    def range(self) -> Range:
        """The range that calibration chose."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    @property
    def seen(self) -> Range:
        """The least and the largest value seen."""
        return float(self.observer.min_val), float(self.observer.max_val)

    @property
    def clipped_share(self) -> float:
        """Share of the values that the range cuts off by more than half a step."""
        return self.clipped / max(self.values, 1)

    @property
    def bulk(self) -> Range:
        """The range that holds 99.9 % of the values, with zero inside."""
        low, high = percentile_range(self.observer.histogram(), _BULK)
        return min(low, 0.0), max(high, 0.0)

    @property
    def outlier_ratio(self) -> float:
        """Width of all values over the width of the bulk."""
        (low, high), (bulk_low, bulk_high) = self.seen, self.bulk
        return (max(high, 0.0) - min(low, 0.0)) / max(bulk_high - bulk_low, 1e-30)

    def steps(self) -> Tensor:
        """Steps of the grid that each channel uses, [channels]; channels that are always zero are left out."""
        start, end = self.range
        used = [
            (high.clamp(start, end) - low.clamp(start, end))[(high != 0) | (low != 0)] / self.scale
            for low, high in self.channels.values()
        ]
        return torch.cat(used) if used else torch.zeros(0)

    def observe(self, source: str, values: Tensor) -> None:
        """Take in the float values [N, ...] of one of its tensors."""
        start, end = self.range
        half = self.scale / 2
        self.values += values.numel()
        self.clipped += int(((values < start - half) | (values > end + half)).sum())
        self.observer(values)
        axes = [axis for axis in range(values.dim()) if axis != channel_axis(values)]
        low, high = values.amin(axes), values.amax(axes)
        if source in self.channels:
            low, high = torch.minimum(low, self.channels[source][0]), torch.maximum(high, self.channels[source][1])
        self.channels[source] = (low, high)

    def range_by(self, method: str) -> Range:
        """The range that one of METHODS chooses from the calibration images."""
        return _chosen(self.calibration, method)

    def range_seen_by(self, method: str) -> Range:
        """The range that one of METHODS would choose from the held-out images."""
        return _chosen(self.observer, method)

    def with_range(self, chosen: Range) -> Rounders:
        """Rounding to as many steps in another range."""
        scale, zero_point = self._affine(torch.tensor(chosen[0]), torch.tensor(chosen[1]))

        def rounded(values: Tensor, *_: Any) -> Tensor:
            return _FAKE_QUANTIZE(values, float(scale), int(zero_point), self.low, self.high)

        return dict.fromkeys(self.rounders, rounded)

    def outliers_in_float(self) -> Rounders:
        """The bulk of the values rounded to as many steps as if nothing lay outside, and all else left as it is."""
        low, high = self.bulk
        bulk = next(iter(self.with_range((low, high)).values()))

        def rounded(values: Tensor, *_: Any) -> Tensor:
            return torch.where((values < low) | (values > high), values, bulk(values))

        return dict.fromkeys(self.rounders, rounded)

    def per_channel(self) -> Rounders:
        """Each channel rounded to as many steps in a range of its own."""

        def rounder(source: str) -> Callable[..., Any]:
            scale, zero_point = self._affine(*self.channels[source])

            def rounded(values: Tensor, *_: Any) -> Tensor:
                axis = channel_axis(values)
                return torch.fake_quantize_per_channel_affine(values, scale, zero_point, axis, self.low, self.high)

            return rounded

        return {name: rounder(source) for name, source in self.rounders.items()}

    def _affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
        scale = ((high - low) / (self.high - self.low)).clamp(min=torch.finfo(torch.float32).eps)
        zero_point = (self.low - torch.round(low / scale)).clamp(self.low, self.high)
        return scale, zero_point.to(torch.int32)


def channel_axis(values: Tensor) -> int:
    """Where the channels are: second of [N, C, H, W], else last."""
    return 1 if values.dim() == 4 else values.dim() - 1


def _chosen(observer: ErrorObserver, method: str) -> Range:
    if method == "minmax":
        return float(observer.min_val), float(observer.max_val)
    percentile = METHODS[method]
    if percentile is not None:
        return percentile_range(observer.histogram(), percentile)
    return observer.chosen_range()


def observe_grids(mixed: MixedModel, images: Tensor, calibration: Iterable[Tensor]) -> list[Grid]:
    """Every grid of the model that calibration chose, with the float values of one batch [N, C, H, W] taken in.

    `calibration` gives the batches that the model was calibrated on. A grid that is fixed whatever the images say (a
    share between 0 and 1) is left out.
    """
    grids: dict[tuple[float, int], Grid] = {}
    for node in mixed.nodes:
        if node.target is not _FAKE_QUANTIZE:
            continue
        scale, zero_point, low, high = _numbers(node)
        if is_share(scale, zero_point, low, high):
            continue
        grid = grids.setdefault((scale, zero_point), Grid(scale, zero_point, low, high))
        grid.rounders[node.name] = mixed.rounded_node(node)
    owners = {source: grid for grid in grids.values() for source in grid.sources}

    def observe(node: Node, values: Tensor) -> None:
        owners[node.name].observe(node.name, values)

    def calibrate(node: Node, values: Tensor) -> None:
        owners[node.name].calibration(values)

    with torch.no_grad():
        for chunk in torch.split(images, _CHUNK):
            _Watching(mixed, owners, observe).run(chunk)
        for batch in calibration:
            _Watching(mixed, owners, calibrate).run(batch)
    return list(grids.values())


def _numbers(node: Node) -> tuple[float, int, int, int]:
    _, scale, zero_point, low, high = node.args[:5]
    return float(scale), int(zero_point), int(low), int(high)  # type: ignore[arg-type]


class _Watching(Interpreter):
    """Runs the float graph and shows the values of some of its nodes."""

    def __init__(self, mixed: MixedModel, names: Container[str], show: Callable[[Node, Tensor], None]) -> None:
        super().__init__(mixed.reference)
        self._names, self._show = names, show

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self._show(n, value.detach())
        return value
