"""Compensated rounding against rounding to nearest, on what a layer computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import edgecompress.int8.post_training
import edgecompress.int8.scheme
from edgecompress.int8 import weight_ranges
from edgecompress.int8.capture import capture
from edgecompress.int8.compensation import compensate
from edgecompress.int8.quantized_model import simulate
from edgecompress.int8.rounding import _aimed_at_float, _patches, round_compensated
from edgecompress.int8.scheme import Scheme
from int8_models import UINT8_7, Residual, conv, images, quantized, seeded

aten = torch.ops.aten
LIMIT = UINT8_7.weight_limit
LAYERS: dict[str, nn.Module] = {
    "plain": nn.Conv2d(4, 6, 3),
    "same": nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)),
    "same_even": nn.Conv2d(4, 6, (2, 4), padding="same"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "stride": nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0)),
    "dilation": nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(2, 3), bias=False),
    "pointwise": nn.Conv2d(4, 6, 1),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "multiplied": nn.Conv2d(4, 8, 3, stride=2, groups=4),
    "linear": nn.Linear(4, 6),
    "long_linear": nn.Linear(150, 7),
}


# PyTorch warns that it pads such a layer unevenly, which is what makes it worth a test.
even_kernels = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def layer_and_node(name: str) -> tuple[nn.Module, Node, Tensor]:
    """A layer with seeded weights, its captured node, and correlated inputs that are not centred (as after a relu)."""
    layer = seeded(copy.deepcopy(LAYERS[name]))
    if isinstance(layer, nn.Linear):
        mixing = torch.randn(layer.in_features, layer.in_features, generator=torch.Generator().manual_seed(1))
        draws = torch.randn(96, layer.in_features, generator=torch.Generator().manual_seed(2))
        inputs = torch.relu(draws @ mixing)
    else:
        inputs = torch.relu(images(24, channels=4))
    graph = capture(layer, inputs[:2])
    operators = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)
    (node,) = [node for node in graph.graph.nodes if node.target in operators]
    return layer, node, inputs


def scales(weight: Tensor, limit: int = LIMIT) -> Tensor:
    return weight.abs().flatten(1).amax(1) / limit


def spread(scale: Tensor, dims: int) -> Tensor:
    return scale.view([-1] + [1] * (dims - 1))


def output_error(layer: nn.Module, integers: Tensor, scale: Tensor, inputs: Tensor) -> float:
    """Squared change of the layer's output when its weights are the integers, in float64."""
    exact, rounded = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        rounded.weight.copy_(integers.double() * spread(scale.double(), integers.dim()))
        return float(((exact(inputs.double()) - rounded(inputs.double())) ** 2).sum())


@even_kernels
@pytest.mark.parametrize("name", [name for name in LAYERS if "linear" not in name])
def test_patches_times_weights_are_the_convolution(name: str) -> None:
    layer, node, inputs = layer_and_node(name)
    weight = layer.weight.detach()
    patches = _patches([inputs], weight, node, layer.groups, weight[0].numel())
    rows = weight.reshape(layer.groups, -1, weight[0].numel())
    got = (rows @ patches).reshape(weight.shape[0], -1)
    with torch.no_grad():
        wanted = layer(inputs)
    if layer.bias is not None:
        wanted = wanted - layer.bias.detach().view(1, -1, 1, 1)
    torch.testing.assert_close(got, wanted.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-4)


def test_patches_of_many_images_are_a_seeded_choice() -> None:
    layer, node, _ = layer_and_node("plain")
    inputs, weight = images(200, channels=4), layer.weight.detach()
    chosen = _patches([inputs], weight, node, 1, 36)
    assert 2048 <= chosen.shape[2] < 200 * 36
    assert torch.equal(chosen, _patches([inputs], weight, node, 1, 36))
    everything = {tuple(column) for column in nn.functional.unfold(inputs, 3).transpose(1, 2).reshape(-1, 36).tolist()}
    assert all(tuple(column) in everything for column in chosen[0, :, ::97].t().tolist())


