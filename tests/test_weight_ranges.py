from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from edgecompress.exporting.parity import sqnr_db
from edgecompress.int8.scheme import Scheme
from edgecompress.int8.weight_ranges import WeightRangeObserver, least_error_steps
from int8_models import conv, export, quantized, run, seeded

LIMITS = (127, 63)


def steps_of(weights: torch.Tensor, limit: int) -> torch.Tensor:
    return weights.flatten(1).abs().amax(1) / limit


def output_error(row: np.ndarray, step: float, limit: int) -> float:
    """Squared error of the output for inputs whose mean is as large as their deviation, one independent of another."""
    error = row - np.clip(np.round(row / step), -limit, limit) * step
    return float((error**2).sum() + error.sum() ** 2)


@pytest.mark.parametrize("limit", LIMITS)
def test_steps_are_those_that_trying_each_finds(limit: int) -> None:
    weights = torch.randn(24, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    steps = steps_of(weights, limit)
    found = least_error_steps(weights, steps, -limit, limit).numpy()
    improved = 0
    for row, step, got in zip(weights.flatten(1).double().numpy(), steps.numpy(), found, strict=True):
        errors = [output_error(row, step * share, limit) for share in np.append(1.0, 0.8 + 0.005 * np.arange(91))]
        best = min(errors)
        assert output_error(row, got, limit) == pytest.approx(best, rel=1e-3)
        improved += bool(best < errors[0])
    assert improved > 16  # of 24 channels with nine weights each


@pytest.mark.parametrize("limit", LIMITS)
def test_the_output_of_depthwise_channels_changes_less(limit: int) -> None:
    """On inputs that are alike and of one sign, as behind a ReLU."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(256, 9, generator=generator)
    common = torch.randn(1, 4000, generator=generator)
    inputs = (common + 0.5 * torch.randn(9, 4000, generator=generator)).relu()
    largest = steps_of(weights, limit)

    def noise(steps: torch.Tensor) -> float:
        rounded = torch.round(weights / steps[:, None]).clamp(-limit, limit) * steps[:, None]
        return float((((weights - rounded) @ inputs) ** 2).mean())

    assert noise(least_error_steps(weights, largest, -limit, limit)) < 0.25 * noise(largest)


def test_weights_that_lie_on_a_grid_keep_it_and_a_channel_of_zeros_keeps_its_step() -> None:
    weights = torch.tensor([[127.0, -3.0, 50.0], [0.0, 0.0, 0.0]])
    steps = torch.tensor([1.0, 0.25])
    assert least_error_steps(weights, steps, -127, 127).tolist() == [1.0, 0.25]


def test_an_outlier_of_seven_bits_is_not_cut_off_for_nothing() -> None:
    weights = torch.full((1, 9), 0.5)
    weights[0, 0] = 100.0
    step = least_error_steps(weights, torch.tensor([100.0 / 63]), -63, 63)
    assert 63 * float(step) >= 99.0


def test_channels_of_many_weights_keep_their_largest_weights_step() -> None:
    weights = torch.randn(4, 65, generator=torch.Generator().manual_seed(0))
    steps = steps_of(weights, 127)
    assert torch.equal(least_error_steps(weights, steps, -127, 127), steps)


def test_the_observer_chooses_for_the_weights_that_it_saw() -> None:
    observer = WeightRangeObserver(
        dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    weights = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    assert observer(weights) is weights
    steps, zero_points = observer.calculate_qparams()
    assert torch.equal(steps, least_error_steps(weights, steps_of(weights, 127), -127, 127))
    assert zero_points.tolist() == [0] * 8


def test_an_int8_model_has_them_and_its_bias_has_the_accumulators_scale() -> None:
    net = seeded(conv(3, 8, kernel=3))
    model = quantized(net, scheme=Scheme("uint8", 8))
    layer = next(node for node in model.graph.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    constants = dict(model.graph.named_buffers()) | dict(model.graph.named_parameters())
    source, weight, bias = layer.args[:3]
    steps = constants[weight.args[1].target]
    float_weight = next(parameter for parameter in net.parameters() if parameter.dim() == 4)
    largest = steps_of(float_weight.detach(), 127)
    assert not torch.equal(steps, largest)
    torch.testing.assert_close(steps, least_error_steps(float_weight.detach(), largest, -127, 127), rtol=0.0, atol=0.0)
    torch.testing.assert_close(
        constants[bias.args[1].target], (steps * float(source.args[1])).to(torch.float32), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize(("scale", "bias"), [(0.0, 2.0), (0.0, -4.0), (1e-5, 4.0)])
def test_a_channel_without_weights_keeps_its_bias(
    tmp_path: Path, scale: float, bias: float, effort: Literal["fast", "balanced"]
) -> None:
    """A filter that was pruned, or a batch norm without a scale: its step leaves int32 room for bias and products."""
    net = seeded(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    with torch.no_grad():
        net[1].weight[0], net[1].bias[0] = scale, bias  # type: ignore[index]
    net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    batch = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    model = quantized(net, scheme=Scheme("uint8", 8), samples=batch, effort=effort)
    path = tmp_path / "net.onnx"
    export(model.graph, path, example=batch[:2])
    with torch.no_grad():
        wanted, simulated = net(batch), model.simulation()(batch)
    assert sqnr_db(wanted.numpy(), simulated.numpy()) > 40  # 1 to 2 dB where the bias is cut off
    assert sqnr_db(simulated.numpy(), run(path, batch)) > 60  # 19 dB where the sum overflows
