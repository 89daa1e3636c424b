"""What a search tries next: a model of accuracy and cost over the settings, and the point that it expects most from.

What enters: the finished trials of an Optuna study. What leaves: one point of the space. Two Gaussian processes tell
accuracy (as log odds) and cost (as a logarithm) from the settings, each a polynomial for what the fields and their
pairs are worth, and a smooth rest. Of random points, and small changes of the points on the front, the one is taken
that is expected to add most to the area under the front (Emmerich et al., 2006, "Single- and multiobjective
evolutionary optimization assisted by Gaussian random field metamodels"): the mean over worlds drawn from what the
models leave open.

It is here because Optuna's own samplers learn too slowly for the few dozen trials that training leaves time for:
docs/search.md has both side by side.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

from edgecompress.searching.front import Point, pareto_front

_CANDIDATES = 600  # of each kind: drawn anywhere, and changed from the front
_WORLDS = 32  # draws that an expectation is the mean of
_STEP = 0.15  # standard deviation of a change, as a share of a range
_CHANGED = 0.5  # share of the fields that a change touches
_LEAST_ACCURACY = 1e-3  # and so far below 1: their odds are finite
_LEAST_COST = 1e-12  # so that it has a logarithm
_MOST = 200  # trials that the models are fitted to, the latest and the front: fitting takes their number cubed
_JITTERS = (1e-6, 1e-4, 1e-2)  # of the mean variance, until rounding leaves a covariance positive

Distributions = Mapping[str, BaseDistribution]
Array = npt.NDArray[np.float64]


class FrontSampler(optuna.samplers.BaseSampler):
    """Chooses points for two objectives, accuracy to maximize and cost to minimize.

    `constraint` names the constraint whose value is the accuracy that is lost beyond what may be lost. Random points
    until `startup` trials are finished.
    """

    def __init__(self, space: Distributions, *, seed: int, startup: int, constraint: str) -> None:
        self._space = dict(space)
        self._generator = np.random.default_rng(seed)
        self._random = optuna.samplers.RandomSampler(seed)
        self._seed, self._startup, self._constraint = seed, startup, constraint

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All fields, chosen together."""
        return self._space

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, where no point was chosen."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point, or nothing (random values) while too few trials are finished."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        finished = [other for other in trials if other.params.keys() == self._space.keys()]
        if len(finished) < self._startup:
            return {}
        points = [Point(n, *_outcome(other)) for n, other in enumerate(finished)]
        front = [point.trial for point in pareto_front(points)]
        kept = sorted({*front, *range(len(finished))[-_MOST:]})
        limits = [points[n].accuracy + drop for n in kept if (drop := self._drop(finished[n])) is not None]
        chosen = self._chosen(
            np.array([self._encoded(finished[n].params) for n in kept]),
            np.array([points[n].accuracy for n in kept]),
            np.array([points[n].cost for n in kept]),
            front=[kept.index(n) for n in front],
            limit=max(limits, default=0.0),
        )
        return self._decoded(chosen)

    def _drop(self, trial: FrozenTrial) -> float | None:
        value = trial.constraints.get(self._constraint)
        return None if value is None else float(value)

    def _chosen(self, seen: Array, accuracy: Array, cost: Array, *, front: Sequence[int], limit: float) -> Array:
        """The encoded point [D] to try. `seen` is [N, D], with what came of each; `limit` is the least accuracy."""
        candidates = np.concatenate([self._anywhere(_CANDIDATES), self._changed(seen[front], _CANDIDATES)])
        both = self._features(np.concatenate([seen, candidates]))
        count = len(seen)
        worlds = _accuracy(self._drawn(both[:count], _odds(accuracy), both))
        costs = np.exp(self._fitted(both[:count], np.log(cost)).predict(both))
        worst_cost = 1.1 * float(max(costs[:count]))
        gains = [
            added_area(costs[:count], world[:count], costs[count:], world[count:], limit, worst_cost)
            for world in worlds
        ]
        expected = np.mean(gains, axis=0)
        if not np.any(expected > 0):  # first of all one that loses little enough
            expected = np.mean(worlds, axis=0)[count:]
        return np.asarray(candidates[int(np.argmax(expected))])

    # ---- the models

    def _drawn(self, seen: Array, values: Array, wanted: Array) -> Array:
        """Functions [W, M] that agree with what was seen, drawn at the M `wanted`; without the noise of measuring."""
        model = self._fitted(seen, values)
        mean, covariance = model.predict(wanted, return_cov=True)
        covariance -= np.eye(len(wanted)) * _noise_of(model)
        root = _root(covariance)
        return np.asarray(mean + self._generator.standard_normal((_WORLDS, len(wanted))) @ root.T)

    def _fitted(self, seen: Array, values: Array) -> GaussianProcessRegressor:
        kernel = (
            ConstantKernel(0.3, (1e-4, 1e2)) * DotProduct(1.0, "fixed") ** 2
            + ConstantKernel(0.3, (1e-4, 1e2)) * RBF(1.5, (0.5, 10.0))
            + WhiteKernel(0.05, (1e-5, 1.0))
        )
        model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=self._seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound is an answer too
            return model.fit(seen, values)

    # ---- points: numbers as shares of their ranges, choices as their index

    def _anywhere(self, count: int) -> Array:
        columns = [
            self._generator.integers(len(d.choices), size=count).astype(float)
            if isinstance(d, CategoricalDistribution)
            else self._generator.random(count)
            for d in self._space.values()
        ]
        return np.stack(columns, axis=1)

    def _changed(self, points: Array, count: int) -> Array:
        """Small changes of `points`, each as often."""
        chosen = points[self._generator.integers(len(points), size=count)]
        steps = chosen + _STEP * self._generator.standard_normal(chosen.shape)
        others = self._anywhere(count)
        for column, distribution in enumerate(self._space.values()):
            if not isinstance(distribution, CategoricalDistribution):
                others[:, column] = np.clip(steps[:, column], 0, 1)
        touched = self._generator.random(chosen.shape) < _CHANGED
        return np.where(touched, others, chosen)

    def _encoded(self, params: Mapping[str, Any]) -> list[float]:
        row = []
        for name, distribution in self._space.items():
            if isinstance(distribution, CategoricalDistribution):
                row.append(float(distribution.choices.index(params[name])))
            else:
                low, high, log = _range(distribution)
                value = np.log(params[name]) if log else params[name]
                row.append(float((value - low) / (high - low)) if high > low else 0.0)
        return row

    def _decoded(self, point: Array) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for share, (name, distribution) in zip(point, self._space.items(), strict=True):
            if isinstance(distribution, CategoricalDistribution):
                found[name] = distribution.choices[int(share)]
                continue
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            low, high, log = _range(distribution)
            value = float(np.exp(low + share * (high - low)) if log else low + share * (high - low))
            if distribution.step is not None:
                value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
            value = min(max(value, distribution.low), distribution.high)
            found[name] = round(value) if isinstance(distribution, IntDistribution) else value
        return found

    def _features(self, points: Array) -> Array:
        """[N, F]: numbers from -1 to 1, a column for each choice."""
        columns = []
        for column, distribution in enumerate(self._space.values()):
            if isinstance(distribution, CategoricalDistribution):
                columns += [(points[:, column] == n) / np.sqrt(2) for n in range(len(distribution.choices))]
            else:
                value = 2 * points[:, column] - 1
                columns += [value, value**2]
        return np.stack(columns, axis=1)


