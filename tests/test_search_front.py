"""The front, its area, the pick, the rule on hopeless trials, and rank correlation, against plain calculations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgecompress.searching.front import (
    EarlyRecord,
    FinishedRecord,
    Point,
    hopeless,
    hypervolume,
    nearest,
    pareto_front,
    pick,
    rank_correlation,
)


def _random_points(seed: int, count: int = 30) -> list[Point]:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 12, size=(count, 2)) / 12  # coarse, so that ties occur
    return [Point(number, float(a), float(c)) for number, (a, c) in enumerate(values)]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    points = _random_points(seed)
    front = pareto_front(points)

    def dominated(p: Point) -> bool:
        return any(
            o.accuracy >= p.accuracy and o.cost <= p.cost and (o.accuracy, o.cost) != (p.accuracy, p.cost)
            for o in points
        )

    expected = {(p.accuracy, p.cost) for p in points if not dominated(p)}
    assert {(p.accuracy, p.cost) for p in front} == expected
    assert len(front) == len(expected)
    assert [p.cost for p in front] == sorted(p.cost for p in front)


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_dominated_area(seed: int) -> None:
    points = _random_points(seed, count=8)
    grid = (np.arange(240) + 0.5) / 240
    covered = np.zeros((240, 240), dtype=bool)
    for p in points:
        covered |= (grid[:, None] < p.accuracy) & (grid[None, :] > p.cost)
    area = covered[np.ix_(grid > 0.25, grid < 0.75)].sum() / 240**2
    assert hypervolume(points, worst_accuracy=0.25, worst_cost=0.75) == pytest.approx(area, abs=1e-9)


def test_the_pick_is_the_cheapest_that_misses_nothing() -> None:
    points = [Point(0, 0.8, 1.0, ("too inaccurate",), 0.5), Point(1, 0.9, 2.0), Point(2, 0.95, 3.0)]
    chosen = pick(pareto_front(points))
    assert chosen is not None
    assert chosen.trial == 1
    missing = [Point(n, 0.5, 1.0, ("no",), shortfall) for n, shortfall in enumerate((0.3, 0.1, 0.2, 0.4))]
    assert pick(missing) is None
    assert [p.trial for p in nearest(missing)] == [1, 2, 0]


def test_rank_correlation_is_pearson_on_mean_ranks() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    first, second = [1, 1, 2, 5, 3], [2, 1, 1, 9, 4]
    ranks = ([1.5, 1.5, 3, 5, 4], [3, 1.5, 1.5, 5, 4])
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def _finished(trial: int, early: float, accuracy: float, cost: float, epochs: int = 2) -> FinishedRecord:
    return FinishedRecord(EarlyRecord(trial, epochs, early, cost), accuracy)


OWN = EarlyRecord(9, 2, 0.80, 5.0)
DEARER = [_finished(number, 0.80, 0.80 + gain, 9.0) for number, gain in enumerate((0.01, 0.02, 0.03))]


def test_a_trial_is_hopeless_when_a_cheaper_one_ended_where_it_cannot_come_to() -> None:
    def why(*others: FinishedRecord, val_images: int = 10_000) -> str | None:
        return hopeless(OWN, [*DEARER, *others], val_images=val_images, accuracy_limit=None)

    assert "trial 5 reached 84.0%" in str(why(_finished(5, 0.82, 0.84, 5.0)))
    for other in (
        _finished(5, 0.82, 0.84, 5.1),  # dearer
        _finished(5, 0.82, 0.832, 5.0),  # within the error of 10,000 images
        _finished(5, 0.82, 0.84, 1.0, epochs=3),  # known at another epoch only
        _finished(9, 0.82, 0.84, 1.0),  # its own earlier attempt
        _finished(5, 0.79, 0.84, 1.0),  # was no better by then
    ):
        assert why(other) is None, other
    assert why(_finished(5, 0.82, 0.84, 5.0), val_images=100) is None


def test_a_trial_is_hopeless_when_the_limit_is_out_of_reach() -> None:
    assert "out of reach" in str(hopeless(OWN, DEARER, val_images=10_000, accuracy_limit=0.9))
    assert hopeless(OWN, DEARER, val_images=10_000, accuracy_limit=0.83) is None
    assert hopeless(OWN, DEARER[:2], val_images=10_000, accuracy_limit=0.9) is None  # too few to go by


def test_ties_on_the_front_keep_the_earlier_trial() -> None:
    for order in itertools.permutations([Point(3, 0.9, 1.0), Point(1, 0.9, 1.0), Point(2, 0.9, 2.0)]):
        assert [p.trial for p in pareto_front(order)] == [1]
