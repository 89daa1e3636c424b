"""The Pareto front and what follows from it: the pick, the nearest points where nothing is good enough, how proxies
ranked, and how much the front dominates.

What enters: points, each an accuracy (more is better) and a cost (less is better). What leaves: plain numbers and
sentences. Nothing here knows how a point came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """A finished trial: accuracy as a fraction, cost in the search's unit, and the limits that it misses, in words.

    `shortfall` is by how much it misses them, each as a share of its limit, added up; 0 where it misses none.
    """

    trial: int
    accuracy: float
    cost: float
    missed: tuple[str, ...] = ()
    shortfall: float = 0.0


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, the cheapest first; of two that are equal, the earlier trial."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy, p.trial)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def pick(front: Sequence[Point]) -> Point | None:
    """The cheapest point of the front that misses no limit, or None."""
    return next((point for point in front if not point.missed), None)


def nearest(points: Sequence[Point], count: int = 3) -> list[Point]:
    """The points that miss the limits by least."""
    return sorted(points, key=lambda p: (p.shortfall, p.cost))[:count]


def hypervolume(points: Sequence[Point], *, worst_accuracy: float, worst_cost: float) -> float:
    """Area between the front and a worst point, in accuracy times cost; points beyond that one count for nothing.

    Zitzler and Thiele, 1999: the one measure of a front that grows exactly when it dominates more.
    """
    area, last = 0.0, worst_accuracy
    for point in pareto_front([p for p in points if p.cost < worst_cost and p.accuracy > worst_accuracy]):
        area += (worst_cost - point.cost) * (point.accuracy - last)
        last = point.accuracy
    return area


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho, with the mean rank for ties; None for fewer than three pairs, or where one side is constant."""
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    spread = float(np.std(a) * np.std(b))
    return None if spread == 0 else float(np.mean((a - a.mean()) * (b - b.mean())) / spread)


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return np.array([(array < value).sum() + ((array == value).sum() + 1) / 2 for value in array])


_FEWEST_GAINS = 3  # finished trials, before it is known what may still be gained


@dataclass(frozen=True)
class EarlyRecord:
    """A trial in the middle of its training: val accuracy and predicted cost after so many epochs."""

    trial: int
    epochs: int
    accuracy: float
    cost: float


@dataclass(frozen=True)
class FinishedRecord:
    """What a finished trial was in the middle of its training, and the val accuracy that it came to."""

    early: EarlyRecord
    accuracy: float


def hopeless(
    own: EarlyRecord, finished: Sequence[FinishedRecord], *, val_images: int, accuracy_limit: float | None
) -> str | None:
    """Why a trial is not worth going on with, or None; None too while fewer than three trials are finished.

    What it may still become is its accuracy with the most that a finished trial gained from the same epoch on, and one
    standard error of an accuracy on `val_images` images. To compare accuracies at the same epoch would not do: a higher
    learning rate is behind until it has fallen. `accuracy_limit` is the least that is wanted.
    """
    others = [other for other in finished if other.early.epochs == own.epochs and other.early.trial != own.trial]
    gains = [other.accuracy - other.early.accuracy for other in others]
    if len(gains) < _FEWEST_GAINS:
        return None
    within_reach = own.accuracy + max(gains) + math.sqrt(max(own.accuracy * (1 - own.accuracy), 1e-4) / val_images)
    here = f"{own.accuracy:.1%} on val after {own.epochs} epochs, and no finished trial gained more than"
    here += f" {100 * max(gains):.1f} points from there"
    better = [other for other in others if other.early.cost <= own.cost and other.accuracy > within_reach]
    if better:
        best = max(better, key=lambda other: other.accuracy)
        return f"{here}: trial {best.early.trial} reached {best.accuracy:.1%} at no higher predicted cost"
    if accuracy_limit is not None and within_reach < accuracy_limit:
        return f"{here}: {accuracy_limit:.1%} is out of reach"
    return None
