"""Activation ranges from a stream of batches, in memory that does not grow with the number of images.

What enters: float tensors, batch after batch, through a PT2E observer. What leaves: a scale and a zero point, and
whether the ranges had settled. The ends of all values are exact; what lies between them is counted in a histogram that
doubles its range when a larger value arrives. Of a large batch the tails are counted in full, as a high percentile lies
there, and the rest by a strided sample: counting every value of a ResNet-50 takes as long as its forward pass.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import MinMaxObserver

from edgecompress import console
from edgecompress.int8.histogram import BINS, Histogram, Range, entropy_range, error_range, percentile_range
from edgecompress.int8.quantizer import module_name

MAX_COUNTED = 2**16  # values of one batch that are counted, beside its tails
TAIL = 2.0**-13  # share of a batch, at each end, whose values are all counted; percentile 99.999 leaves out 2**-17.6

_BLOCK = 64  # neighbours in memory; tails are looked for only in blocks that reach into them

_MOVED = 0.1  # share of its width by which a range moves at most once it has settled
_MANY = 0.2  # share of tensors that may move more
_WORST = 3


class RangeObserver(MinMaxObserver):  # type: ignore[misc]  # torchao ships no types
    """The smallest and the largest value seen. NaN and infinity are remembered, and such a batch is skipped."""

    saw_non_finite = False
    min_val: Tensor
    max_val: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """Observe one batch and hand it on unchanged."""
        if not values.numel():
            return values
        ordered = _in_memory_order(values.detach())
        lows, highs = self._ends(ordered.reshape(-1))
        low, high = lows.min(), highs.max()  # NaN comes through, so no pass of its own is needed to find it
        if not math.isfinite(float(low)) or not math.isfinite(float(high)):
            self.saw_non_finite = True
            return values
        self.min_val = torch.minimum(self.min_val, low.float())
        self.max_val = torch.maximum(self.max_val, high.float())
        self._count(ordered, lows, highs)
        return values

    def _ends(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each part of a batch, both [parts]; here, of all of it."""
        low, high = torch.aminmax(flat)
        return low.reshape(1), high.reshape(1)

    def _count(self, ordered: Tensor, lows: Tensor, highs: Tensor) -> None:
        """What else is kept of a batch, given the ends of its parts: here, nothing."""

    def chosen_range(self) -> Range:
        """The ends that the method chooses from what was seen so far."""
        return float(self.min_val), float(self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the chosen range."""
        low, high = (torch.tensor(end, dtype=torch.float32) for end in self.chosen_range())
        scale, zero_point = self._calculate_qparams(low, high)
        return scale, zero_point


class CountingObserver(RangeObserver):
    """Keeps a histogram of the values seen; subclasses choose a range by it.

    The histogram spans a symmetric power of two that doubles when a larger value arrives, so merging two bins into one
    is exact. Of a batch with more than MAX_COUNTED values a strided sample is counted, each with the weight of those
    it stands for; the stride shares no factor with any side of the tensor, so no channel or column is left out. Beyond
    the values that cut off TAIL of the sample at its ends, every value of the batch is counted, each for itself.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.limit = 0.0
        self._batches = 0

    def _ends(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each block of a batch that will be sampled, the values that fill no block being the last."""
        if len(flat) <= MAX_COUNTED:
            return super()._ends(flat)
        blocks, rest = _blocks(flat)
        lows, highs = blocks.amin(dim=1), blocks.amax(dim=1)  # torch.aminmax along an axis takes three times as long
        if len(rest):
            low, high = super()._ends(rest)
            lows, highs = torch.cat([lows, low]), torch.cat([highs, high])
        return lows, highs

    def _count(self, ordered: Tensor, lows: Tensor, highs: Tensor) -> None:
        flat, largest = ordered.reshape(-1), max(-float(self.min_val), float(self.max_val))
        if largest == 0.0:
            self.counts[BINS // 2] += len(flat)
            return
        self._widen(largest)
        if len(flat) <= MAX_COUNTED:
            self.counts += self._counted(flat)
            return
        found = self._counted(_sample(ordered, self._batches))
        self._batches += 1
        tail, summed = TAIL * float(found.sum()), found.cumsum(0)
        first = int((summed <= tail).sum())
        end = BINS - int((found.flip(0).cumsum(0) <= tail).sum())
        width = 2.0 * self.limit / BINS
        reaches = (lows < first * width - self.limit) | (highs >= end * width - self.limit)
        blocks, rest = _blocks(flat)
        exact = self._counted(torch.cat([blocks[reaches[: len(blocks)]].reshape(-1), rest]))
        exact[first:end] = 0.0
        found[:first] = found[end:] = 0.0
        self.counts += exact + found * ((len(flat) - exact.sum()) / found.sum())

    def _counted(self, flat: Tensor) -> Tensor:
        """The counts of these values, float64 [BINS]."""
        return torch.histc(flat.float(), BINS, min=-self.limit, max=self.limit).double()

    def _widen(self, largest: float) -> None:
        """Double the range until it holds `largest`; pairs of bins merge into the middle half."""
        if self.limit == 0.0:  # nothing but zeros so far, and they stay in their bin
            self.limit = 2.0 ** math.ceil(math.log2(largest))
        while self.limit < largest:
            merged = self.counts.view(BINS // 2, 2).sum(dim=1)
            self.counts.zero_()
            self.counts[BINS // 4 : 3 * BINS // 4] = merged
            self.limit *= 2.0

    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(self.counts, self.limit, float(self.min_val), float(self.max_val))

    def chosen_range(self) -> Range:
        """The ends that the method chooses from what was seen so far."""
        if self.limit == 0.0 or not float(self.counts.sum()):
            return float(self.min_val), float(self.max_val)
        return self._choose(self.histogram())

    @abstractmethod
    def _choose(self, histogram: Histogram) -> Range:
        """The ends of the range, by the method that a subclass stands for."""

    @property
    def levels(self) -> int:
        """How many integers a value may become."""
        return int(self.quant_max) - int(self.quant_min) + 1


class PercentileObserver(CountingObserver):
    """Clips the range at a percentile of all values seen, the same share left out at both ends."""

    def __init__(self, percentile: float = 99.999, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.percentile = percentile

    def _choose(self, histogram: Histogram) -> Range:
        return percentile_range(histogram, self.percentile)


class ErrorObserver(CountingObserver):
    """The range with the least squared error of the quantized values."""

    def _choose(self, histogram: Histogram) -> Range:
        return error_range(histogram, self.levels)


class EntropyObserver(CountingObserver):
    """The range whose quantized distribution diverges least from that of the values."""

    def _choose(self, histogram: Histogram) -> Range:
        return entropy_range(histogram, self.levels)


def activation_observer(method: str, percentile: float) -> Any:
    """The observer constructor of a calibration method, as PT2E wants it. `histogram` is an old name of `mse`."""
    if method == "percentile":
        return PercentileObserver.with_args(percentile=percentile)
    observers = {"minmax": RangeObserver, "entropy": EntropyObserver, "mse": ErrorObserver, "histogram": ErrorObserver}
    return observers[method]


@dataclass(frozen=True)
class CalibrationFacts:
    """How far ranges moved from the first half of the calibration batches to all of them.

    `worst` holds module names and the share of its width by which each range moved, the largest first.
    """

    tensors: int
    moved: int
    threshold: float
    worst: tuple[tuple[str, float], ...]

    @property
    def is_narrow(self) -> bool:
        """Whether more ranges still move than may."""
        return self.moved > _MANY * self.tensors

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"is_narrow": self.is_narrow}


class RangeWatch:
    """Compares each tensor's range at half of the `batches` with the one at the end."""

    def __init__(self, prepared: GraphModule, batches: int) -> None:
        self._prepared = prepared
        self._half = batches // 2
        self._seen = 0
        self._before: dict[str, Range] = {}

    def advance(self) -> None:
        """One batch went through."""
        self._seen += 1
        if self._seen == self._half:
            self._before = {target: observer.chosen_range() for target, _, observer in self._observers()}

    def finish(self) -> CalibrationFacts | None:
        """What moved, with a warning where too much did; None where a single batch leaves nothing to compare."""
        if not self._before or self._seen <= self._half:
            return None
        shifts = []
        for target, name, observer in self._observers():
            (low, high), (old_low, old_high) = observer.chosen_range(), self._before[target]
            width = max(high, 0.0) - min(low, 0.0)
            shifts.append((name, (abs(low - old_low) + abs(high - old_high)) / width if width > 0 else 0.0))
        shifts.sort(key=lambda shift: -shift[1])
        moved = sum(shift > _MOVED for _, shift in shifts)
        facts = CalibrationFacts(len(shifts), moved, _MOVED, tuple(shifts[:_WORST]))
        if facts.is_narrow:
            worst = ", ".join(f"{name} ({shift:.0%})" for name, shift in facts.worst)
            console.warn(
                f"too few calibration images: from the first half of them to all, the ranges of {moved} of "
                f"{len(shifts)} tensors moved by more than {_MOVED:.0%}; raise calibration.samples. Worst: {worst}"
            )
        return facts

    def _observers(self) -> Iterator[tuple[str, str, RangeObserver]]:
        """Each activation observer once, though several nodes may share it."""
        seen: set[int] = set()
        for node in self._prepared.graph.nodes:
            if node.op != "call_module":
                continue
            observer = self._prepared.get_submodule(str(node.target))
            if isinstance(observer, RangeObserver) and id(observer) not in seen:
                seen.add(id(observer))
                yield str(node.target), module_name(node.args[0]), observer


def _blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the values as [blocks, _BLOCK], and of the fewer than _BLOCK at the end."""
    whole = len(flat) - len(flat) % _BLOCK
    return flat[:whole].view(-1, _BLOCK), flat[whole:]


def _sample(ordered: Tensor, shift: int) -> Tensor:
    """At most MAX_COUNTED values, about evenly spaced, another choice for each `shift`.

    Neighbours are taken together where the last side allows it: a cache line holds 16 values, and fetching it for one
    takes as long. The smallest stride is used that shares no factor with a side of the tensor.
    """
    piece = math.gcd(ordered.shape[-1], _BLOCK)
    sides = (*ordered.shape[1:-1], ordered.shape[-1] // piece)
    stride = -(-ordered.numel() // MAX_COUNTED)
    while stride > 1 and any(math.gcd(stride, side) > 1 for side in sides):
        stride += 1
    return ordered.reshape(-1, piece)[shift % stride :: stride].reshape(-1)


def _in_memory_order(values: Tensor) -> Tensor:
    """The tensor with its axes as memory holds them, so that flattening copies neither layout of images."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1)
    return values if values.dim() else values.reshape(1)
