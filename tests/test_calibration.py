"""Ranges from streams of batches, against ranges that numpy finds with every value in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgecompress.int8.calibration import PercentileObserver, activation_observer

BINS = 2048


def observer(method: str, percentile: float = 99.0) -> Any:
    make = activation_observer(method, percentile)
    return make(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)


def fed(method: str, batches: list[Tensor], percentile: float = 99.0) -> Any:
    made = observer(method, percentile)
    for batch in batches:
        assert made(batch) is batch
    return made


def parameters(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of a range that is widened to hold zero, in numpy."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, np.finfo(np.float32).eps)
    return scale, int(np.clip(-round(low / scale), 0, 255))


def assert_parameters(made: Any, low: float, high: float, *, tolerance: float = 1e-6) -> None:
    scale, zero_point = made.calculate_qparams()
    wanted_scale, wanted_zero_point = parameters(low, high)
    assert float(scale) == pytest.approx(wanted_scale, rel=tolerance)
    assert abs(int(zero_point) - wanted_zero_point) <= 1


def values(count: int, seed: int, *, shape: tuple[int, ...] = ()) -> Tensor:
    """Heavy tails, as activations have."""
    draws = np.random.default_rng(seed).standard_t(3, size=count).astype(np.float32)
    return torch.from_numpy(draws).reshape(shape or (count,))


def squared_error(data: np.ndarray, scale: float, zero_point: int) -> float:
    integers = np.clip(np.round(data / scale) + zero_point, 0, 255)
    return float(np.mean((data - (integers - zero_point) * scale) ** 2))


def percentile_bounds(data: np.ndarray, percentile: float) -> tuple[float, float]:
    """The sorted values behind which (100 - percentile) / 2 % of all lie, at each end."""
    ordered = np.sort(data)
    tail = len(ordered) * (1 - percentile / 100) / 2
    return float(ordered[int(np.floor(tail))]), float(ordered[int(np.ceil(len(ordered) - tail)) - 1])


def test_minmax_is_the_range_of_all_batches() -> None:
    batches = [values(1000, seed) for seed in range(5)]
    data = torch.cat(batches).numpy()
    assert_parameters(fed("minmax", batches), float(data.min()), float(data.max()))


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_sorted_value_within_one_bin(percentile: float) -> None:
    batches = [values(4000, seed) for seed in range(6)]
    made = fed("percentile", batches, percentile)
    data = torch.cat(batches).numpy()
    low, high = (float(bound) for bound in made.clipped_range())
    wanted_low, wanted_high = percentile_bounds(data, percentile)
    width = 2 * float(made.limit) / BINS
    assert wanted_low - width <= low <= wanted_low
    assert wanted_high <= high <= wanted_high + width
    assert_parameters(made, low, high)
    if percentile == 100.0:
        assert (low, high) == (data.min(), data.max())


def test_percentile_streams_as_if_it_saw_one_batch() -> None:
    batches = [values(3000, seed) * (seed + 1) for seed in range(8)]  # the range grows with every batch
    streamed, at_once = fed("percentile", batches), fed("percentile", [torch.cat(batches)])
    assert float(streamed.counts.sum()) == float(at_once.counts.sum()) == 24_000
    width = 2 * float(streamed.limit) / BINS
    for one, other in zip(streamed.clipped_range(), at_once.clipped_range(), strict=True):
        assert abs(float(one - other)) <= width


def test_percentile_doubling_moves_counts_and_loses_none() -> None:
    first = torch.linspace(-1, 1, 4001)
    made = fed("percentile", [first, torch.tensor([7.0])])
    assert float(made.limit) == 8.0
    assert float(made.counts.sum()) == 4002
    expected = np.histogram(np.append(first.numpy(), 7.0), bins=BINS, range=(-8, 8))[0]
    # A value on an edge may count on either side.
    assert np.abs(np.cumsum(made.counts.numpy()) - np.cumsum(expected)).max() <= 2


def test_percentile_order_of_batches_does_not_matter_once_the_range_is_known() -> None:
    widest = torch.tensor([-10.0, 10.0])
    batches = [values(500, seed).clamp(-10, 10) for seed in range(4)]
    forward, backward = fed("percentile", [widest, *batches]), fed("percentile", [widest, *batches[::-1]])
    assert torch.equal(forward.counts, backward.counts)


def test_percentile_counts_more_values_than_float32_can() -> None:
    made = fed("percentile", [torch.tensor([-1.0, 1.0]), torch.zeros(1).expand(17_500_000)])
    assert float(made.counts.sum()) == 17_500_002


def test_histogram_errs_less_than_minmax_and_hardly_more_than_the_best_clip() -> None:
    batches = [values(8000, seed) for seed in range(4)]
    data = torch.cat(batches).numpy()
    errors = {}
    for method in ("histogram", "minmax"):
        scale, zero_point = fed(method, batches).calculate_qparams()
        errors[method] = squared_error(data, float(scale), int(zero_point))
    clips = np.linspace(0.05, 1.0, 96)
    best = min(squared_error(data, *parameters(data.min() * clip, data.max() * clip)) for clip in clips)
    assert errors["histogram"] < errors["minmax"]
    assert errors["histogram"] < 1.25 * best


def test_histogram_streams_nearly_as_if_it_saw_one_batch() -> None:
    batches = [values(4000, seed) * (1 + seed / 4) for seed in range(6)]
    streamed = float(fed("histogram", batches).calculate_qparams()[0])
    at_once = float(fed("histogram", [torch.cat(batches)]).calculate_qparams()[0])
    assert streamed == pytest.approx(at_once, rel=0.05)


METHODS = ["minmax", "histogram", "percentile"]


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone_give_a_usable_scale(method: str) -> None:
    made = fed(method, [torch.zeros(4, 3), torch.zeros(100)])
    scale, zero_point = made.calculate_qparams()
    assert 0 < float(scale) < 1e-4
    assert 0 <= int(zero_point) <= 255


@pytest.mark.parametrize("method", METHODS)
def test_zeros_first_count_with_what_follows(method: str) -> None:
    made = fed(method, [torch.zeros(1000), torch.full((1000,), 3.0), torch.full((10,), -1.0)], 100.0)
    assert_parameters(made, -1.0, 3.0, tolerance=0.01)
    if method == "percentile":
        assert float(made.counts.sum()) == 2010
        clipped = fed(method, [torch.zeros(1000), torch.full((1000,), 3.0), torch.full((10,), -1.0)], 99.0)
        assert -0.01 <= float(clipped.clipped_range()[0]) <= 0.0  # 10 of 2010 values are cut off, half a percent


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_one_sided_values_keep_zero_in_the_range(method: str, sign: float) -> None:
    data = sign * torch.linspace(2.0, 4.0, 5000)
    scale, zero_point = fed(method, [data]).calculate_qparams()
    assert float(scale) == pytest.approx(4.0 / 255, rel=0.02)
    assert int(zero_point) == (255 if sign < 0 else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_range_that_grows_is_followed(method: str) -> None:
    batches = [torch.linspace(-1, 1, 999) * 3**power for power in range(8)]
    made = fed(method, batches, 100.0)
    if method == "histogram":  # it may clip, but never down to what only the early batches held
        assert float(made.max_val) == pytest.approx(3.0**7)
        assert float(made.calculate_qparams()[0]) > 2 * 3.0**6 / 255
    else:
        assert_parameters(made, -(3.0**7), 3.0**7)


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_batches(method: str) -> None:
    def held(made: Any) -> int:
        tensors = [value for value in vars(made).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*made.buffers(), *tensors])

    made = fed(method, [values(2000, 0)])
    before = held(made)
    for seed in range(1, 20):
        made(values(2000, seed) * seed)
    assert held(made) == before < 40_000


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_remembered(method: str, bad: float) -> None:
    made = fed(method, [values(100, 0)])
    assert not made.saw_non_finite
    range_before = float(made.min_val), float(made.max_val)
    made(torch.tensor([1.0, bad, 1000.0]))
    assert made.saw_non_finite
    assert copy.deepcopy(made).saw_non_finite
    assert (float(made.min_val), float(made.max_val)) == range_before


@pytest.mark.parametrize("method", METHODS)
def test_layout_and_shape_do_not_matter(method: str) -> None:
    data = values(2 * 3 * 4 * 5, 0, shape=(2, 3, 4, 5))
    one = fed(method, [data]).calculate_qparams()
    other = fed(method, [data.contiguous(memory_format=torch.channels_last)]).calculate_qparams()
    assert [float(part) for part in one] == [float(part) for part in other]


def test_an_empty_batch_changes_nothing() -> None:
    made: Callable[[Tensor], Tensor] = fed("percentile", [values(100, 0)])
    assert isinstance(made, PercentileObserver)
    before = made.counts.clone()
    made(torch.zeros(0, 3))
    assert torch.equal(made.counts, before)
