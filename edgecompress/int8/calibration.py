"""Activation ranges from a stream of batches, in memory that does not grow with the number of images.

What enters: float tensors, batch after batch, through a PT2E observer. What leaves: a scale and a zero point.
Min-max and the error-minimizing histogram are torchao's own; the percentile is ours, kept as a histogram
that widens as larger values arrive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

_BINS = 2048


class _NotesNonFinite:
    """Remembers that NaN or infinity was seen, and skips such a batch.

    torchao's histogram raises for NaN, far from where the layer's name is known, and leaves infinity out in silence.
    """

    saw_non_finite = False

    def forward(self, values: Tensor) -> Tensor:
        """Observe one batch and hand it on unchanged."""
        if not bool(torch.isfinite(values).all()):
            self.saw_non_finite = True
            return values
        observed: Tensor = super().forward(values)  # type: ignore[misc]  # the observer that comes next
        return observed


class RangeObserver(_NotesNonFinite, MinMaxObserver):  # type: ignore[misc]  # torchao ships no types
    """The smallest and the largest value seen."""


class ErrorObserver(_NotesNonFinite, HistogramObserver):  # type: ignore[misc]  # torchao ships no types
    """The range with the least squared error over a histogram of the values seen."""


class PercentileObserver(_NotesNonFinite, MinMaxObserver):  # type: ignore[misc]  # torchao ships no types
    """Clips the range at a percentile of all values seen, the same share left out in total at both ends.

    The histogram holds counts over a symmetric range that doubles when a larger value arrives, so merging
    two bins into one is exact and no value is ever split or lost.
    """

    def __init__(self, percentile: float = 99.999, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.percentile = percentile
        self.register_buffer("counts", torch.zeros(_BINS, dtype=torch.float64))
        self.register_buffer("limit", torch.zeros((), dtype=torch.float64))

    def forward(self, values: Tensor) -> Tensor:
        """Count the values of one batch and hand the batch on unchanged."""
        super().forward(values)
        if self.saw_non_finite:
            return values
        flat = values.detach().to(torch.float32).flatten()
        largest = float(flat.abs().max()) if flat.numel() else 0.0
        if largest == 0.0:
            self.counts[_BINS // 2] += flat.numel()
            return values
        if float(self.limit) == 0.0:
            zeros = self.counts.sum()
            self.counts.zero_()
            self.limit.fill_(largest)
            self.counts[_BINS // 2] = zeros
        while float(self.limit) < largest:
            self._double()
        limit = float(self.limit)
        self.counts += torch.histc(flat, _BINS, min=-limit, max=limit).to(torch.float64)
        return values

    def _double(self) -> None:
        """Widen the range twofold: pairs of bins merge into the middle half."""
        merged = self.counts.view(_BINS // 2, 2).sum(dim=1)
        self.counts.zero_()
        self.counts[_BINS // 4 : 3 * _BINS // 4] = merged
        self.limit.mul_(2)

    def clipped_range(self) -> tuple[Tensor, Tensor]:
        """The range [low, high] that leaves out (100 - percentile) / 2 % of the values at each end."""
        total = self.counts.sum()
        tail = total * (1.0 - self.percentile / 100.0) / 2.0
        cumulative = self.counts.cumsum(0)
        width = 2.0 * float(self.limit) / _BINS
        low_bin = int((cumulative <= tail).sum())
        high_bin = int((cumulative < total - tail).sum())
        low = torch.tensor(-float(self.limit) + low_bin * width, dtype=torch.float32)
        high = torch.tensor(-float(self.limit) + (high_bin + 1) * width, dtype=torch.float32)
        return torch.maximum(low, self.min_val), torch.minimum(high, self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the clipped range."""
        scale, zero_point = self._calculate_qparams(*self.clipped_range())
        return scale, zero_point


def activation_observer(method: str, percentile: float) -> Any:
    """The observer constructor of a calibration method, as PT2E wants it."""
    if method == "percentile":
        return PercentileObserver.with_args(percentile=percentile)
    return {"minmax": RangeObserver, "histogram": ErrorObserver}[method]