@even_kernels
@pytest.mark.parametrize("bits", [3, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_never_worse_than_nearest_and_within_the_range(name: str, bits: int) -> None:
    layer, node, inputs = layer_and_node(name)
    weight, limit = layer.weight.detach(), (1 << (bits - 1)) - 1
    scale = scales(weight, limit)
    integers = round_compensated(weight, scale, [inputs], node, low=-limit, high=limit)
    assert integers.dtype is torch.int8
    assert integers.shape == weight.shape
    assert int(integers.min()) >= -limit
    assert int(integers.max()) <= limit
    nearest = torch.round(weight / spread(scale, weight.dim())).clamp(-limit, limit)
    got, plain = (output_error(layer, candidate, scale, inputs) for candidate in (integers, nearest))
    assert got <= plain * (1 + 1e-5)
    if weight[0].numel() > 8:  # with fewer columns there is little to spread an error over
        assert got < 0.9 * plain
    assert torch.equal(integers, round_compensated(weight, scale, [inputs], node, low=-limit, high=limit))


@pytest.mark.parametrize("name", ["plain", "depthwise", "long_linear"])
def test_zeros_stay_and_the_rest_still_beats_rounding_to_nearest(name: str) -> None:
    """Zeros that pruning made, while every weight is moved: by the update, and by aiming at float inputs."""
    layer, node, inputs = layer_and_node(name)
    is_zero = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    with torch.no_grad():
        layer.weight.masked_fill_(is_zero, 0)
    weight = layer.weight.detach()
    scale = scales(weight)
    integers = round_compensated(weight, scale, [inputs], node, low=-LIMIT, high=LIMIT)
    nearest = torch.round(weight / spread(scale, weight.dim()))
    assert not integers[is_zero].any()
    assert output_error(layer, integers, scale, inputs) <= output_error(layer, nearest, scale, inputs) * (1 + 1e-5)
    coarse = (inputs / 0.8).floor() * 0.8
    aimed = round_compensated(weight, scale, [coarse], node, low=-LIMIT, high=LIMIT, float_inputs=[inputs])
    assert not torch.equal(aimed, integers)
    assert not aimed[is_zero].any()


@pytest.mark.parametrize("name", ["long_linear", "plain"])
def test_working_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    layer, node, inputs = layer_and_node(name)
    weight = layer.weight.detach()
    made = []
    for block in (16, 64, 10_000):
        monkeypatch.setattr("edgecompress.int8.rounding._BLOCK", block)
        made.append(round_compensated(weight, scales(weight), [inputs], node, low=-LIMIT, high=LIMIT))
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])