def _range(distribution: BaseDistribution) -> tuple[float, float, bool]:
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    return (np.log(low), np.log(high), True) if distribution.log else (low, high, False)


def added_area(
    costs: Array,
    accuracies: Array,
    new_costs: Array,
    new_accuracies: Array,
    limit: float,
    worst_cost: float,
) -> Array:
    """What each new point alone would add to the area under the front, [M]; as `hypervolume` counts it."""
    front = pareto_front(
        [Point(n, a, c) for n, (a, c) in enumerate(zip(accuracies, costs, strict=True)) if a > limit and c < worst_cost]
    )
    begins = np.array([-np.inf, *(point.cost for point in front)])
    ends = np.array([*begins[1:], worst_cost])
    levels = np.array([limit, *(point.accuracy for point in front)])
    widths = np.clip(ends[None] - np.maximum(begins[None], new_costs[:, None]), 0, None)
    return np.asarray(np.sum(widths * np.clip(new_accuracies[:, None] - levels[None], 0, None), axis=1))


def _outcome(trial: FrozenTrial) -> tuple[float, float]:
    """A finished trial's accuracy and cost."""
    return float(trial.values[0]), max(float(trial.values[1]), _LEAST_COST)


def _root(covariance: Array) -> Array:
    """A lower triangular root of a covariance that rounding may have left not quite positive."""
    scale = max(float(np.mean(np.diag(covariance))), 1e-9)
    for jitter in _JITTERS[:-1]:
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.asarray(np.linalg.cholesky(covariance + np.eye(len(covariance)) * jitter * scale))
    return np.asarray(np.linalg.cholesky(covariance + np.eye(len(covariance)) * _JITTERS[-1] * scale))


def _odds(accuracy: Array) -> Array:
    clipped = np.clip(accuracy, _LEAST_ACCURACY, 1 - _LEAST_ACCURACY)
    return np.asarray(np.log(clipped / (1 - clipped)))


def _accuracy(odds: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-odds)))


def _noise_of(model: GaussianProcessRegressor) -> float:
    """Variance of one measurement, in the units of the values."""
    return float(model.kernel_.k2.noise_level * model._y_train_std**2)
