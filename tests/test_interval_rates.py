"""Intervals hold the truth as often as they say, on latencies whose truth is known; naive ones do not.

An invented machine: every process has a speed and a ratio of its own for as long as it lives (memory layout), the
clock steps between frequencies, the machine drifts, some inferences are slow (a skewed tail) and now and then a
whole window is disturbed. All of it is seeded, so that a rate is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgecompress.measure.measure_worker import is_steady
from edgecompress.measure.statistics import (
    drift_over,
    hierarchical_bootstrap_ratio,
    percentile_interval,
    student_t_quantile,
)

SIMULATIONS = 300
# A count of 300 with a rate of 95 % stays above 92 % but for 1 % of seeds; with 90 %, it is below in 86 %.
LOWEST_RATE = 0.92


def ratios(
    generator: np.random.Generator,
    *,
    processes: int = 6,
    windows: int = 12,
    process_effect: float = 0.015,
    noise: float = 0.01,
    drift: float = 0.0,
    step: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Window medians of two models of the same speed, [processes, windows] each; run in turns."""
    shape = (processes, windows)
    at = np.arange(2 * processes * windows).reshape(processes, windows, 2) / (2 * processes * windows)
    common = generator.normal(0, 0.05, (processes, 1, 1)) + drift * at
    if step:  # each process changes frequency once, at some moment, and half of them not at all
        when = generator.integers(0, 2 * windows, (processes, 1, 1))
        stepped = np.arange(2 * windows).reshape(1, windows, 2) >= when
        common = common + stepped * step * generator.integers(0, 2, (processes, 1, 1))
    own = generator.normal(0, process_effect / np.sqrt(2), (processes, 1, 2))
    disturbed = (generator.random((*shape, 2)) < 0.05) * generator.exponential(0.3, (*shape, 2))
    common = np.broadcast_to(common, (*shape, 2)).copy()
    common[:, 1::2] = common[:, 1::2, ::-1].copy()  # who runs first takes turns: A B, B A, A B
    logs = common + own + generator.normal(0, noise, (*shape, 2)) + disturbed
    return np.exp(logs[..., 0]), np.exp(logs[..., 1])


def rate_of(holds: Callable[[np.random.Generator], bool]) -> float:
    return sum(holds(np.random.default_rng(seed)) for seed in range(SIMULATIONS)) / SIMULATIONS