@pytest.mark.parametrize("seed", range(20))
def test_every_output_channel_keeps_the_better_rounding(seed: int) -> None:
    """Coarse steps and clipped weights, where a greedy update by itself does lose against rounding to nearest."""
    generator = torch.Generator().manual_seed(seed)
    _, node, _ = layer_and_node("linear")
    weight = torch.randn(64, 4, generator=generator)
    inputs = torch.randn(12, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    scale = torch.full((64,), 1.0)
    integers = round_compensated(weight, scale, [inputs], node, low=-1, high=1).double()
    nearest = torch.round(weight).clamp(-1, 1).double()
    errors = [((inputs.double() @ (weight.double() - c).t()) ** 2).sum(0) for c in (integers, nearest)]
    assert bool((errors[0] <= errors[1] + 1e-5).all())


@pytest.mark.parametrize("case", ["few", "one", "constant", "dead", "zero", "repeated"])
@pytest.mark.parametrize("name", ["plain", "depthwise", "long_linear"])
def test_poor_inputs_give_sound_integers(name: str, case: str) -> None:
    layer, node, inputs = layer_and_node(name)
    weight = layer.weight.detach()
    if case in ("few", "one"):
        inputs = inputs[: 3 if case == "few" else 1]
    elif case in ("constant", "zero"):
        inputs = torch.full_like(inputs, 0.7 if case == "constant" else 0.0)
    elif case == "dead":
        inputs = inputs.clone()
        inputs[:, 1] = 0
    else:
        inputs = inputs[:1].repeat(10, *[1] * (inputs.dim() - 1))
    scale = scales(weight)
    integers = round_compensated(weight, scale, [inputs], node, low=-LIMIT, high=LIMIT)
    nearest = torch.round(weight / spread(scale, weight.dim()))
    assert int(integers.abs().max()) <= LIMIT
    got, plain = (output_error(layer, candidate, scale, inputs) for candidate in (integers, nearest))
    assert got <= plain * (1 + 1e-5) + 1e-9
    if case == "zero":
        assert torch.equal(integers.float(), nearest)
    if case == "dead" and name == "depthwise":
        assert torch.equal(integers[1].float(), nearest[1])


# --- Whole graphs.


class Compensation:
    """What `compensate` was given, kept by a stand-in that calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(edgecompress.int8.post_training, "compensate", self)

    def __call__(self, converted: GraphModule, simulation: GraphModule, reference: GraphModule, seen: Tensor) -> None:
        self.converted, self.simulation, self.reference, self.seen = converted, simulation, reference, seen
        compensate(converted, simulation, reference, seen)


class _Recorder(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.target in (aten.conv2d.default, aten.linear.default):
            self.outputs[n.name] = value.clone()
        return value


def layer_outputs(graph: GraphModule, inputs: Tensor) -> dict[str, Tensor]:
    recorder = _Recorder(graph)
    with torch.no_grad():
        recorder.run(inputs)
    return recorder.outputs


class LastAxis(nn.Module):
    """A linear layer over the last of four axes, as in ConvNeXt; the axes beside it have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = conv(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mix(self.conv(x).permute(0, 2, 3, 1)))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("net", "treated"), [(Residual, ["conv2d", "conv2d_2", "linear", "linear_1"]), (LastAxis, ["conv2d", "linear"])]
)
def test_mean_error_is_within_half_a_bias_step(
    monkeypatch: pytest.MonkeyPatch, net: type[nn.Module], treated: list[str]
) -> None:
    given = Compensation(monkeypatch)
    quantized(seeded(net()), samples=images(64), effort="balanced")
    wanted, got = (layer_outputs(graph, given.seen) for graph in (given.reference, given.simulation))
    nodes = {node.name: node for node in given.converted.graph.nodes}
    for name in treated:
        axis = 1 if "conv" in name else wanted[name].dim() - 1
        others = [dim for dim in range(wanted[name].dim()) if dim != axis]
        error = (wanted[name].double() - got[name].double()).mean(dim=others)
        step = getattr(given.converted, nodes[name].args[2].args[1].target)
        assert bool((error.abs() <= 0.51 * step + 1e-6).all()), name
    assert len(wanted) >= len(treated)


def test_what_was_tuned_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Compensation(monkeypatch)
    model = quantized(seeded(Residual()), samples=images(64), effort="balanced")
    assert model.correction.startswith("error-compensated rounding (+")
    assert len(given.seen) == 48  # a quarter of the images decides, and is not tuned on
    inputs = images(16, seed=9)
    with torch.no_grad():
        assert torch.equal(given.simulation(inputs), simulate(model.graph)(inputs))
        assert torch.equal(model.graph(inputs), simulate(model.graph)(inputs))


@pytest.mark.parametrize("bits", [7, 8])
def test_balanced_is_closer_to_float_than_fast(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_ranges, "_MOST_WEIGHTS", 0)  # rounding alone, at the largest weights' steps
    module, inputs = seeded(Residual()), images(256, seed=9)
    noise = {}
    with torch.no_grad():
        wanted = module(inputs)
        for effort in ("fast", "balanced"):
            model = quantized(module, scheme=Scheme("uint8", bits), samples=images(128), effort=effort)
            noise[effort] = float(((wanted - model.simulation()(inputs)) ** 2).sum())
    assert noise["balanced"] < 0.8 * noise["fast"]


