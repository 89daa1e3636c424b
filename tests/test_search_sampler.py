"""What a search tries next: a known landscape is learned in few trials, and every kind of field is handled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from edgecompress.searching.front import Point, hypervolume
from edgecompress.searching.sampler import FrontSampler, added_area

LIMIT = "max_accuracy_drop"
SPACE: dict[str, BaseDistribution] = {
    "ratio": FloatDistribution(0.1, 0.9),
    "learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
    "scope": CategoricalDistribution(["layer", "global", "isomorphic"]),
    "epochs": IntDistribution(2, 10, step=2),
}


def landscape(point: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy and cost: cutting costs accuracy, and so do a far-off learning rate and two of the scopes."""
    ratio, rate = point["ratio"], np.log10(point["learning_rate"] / 0.05)
    lost = {"layer": 0.02, "global": 0.0, "isomorphic": 0.03}[point["scope"]]
    return float(0.9 - 0.15 * ratio**2 - 0.03 * rate**2 - lost + 0.001 * point["epochs"]), float(1 - ratio)


def searched(sampler: Callable[[int], optuna.samplers.BaseSampler], count: int, *, limit: float = 0.75) -> list[Point]:
    """The points of `count` trials, without the noise that the sampler saw."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    noise = np.random.default_rng(1)
    found = []
    for number in range(count):
        study.sampler = sampler(number)
        trial = study.ask(SPACE)
        accuracy, cost = landscape(trial.params)
        trial.set_constraint(LIMIT, limit - accuracy)
        study.tell(trial, (accuracy + float(noise.normal(0, 0.002)), cost))
        found.append(Point(number, accuracy, cost))
    return found


def front_sampler(number: int) -> FrontSampler:
    return FrontSampler(SPACE, seed=number, startup=6, constraint=LIMIT)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_it_finds_more_than_chance_in_as_many_trials() -> None:
    def area(sampler: Callable[[int], optuna.samplers.BaseSampler], seed: int) -> float:
        points = searched(lambda number: sampler(1000 * seed + number), 16)
        return hypervolume(points, worst_accuracy=0.75, worst_cost=1.0)

    learned = [area(front_sampler, seed) for seed in range(3)]
    chance = [area(optuna.samplers.RandomSampler, seed) for seed in range(3)]
    assert np.mean(learned) > 1.1 * np.mean(chance)


def test_a_limit_that_nothing_keeps_yet_is_sought_first() -> None:
    points = searched(front_sampler, 12, limit=0.95)
    assert max(point.accuracy for point in points[6:]) > max(point.accuracy for point in points[:6])


def test_the_same_seed_and_trials_give_the_same_point_and_another_seed_another() -> None:
    first = searched(front_sampler, 7)
    assert searched(front_sampler, 7) == first
    other = searched(lambda number: front_sampler(number + 100 * (number == 6)), 7)
    assert other[:6] == first[:6]
    assert other[6] != first[6], "workers that ask at the same time try different points"


def test_every_value_is_one_of_the_space() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for number in range(10):
        study.sampler = front_sampler(number)
        trial = study.ask(SPACE)
        assert 0.1 <= trial.params["ratio"] <= 0.9
        assert 1e-3 <= trial.params["learning_rate"] <= 1e-1
        assert trial.params["scope"] in ("layer", "global", "isomorphic")
        assert trial.params["epochs"] in (2, 4, 6, 8, 10)
        if number == 7:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, landscape(trial.params))


def test_what_a_point_adds_is_the_area_that_it_adds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        costs, accuracies, new_costs, new_accuracies = generator.random((4, 6))
        known = [Point(n, a, c) for n, (a, c) in enumerate(zip(accuracies, costs, strict=True))]
        before = hypervolume(known, worst_accuracy=0.3, worst_cost=0.9)
        expected = [
            hypervolume([*known, Point(9, a, c)], worst_accuracy=0.3, worst_cost=0.9) - before
            for a, c in zip(new_accuracies, new_costs, strict=True)
        ]
        added = added_area(costs, accuracies, new_costs, new_accuracies, limit=0.3, worst_cost=0.9)
        assert added == pytest.approx(expected)
