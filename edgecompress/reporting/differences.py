"""Two measured values in, their difference with a 95 % interval out, and whether there is one beyond doubt.

What enters: values with the intervals that their own runs gave them. What leaves: differences in the units in which
people think of them: points of accuracy, times as fast, times as small. The two were measured apart, so each interval
counts in full; what was measured side by side, like int8 and fp32 of one run, stands in its own report with a narrower
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SAME_WITHIN = 0.005  # exact values this close, as a share, are called the same


@dataclass(frozen=True)
class Difference:
    """`value` compares another candidate with a reference; `better` is whose side the whole interval is on.

    `paired` says which images made the difference, where both were judged on the same ones.
    """

    value: float
    low: float
    high: float
    better: Literal["this", "reference", "neither"]
    paired: Mapping[str, object] | None = None

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        known = {} if self.paired is None else {"paired": dict(self.paired)}
        return {"value": self.value, "ci95": [self.low, self.high], "better": self.better, **known}


def accuracy_difference(
    reference: float, reference_ci95: Sequence[float], other: float, other_ci95: Sequence[float]
) -> Difference:
    """Other less reference, in points, of two independent proportions (Newcombe, 1998, method 10).

    For the same images `paired_difference` is narrower; what this calls different, is.
    """
    value = other - reference
    low = value - math.hypot(other - other_ci95[0], reference_ci95[1] - reference)
    high = value + math.hypot(other_ci95[1] - other, reference - reference_ci95[0])
    better: Literal["this", "reference", "neither"] = "this" if low > 0 else "reference" if high < 0 else "neither"
    return Difference(100 * value, 100 * low, 100 * high, better)


def time_ratio(
    reference: float, reference_ci95: Sequence[float], other: float, other_ci95: Sequence[float]
) -> Difference:
    """How many times as long the reference takes: above 1, the other is faster. Errors add in the logarithm."""
    value = math.log(reference / other)
    low = value - math.hypot(math.log(reference / reference_ci95[0]), math.log(other_ci95[1] / other))
    high = value + math.hypot(math.log(reference_ci95[1] / reference), math.log(other / other_ci95[0]))
    better: Literal["this", "reference", "neither"] = "this" if low > 0 else "reference" if high < 0 else "neither"
    return Difference(math.exp(value), math.exp(low), math.exp(high), better)


def size_ratio(
    reference: float, other: float, reference_range: Sequence[float] = (), other_range: Sequence[float] = ()
) -> Difference:
    """How many times as large the reference is; exact, or with the ranges over which both were seen."""
    seen, own = tuple(reference_range) or (reference, reference), tuple(other_range) or (other, other)
    value, low, high = reference / other, seen[0] / own[1], seen[1] / own[0]
    better: Literal["this", "reference", "neither"] = "neither"
    if low > 1 + SAME_WITHIN:
        better = "this"
    elif high < 1 - SAME_WITHIN:
        better = "reference"
    return Difference(value, low, high, better)
