"""Ranges from streams of batches, against ranges that numpy finds with every value in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from edgecompress.int8.calibration import MAX_COUNTED, TAIL, PercentileObserver, RangeWatch, activation_observer
from edgecompress.int8.capture import capture
from edgecompress.int8.histogram import BINS
from edgecompress.int8.quantizer import OnnxRuntimeQuantizer
from edgecompress.int8.scheme import Scheme


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
    low, high = (float(bound) for bound in made.chosen_range())
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
    for one, other in zip(streamed.chosen_range(), at_once.chosen_range(), strict=True):
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
    assert float(made.counts.sum()) == pytest.approx(17_500_002, rel=1e-12)


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


METHODS = ["minmax", "mse", "percentile"]
ALL_METHODS = [*METHODS, "entropy", "histogram"]


@pytest.mark.parametrize("method", ALL_METHODS)
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
        assert -0.01 <= float(clipped.chosen_range()[0]) <= 0.0  # 10 of 2010 values are cut off, half a percent


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
    if method == "mse":  # it may clip, but never down to what only the early batches held
        assert float(made.max_val) == pytest.approx(3.0**7)
        assert float(made.calculate_qparams()[0]) > 2 * 3.0**6 / 255
    else:
        assert_parameters(made, -(3.0**7), 3.0**7)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_memory_does_not_grow_with_batches(method: str) -> None:
    def held(made: Any) -> int:
        tensors = [value for value in vars(made).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*made.buffers(), *tensors])

    made = fed(method, [values(2000, 0)])
    before = held(made)
    for seed in range(1, 20):
        made(values(2000, seed) * seed)
    assert held(made) == before < 80_000


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_remembered(method: str, bad: float) -> None:
    made = fed(method, [values(100, 0)])
    assert not made.saw_non_finite
    range_before = float(made.min_val), float(made.max_val)
    made(torch.tensor([1.0, bad, 1000.0]))
    assert made.saw_non_finite
    assert copy.deepcopy(made).saw_non_finite
    assert (float(made.min_val), float(made.max_val)) == range_before


@pytest.mark.parametrize("method", ALL_METHODS)
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


def draws(kind: str) -> np.ndarray:
    generator = np.random.default_rng(7)
    normal = generator.normal(size=20_000)
    return {
        "normal": normal + 0.5,
        "heavy-tailed": generator.standard_t(3, size=20_000),
        "one-sided": np.maximum(normal, 0.0),
        "negative": -np.abs(normal) - 0.1,
        "outlier": np.append(normal, 60.0),
        "constant": np.full(500, 2.5),
        "uniform": generator.uniform(-3, 5, size=20_000),
    }[kind].astype(np.float32)


KINDS = ["normal", "heavy-tailed", "one-sided", "negative", "outlier", "constant", "uniform"]


def growing(data: np.ndarray) -> list[Tensor]:
    """Batches whose range grows: the values nearest to zero come first."""
    return [torch.from_numpy(part.copy()) for part in np.array_split(data[np.argsort(np.abs(data))], 7)]


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_every_range_of_a_grid_tried_on_all_values(kind: str) -> None:
    data = draws(kind)
    scale, zero_point = fed("mse", growing(data)).calculate_qparams()
    low, high = min(float(data.min()), 0.0), max(float(data.max()), 0.0)
    shares = np.geomspace(0.02, 1.0, 40)
    best = min(
        squared_error(data, *parameters(low * left, high * right))
        for left in (shares if low < 0 else [0.0])
        for right in (shares if high > 0 else [0.0])
    )
    assert squared_error(data, float(scale), int(zero_point)) <= 1.03 * best + 1e-12


def divergence(data: np.ndarray, reach: float) -> float:
    """Of values quantized within [-reach, reach] from themselves, in plain loops over numpy's own histogram."""
    counts, edges = np.histogram(data, bins=4001, range=(-np.abs(data).max(), np.abs(data).max()))
    centres = (edges[:-1] + edges[1:]) / 2
    counts[2000] = 0  # zero
    inside = np.abs(centres) <= reach
    p = counts[inside].astype(float)
    filled = np.flatnonzero(p)
    scale, zero_point = parameters(max(float(data.min()), -reach), min(float(data.max()), reach))
    levels = np.clip(np.round(centres[inside] / scale) + zero_point, 0, 255)
    q = np.zeros_like(p)
    for level in np.unique(levels[filled]):
        members = filled[levels[filled] == level]
        q[members] = p[members].mean()
    p[filled[0]] += counts[centres < -reach].sum()
    p[filled[-1]] += counts[centres > reach].sum()
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "one-sided", "outlier", "uniform"])
def test_entropy_diverges_as_little_as_the_best_reach_found_with_all_values(kind: str) -> None:
    data = draws(kind)
    low, high = fed("entropy", growing(data)).chosen_range()
    largest = float(np.abs(data).max())
    best = min(divergence(data, largest * share) for share in np.geomspace(0.08, 1.0, 60))
    assert divergence(data, max(high, -low)) <= best + 0.02
    if kind == "outlier":
        assert max(high, -low) < 0.3 * largest  # min-max is what the divergence must not end at
    if kind == "uniform":
        assert max(high, -low) > 0.9 * largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_growing_batches_are_counted_exactly(kind: str, method: str) -> None:
    data = draws(kind)
    made = fed(method, growing(data))
    expected = np.histogram(data, bins=BINS, range=(-made.limit, made.limit))[0]
    assert made.counts.sum() == len(data)
    assert np.abs(np.cumsum(made.counts.numpy()) - np.cumsum(expected)).max() <= 3  # values on an edge
    low, high = made.chosen_range()
    assert low >= min(0.0, data.min())
    assert high <= max(0.0, data.max())
    assert np.isfinite(float(made.calculate_qparams()[0]))