@pytest.mark.parametrize(("budget", "met"), [(1, 16), (2**28, 48)])
def test_a_layer_meets_as_many_images_as_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, budget: int, met: int
) -> None:
    """With large maps few images give enough positions; the model is better than rounding to nearest all the same."""
    counts = []

    def counting(weight: Tensor, scale: Tensor, inputs: list[Tensor], *others: Any, **named: Any) -> Tensor:
        counts.append(sum(len(batch) for batch in inputs))
        return round_compensated(weight, scale, inputs, *others, **named)

    monkeypatch.setattr("edgecompress.int8.compensation.round_compensated", counting)
    monkeypatch.setattr("edgecompress.int8.compensation._BUDGET_BYTES", budget)
    model = quantized(seeded(Residual()), samples=images(64), effort="balanced")
    assert counts == [met] * 5
    assert model.correction.startswith("error-compensated rounding (+")


def test_balanced_is_deterministic() -> None:
    module = seeded(Residual())
    models = [quantized(module, samples=images(32), effort="balanced") for _ in range(2)]
    first, second = (dict(model.graph.named_buffers()) for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compensation_that_hurts_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(converted: GraphModule, simulation: GraphModule, reference: GraphModule, seen: Tensor) -> None:
        compensate(converted, simulation, reference, seen)
        for graph in (converted, simulation):
            for name, buffer in graph.named_buffers():
                if "_frozen_param" in name or "_read_back" in name:
                    buffer.zero_()

    module = seeded(Residual())
    plain = quantized(module, samples=images(64))
    monkeypatch.setattr(edgecompress.int8.post_training, "compensate", damage)
    guarded = quantized(module, samples=images(64), effort="balanced")
    assert guarded.correction.startswith("rounded to nearest (error compensation would cost")
    with torch.no_grad():
        assert torch.equal(guarded.graph(images(8)), plain.graph(images(8)))


def test_too_few_images_are_said() -> None:
    model = quantized(seeded(Residual()), samples=images(15), effort="balanced")
    assert model.correction == "rounded to nearest (error compensation needs 16 calibration images)"


@pytest.mark.parametrize("name", ["plain", "depthwise", "long_linear"])
def test_aiming_at_float_inputs_makes_good_what_was_lost_before(name: str) -> None:
    """Inputs rounded to a coarse grid: on images not seen, the output is closer to the float one than without."""
    layer, node, inputs = layer_and_node(name)
    weight = layer.weight.detach()
    scale = scales(weight)

    def rounded(values: Tensor) -> Tensor:
        return (values / 0.8).floor() * 0.8  # floor: an error with a mean, which weights can make good

    half = inputs.shape[0] // 2
    seen, unseen = inputs[:half], inputs[half:]
    error = {}
    for aim in ([], [seen]):
        integers = round_compensated(weight, scale, [rounded(seen)], node, low=-LIMIT, high=LIMIT, float_inputs=aim)
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            moved.weight.copy_(integers.float() * spread(scale, integers.dim()))
            error[not aim] = float(((layer(unseen) - moved(rounded(unseen))) ** 2).sum())
    assert error[False] < 0.98 * error[True]


def test_aiming_at_equal_inputs_changes_nothing() -> None:
    layer, node, inputs = layer_and_node("plain")
    weight = layer.weight.detach()
    plain = round_compensated(weight, scales(weight), [inputs], node, low=-LIMIT, high=LIMIT)
    aimed = round_compensated(weight, scales(weight), [inputs], node, low=-LIMIT, high=LIMIT, float_inputs=[inputs])
    assert torch.equal(plain, aimed)


def test_noise_is_not_learned_by_heart() -> None:
    """Rounding errors that say nothing about the inputs, and fewer samples than columns: the weights stay."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 8, 64, generator=generator, dtype=torch.float64)
    exact = torch.randn(1, 64, 40, generator=generator)
    rounded = exact + 0.05 * torch.randn(1, 64, 40, generator=generator)
    moved = (
        _aimed_at_float(rows, rounded @ rounded.transpose(1, 2), rounded, exact - rounded) - rows
    ).norm() / rows.norm()
    assert float(moved) < 0.05
