"""Activation ranges from a stream of batches, in memory that does not grow with the number of images.

What enters: float tensors, batch after batch, through a PT2E observer. What leaves: a scale and a zero point, and
whether the ranges had settled. The ends of all values are exact; what lies between them is counted in a histogram that
doubles its range when a larger value arrives, from a strided sample of each batch (a full count costs more than the
forward pass does).
"""

from __future__ import annotations

import math
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

MAX_COUNTED = 2**17  # values of one batch that are counted

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
        low, high = torch.aminmax(values.detach())  # NaN comes through, so no pass of its own is needed to find it
        if not math.isfinite(float(low)) or not math.isfinite(float(high)):
            self.saw_non_finite = True
            return values
        self.min_val = torch.minimum(self.min_val, low.float())
        self.max_val = torch.maximum(self.max_val, high.float())
        self._count(values.detach())
        return values

    def _count(self, values: Tensor) -> None:
        """What else is kept of a batch: here, nothing."""

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
    it stands for; the stride shares no factor with any side of the tensor, so no channel or column is left out.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.limit = 0.0
        self._batches = 0

    def _count(self, values: Tensor) -> None:
        largest = max(-float(self.min_val), float(self.max_val))
        if largest == 0.0:
            self.counts[BINS // 2] += values.numel()
            return
        self._widen(largest)
        stride = _stride(values)
        flat = _in_memory_order(values)[self._batches % stride :: stride].float()
        self._batches += 1
        found = torch.histc(flat, BINS, min=-self.limit, max=self.limit).double()
        self.counts += found * (values.numel() / flat.numel())

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

    def _choose(self, histogram: Histogram) -> Range:
        raise NotImplementedError

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


def _stride(values: Tensor) -> int:
    """The smallest stride that counts at most MAX_COUNTED values and shares no factor with a side of the tensor."""
    stride = -(-values.numel() // MAX_COUNTED)
    while stride > 1 and any(math.gcd(stride, side) > 1 for side in values.shape[1:]):
        stride += 1
    return stride


def _in_memory_order(values: Tensor) -> Tensor:
    """All values as one axis, without a copy for either layout of images."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.reshape(-1)
