"""Whether a change of accuracy is more than chance: exact tests on the images whose answer changed.

What enters: for each image, whether it was right before and after. What leaves: McNemar's exact p-value, for all images
and for each class, and how many images of a class would settle an open case. Images that are right twice or wrong
twice say nothing about a change, so only the others count. Of a score that has a value for every image, such as
Brier's, all images count: the paired z-test.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 0.05
_MOST_IMAGES = 1_000_000
_FEWEST_FOR_A_MEAN = 100


@dataclass(frozen=True)
class McNemar:
    """`lost` images were right before and wrong after, `won` the other way round; `p_value` is two-sided."""

    lost: int
    won: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mcnemar(right_before: NDArray[np.bool_], right_after: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test of two models on the same images, both arrays [samples].

    Had nothing changed, each changed image would be lost or won like a fair coin: with b lost and c won,
    p = min(1, 2 * sum over i = 0..min(b, c) of C(b + c, i) / 2**(b + c)).
    Q. McNemar, Psychometrika 12 (1947); the exact form: T. Dietterich, Neural Computation 10 (1998), section 3.1.
    """
    lost = int(np.sum(right_before & ~right_after))
    won = int(np.sum(~right_before & right_after))
    return McNemar(lost, won, min(1.0, 2 * _lower_tail(min(lost, won), lost + won)))


def p_of_drop(lost: int, won: int) -> float:
    """The one-sided test: the chance of at least `lost` losses among the changed images, were it a fair coin."""
    return _lower_tail(won, lost + won)


def p_of_mean(differences: NDArray[np.floating]) -> float:
    """The one-sided paired z-test: the chance of a mean as far above zero, had nothing changed; [samples].

    For a bounded score: rare large losses, such as those of cross-entropy, are often missing among few samples, which
    then look better than they are. 1.0 below a hundred samples, for the same reason, and where nothing differs.
    """
    if differences.size < _FEWEST_FOR_A_MEAN:
        return 1.0
    deviation = float(np.std(differences, ddof=1))
    if deviation == 0.0:
        return 1.0
    z = float(np.mean(differences)) * math.sqrt(differences.size) / deviation
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def _lower_tail(most: int, trials: int) -> float:
    """P(X <= most) of a fair coin thrown `trials` times, in whole numbers until the last division."""
    term, total = 1, 0
    for successes in range(min(most, trials) + 1):
        total += term
        term = term * (trials - successes) // (successes + 1)
    return total / (1 << trials)


def images_needed(samples: int, lost: int, won: int, *, level: float) -> int | None:
    """About how many images of a class it takes until a drop at these rates has a p-value below `level`.

    None where nothing was lost, where as much was won, or where a million images would not do.
    """
    if lost <= won:
        return None
    count = samples
    while count <= _MOST_IMAGES:
        expected = (math.floor(rate * count / samples + 1e-9) for rate in (lost, won))
        if p_of_drop(*expected) < level:
            return count
        count += max(1, count // 50)  # to about 2 %, so that rare losses take no long search
    return None
