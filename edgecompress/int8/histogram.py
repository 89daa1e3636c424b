"""Ranges of a histogram: by percentile, by Kullback-Leibler divergence, by squared error.

What enters: counts over bins of equal width, symmetric about zero. What leaves: the low and high end that a tensor
should be quantized with. Every chooser keeps zero inside, rounds scale and zero point as the runtime does, and counts
values outside of a range with the error that clamping them makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 8192  # at least 8 a quantization step, also where one half stays empty (ReLU) and the range just doubled

Loss = Callable[[float, float], float]
Range = tuple[float, float]

# Shares of the full range that a search tries first: eight to an octave, down to a thousandth.
_SHARES = tuple(2.0 ** (-step / 8) for step in range(81))
_FINE = tuple(1.0 + step / 100 for step in range(-9, 10))
_UNSEEN = 1e-9  # probability of a bin that a quantized distribution leaves empty, so that the divergence stays finite


@dataclass(frozen=True)
class Histogram:
    """`counts` [BINS] float64 over [-limit, limit]; `low` and `high` are the exact ends of the values, both finite."""

    counts: Tensor
    limit: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """The width of one bin."""
        return 2.0 * self.limit / len(self.counts)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Centres (within the ends) and counts of the bins that are not empty, both float64 [n]."""
        bins = self.counts.nonzero().flatten()
        centres = (bins.double() + 0.5) * self.width - self.limit
        return centres.clamp(self.low, self.high), self.counts[bins]


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """The range that leaves out (100 - percentile) / 2 % of the values at each end, at most one bin too wide."""
    total = float(histogram.counts.sum())
    tail = total * (1.0 - percentile / 100.0) / 2.0
    cumulative = histogram.counts.cumsum(0)
    low_bin, high_bin = int((cumulative <= tail).sum()), int((cumulative < total - tail).sum())
    low = -histogram.limit + low_bin * histogram.width
    high = -histogram.limit + (high_bin + 1) * histogram.width
    return max(low, histogram.low), min(high, histogram.high)


def error_range(histogram: Histogram, levels: int) -> Range:
    """The range with the least squared error of values that are rounded to `levels` levels, clamped ones included.

    Both ends are searched, together and then one by one, so the range may be asymmetric.
    """
    centres, counts = histogram.filled()

    def loss(low: float, high: float) -> float:
        scale, zero_point = _grid(low, high, levels)
        read_back = (torch.round(centres / scale).clamp(-zero_point, levels - 1 - zero_point)) * scale
        return float((counts * (centres - read_back) ** 2).sum())

    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    best = _best(loss, (_clipped(low, high, share) for share in _SHARES))
    for shares in (_SHARES, _FINE, _FINE):
        best = _best(loss, [best, *((best[0], min(high, _top(shares, high, best[1]) * share)) for share in shares)])
        best = _best(loss, [best, *((max(low, _top(shares, low, best[0]) * share), best[1]) for share in shares)])
    return best


def entropy_range(histogram: Histogram, levels: int) -> Range:
    """The range whose quantized distribution has the least Kullback-Leibler divergence from that of the values.

    As in NVIDIA's TensorRT (Migacz, 2017, "8-bit Inference with TensorRT"): what lies outside counts at the ends of the
    reference only, and a level's share is spread evenly over its filled bins. The bin that holds zero is left out:
    zero is always exact, and a ReLU's zeros would outweigh all else.
    """
    centres, counts = histogram.filled()
    nonzero = centres.abs() >= histogram.width
    centres, counts = centres[nonzero], counts[nonzero]
    if not len(counts):
        return min(histogram.low, 0.0), max(histogram.high, 0.0)

    def loss(low: float, high: float) -> float:
        inside = (centres >= low) & (centres <= high)
        if int(inside.sum()) == 0:
            return float("inf")
        values, kept = centres[inside], counts[inside]
        reference = kept.clone()
        reference[0] += counts[centres < low].sum()
        reference[-1] += counts[centres > high].sum()
        scale, zero_point = _grid(low, high, levels)
        level = (torch.round(values / scale) + zero_point).clamp(0, levels - 1).long()
        sums = torch.bincount(level, weights=kept, minlength=levels)
        spread = (sums / torch.bincount(level, minlength=levels).clamp_min(1))[level]
        p, q = reference / reference.sum(), (spread / spread.sum()).clamp_min(_UNSEEN)
        return float((p * (p / q).log()).sum())

    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    fewest = levels * histogram.width  # below, a level holds less than a bin and nothing is lost by rounding
    reach = max(high, -low)
    shares = [share for share in _SHARES if share * reach >= fewest] or [1.0]
    return _best(loss, (_clipped(low, high, share) for share in shares))


def _grid(low: float, high: float, levels: int) -> tuple[float, int]:
    """Scale and zero point (from 0) of a range with zero inside."""
    scale = max((high - low) / (levels - 1), torch.finfo(torch.float32).eps)
    return scale, round(-low / scale)


def _clipped(low: float, high: float, share: float) -> Range:
    """The range cut at one distance from zero on both sides."""
    reach = share * max(high, -low)
    return max(low, -reach), min(high, reach)


def _top(shares: tuple[float, ...], end: float, found: float) -> float:
    """What shares are of: the full range at first, then what was found."""
    return end if shares is _SHARES else found


def _best(loss: Loss, ranges: Iterable[Range]) -> Range:
    """The first of the ranges with the least loss."""
    return min(ranges, key=lambda ends: loss(*ends))