def test_large_batches_are_sampled_from_every_channel_and_weighted() -> None:
    data = torch.randn(4, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    data *= torch.linspace(0.1, 2.0, 64)[:, None, None]  # a stride that keeps to some channels would be far off
    for layout in (torch.contiguous_format, torch.channels_last):
        made = fed("percentile", [data.contiguous(memory_format=layout)] * 3)
        assert float(made.counts.sum()) == pytest.approx(3 * data.numel())
        assert data.numel() > 4 * MAX_COUNTED
        wanted = percentile_bounds(data.numpy().ravel(), 99.0)
        for bound, exact in zip(made.chosen_range(), wanted, strict=True):
            assert bound == pytest.approx(exact, rel=0.02)
        assert (float(made.min_val), float(made.max_val)) == (float(data.min()), float(data.max()))


@pytest.mark.parametrize("percentile", [99.9, 99.99, 99.999, 99.9999])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tails_of_large_batches_are_counted_in_full(percentile: float, layout: torch.memory_format) -> None:
    # Of 3 * 1.2 million values 99.999 leaves out 18 at each end, of which a sample would hold one, worth 18.
    shape = (6, 64, 56, 56)
    batches = [values(6 * 64 * 56 * 56, seed, shape=shape) * torch.tensor([1.0, 0.5])[seed % 2] for seed in range(3)]
    made = fed("percentile", [batch.contiguous(memory_format=layout) for batch in batches], percentile)
    data = torch.cat(batches).numpy().ravel()
    assert len(batches[0].flatten()) > 16 * MAX_COUNTED
    assert float(made.counts.sum()) == pytest.approx(len(data))
    wanted = percentile_bounds(data, percentile)
    width = 2 * float(made.limit) / BINS
    sampled = (100 - percentile) / 200 > TAIL / 2  # then about a hundred sampled values decide
    for bound, exact in zip(made.chosen_range(), wanted, strict=True):
        assert abs(bound - exact) <= (0.1 * abs(exact) if sampled else 1.001 * width)


@pytest.mark.parametrize("kind", ["one-sided", "saturated", "shifted", "odd sides"])
def test_sampled_batches_keep_their_shape_and_their_number(kind: str) -> None:
    raw = values(5 * 97 * 101 * 7, 3, shape=(5, 97, 101, 7))
    data = {
        "one-sided": raw.clamp_min(0.0),
        "saturated": raw.clamp(0.0, 1.0),
        "shifted": raw + 100.0,
        "odd sides": raw,  # no block of values ends where the tensor does
    }[kind]
    made = fed("percentile", [data, data], 99.999)
    flat = data.numpy().ravel()
    expected = np.cumsum(np.histogram(flat, bins=BINS, range=(-made.limit, made.limit))[0]) / len(flat)
    counted = np.cumsum(made.counts.numpy()) / (2 * len(flat))
    assert float(made.counts.sum()) == pytest.approx(2 * len(flat))
    assert np.abs(counted - expected).max() < 0.01
    ends = np.flatnonzero((expected < TAIL / 4) | (expected > 1 - TAIL / 4))
    assert np.abs(counted - expected)[ends].max() <= 2 / len(flat)  # exact, but for values on an edge
    width = 2 * float(made.limit) / BINS
    for bound, exact in zip(made.chosen_range(), percentile_bounds(flat, 99.999), strict=True):
        assert abs(bound - exact) <= 1.001 * width


@pytest.mark.parametrize(("growth", "narrow"), [(1.0, False), (3.0, True)])
def test_ranges_that_still_move_are_told(growth: float, narrow: bool, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quantizer = OnnxRuntimeQuantizer(Scheme("uint8", 8), activation_observer("mse", 99.0))
    prepared = prepare_pt2e(capture(net, image), quantizer)
    watch = RangeWatch(prepared, 4)
    for batch in (image, image, growth * image, growth * image):
        prepared(batch)
        watch.advance()
    facts = watch.finish()
    assert facts is not None
    assert facts.is_narrow is narrow
    assert facts.tensors == 3
    assert facts.to_dict()["moved"] == (3 if narrow else 0)
    assert ("raise calibration.samples" in capsys.readouterr().err) is narrow


def test_one_batch_has_no_half_to_compare() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    image = torch.ones(2, 3, 8, 8)
    quantizer = OnnxRuntimeQuantizer(Scheme("uint8", 8), activation_observer("minmax", 99.0))
    prepared = prepare_pt2e(capture(net, image), quantizer)
    watch = RangeWatch(prepared, 1)
    prepared(image)
    watch.advance()
    assert watch.finish() is None