def windows_only(a: np.ndarray, b: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The naive interval: all windows taken for independent samples."""
    pairs = np.log(a / b).ravel()
    medians = np.median(pairs[generator.integers(pairs.size, size=(200, pairs.size))], axis=1)
    low, high = np.exp(np.quantile(medians, [0.025, 0.975]))
    return float(low), float(high)


MACHINES = {
    "calm": {},
    "noisy windows": {"noise": 0.05},
    "many processes": {"processes": 12},
    "slow drift": {"drift": 0.5},
    "frequency steps": {"step": 0.3},
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_ratio_of_a_model_to_itself_is_one_at_the_stated_rate(machine: str) -> None:
    """A against A: called different in 8 % at most, where 5 % is stated; 1.4 times as slow is held as often."""

    def holds(generator: np.random.Generator) -> bool:
        a, b = ratios(generator, **MACHINES[machine])  # type: ignore[arg-type]
        interval = hierarchical_bootstrap_ratio(1.4 * a, b, resamples=50)
        return interval.low <= 1.4 <= interval.high

    assert rate_of(holds) >= LOWEST_RATE

    def naively(generator: np.random.Generator) -> bool:
        low, high = windows_only(*ratios(generator, **MACHINES[machine]), generator)  # type: ignore[arg-type]
        return low <= 1 <= high

    if machine != "noisy windows":  # where windows differ more than processes do, it does not matter
        assert rate_of(naively) < 0.8


def test_a_slow_drift_does_not_fool_the_ratio() -> None:
    """The machine gets slower by two thirds; measured one model after the other, half of that becomes the ratio."""
    generator = np.random.default_rng(1)
    a, b = ratios(generator, processes=10, drift=0.5, process_effect=0.003, noise=0.003)
    interval = hierarchical_bootstrap_ratio(a, b)
    assert interval.low <= 1 <= interval.high
    assert interval.relative_half_width < 0.01
    one_after_the_other = hierarchical_bootstrap_ratio(a[5:], a[:5])
    assert one_after_the_other.ratio > 1.2


def latencies(
    generator: np.random.Generator, *, processes: int, windows: int, inferences: int, slow: float, scale: float
) -> np.ndarray:
    """Latencies [processes, windows, inferences] around 1, of which a share `slow` takes longer, by an exponential."""
    shape = (processes, windows, inferences)
    logs = generator.normal(0, 0.02, (processes, 1, 1)) + generator.normal(0, 0.01, (processes, windows, 1))
    logs = logs + generator.normal(0, 0.01, shape)
    return np.exp(logs + (generator.random(shape) < slow) * generator.exponential(scale, shape))


def per_process(processes: np.ndarray, percentile: float) -> tuple[float, float]:
    """The interval that this project had before: Student's t over each process's own percentile."""
    logs = np.log([np.percentile(process, percentile) for process in processes])
    half = student_t_quantile(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


@pytest.mark.slow
@pytest.mark.parametrize("percentile", [50, 90, 99])
@pytest.mark.parametrize(
    "machine",
    [
        {"processes": 5, "windows": 12, "inferences": 9, "slow": 0.05, "scale": 0.3},
        {"processes": 12, "windows": 12, "inferences": 9, "slow": 0.05, "scale": 0.3},
        {"processes": 8, "windows": 10, "inferences": 30, "slow": 0.02, "scale": 0.1},
    ],
)
def test_percentiles_hold_the_truth_of_a_skewed_tail(machine: dict[str, float], percentile: int) -> None:
    calm = machine | {"processes": 1, "windows": 20_000}
    endless = latencies(np.random.default_rng(0), **calm).ravel()  # type: ignore[arg-type]
    truth = float(np.percentile(endless / np.median(endless), percentile))

    def made(generator: np.random.Generator) -> np.ndarray:
        # The known distribution's own median is 1 times the middle of its noise and its tail.
        return latencies(generator, **machine) / np.median(endless)  # type: ignore[arg-type]

    def holds(generator: np.random.Generator) -> bool:
        interval = percentile_interval(list(made(generator)), percentile, resamples=30)
        return interval.low <= truth <= interval.high

    assert rate_of(holds) >= LOWEST_RATE
    if percentile == 99 and machine["processes"] == 12:

        def naively(generator: np.random.Generator) -> bool:
            low, high = per_process(made(generator), percentile)
            return low <= truth <= high

        assert rate_of(naively) < 0.85


@pytest.mark.parametrize("noise", [0.002, 0.03, 0.15])
def test_noise_alone_is_not_warming_up(noise: float) -> None:
    """However strong. The rule before, three windows within 3 %, called nearly every noisy process unsteady."""

    def medians(generator: np.random.Generator) -> list[float]:
        return list(np.exp(generator.normal(0, noise, 8)))

    assert rate_of(lambda generator: is_steady(medians(generator))) >= 0.93
    if noise > 0.02:
        naive = rate_of(lambda g: (m := medians(g)[-3:]) == m and max(m) <= 1.03 * min(m))
        assert naive < 0.45


def test_warming_up_is_seen_until_it_is_over() -> None:
    """A process that starts 40 % slow and approaches its speed: what is left when it counts as steady is small."""
    left = []
    for seed in range(SIMULATIONS):
        generator = np.random.default_rng(seed)
        excess = 0.4 * np.exp(-np.arange(100) / 6)
        medians = np.exp(excess + generator.normal(0, 0.01, 100))
        steady_at = next(n for n in range(1, 101) if is_steady(list(medians[:n])))
        left.append(excess[steady_at - 1])
    assert np.median(left) < 0.03
    assert np.quantile(left, 0.95) < 0.08


def test_a_frequency_step_is_not_steady_until_it_lies_behind() -> None:
    before, after = [1.0, 1.01, 1.0, 0.99, 1.0, 1.01], [1.3, 1.31, 1.29, 1.3, 1.3, 1.29, 1.31, 1.3]
    assert not is_steady([*before, *after[:4]])
    assert is_steady([*before, *after])
    assert not is_steady(before)  # too few windows to tell


def test_drift_is_the_change_over_the_run_and_forgives_wild_values() -> None:
    times = np.arange(20.0)
    drifting = np.exp(0.2 * times / 19)
    drifting[[3, 11, 17]] *= 2
    change = drift_over(times, drifting)
    assert change is not None
    assert change.value == pytest.approx(np.exp(0.2), rel=0.02)
    least_squares = np.exp(19 * np.polyfit(times, np.log(drifting), 1)[0])
    assert abs(least_squares - np.exp(0.2)) > 0.05
    assert drift_over([0, 1, 2], [1, 1, 1]) is None
    assert drift_over([5, 5, 5, 5], [1, 2, 3, 4]) is None


@pytest.mark.parametrize("count", [6, 15])
def test_drift_intervals_hold_no_drift_at_the_stated_rate(count: int) -> None:
    def holds(generator: np.random.Generator) -> bool:
        change = drift_over(np.arange(count), np.exp(generator.normal(0, 0.05, count)))
        return change is not None and change.low <= 1 <= change.high

    assert rate_of(holds) >= LOWEST_RATE
