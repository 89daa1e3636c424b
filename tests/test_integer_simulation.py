"""The integer simulation against ONNX Runtime itself: not close, equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import int8_models
from edgecompress.int8.integer_simulation import simulate_integers
from edgecompress.int8.quantized_model import simulate
from edgecompress.int8.scheme import Scheme
from edgecompress.machine import architecture, has_vnni
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.settings.target import SessionSettings, load_target
from int8_models import PATTERNS, UINT8_7, export, images, quantized, run, seeded

# Every operator of these nets has an integer kernel that the simulation repeats. Others keep float operators, whose
# sums may be ordered otherwise.
EXACT = ("Residual", "Fire", "Shuffle", "Padded", "Shared", "Dense", "Upsampled", "Clamped")


@pytest.mark.parametrize("name", EXACT)
def test_logits_equal_the_runtimes(name: str, tmp_path: Path) -> None:
    model = quantized(seeded(PATTERNS[name]()), method="histogram")
    export(model.graph, tmp_path / "net.onnx")
    inputs = images(64, seed=5)
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    assert np.array_equal(simulated, run(tmp_path / "net.onnx", inputs))


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - set(EXACT)))
def test_logits_with_float_islands_are_within_float_rounding(name: str, tmp_path: Path) -> None:
    model = quantized(seeded(PATTERNS[name]()))
    export(model.graph, tmp_path / "net.onnx")
    inputs = images(64, seed=5)
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    given = run(tmp_path / "net.onnx", inputs)
    agree = np.isclose(simulated, given, rtol=1e-4, atol=1e-4 * np.abs(given).max()).all(axis=1)
    assert agree.mean() >= 0.95, "more than single values that fell on the other side of a half"


class _DeepSums(nn.Module):
    """Residual adds one after the other: each rounds, so a difference of one step in one of them would be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(int8_models.conv(8 if i else 3, 8) for i in range(8))
        self.head = nn.Linear(8, int8_models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        for conv in self.convs[1:]:
            x = conv(x) + x
        return self.head(x.mean((2, 3)))


def test_residual_adds_round_as_the_kernel_does(tmp_path: Path) -> None:
    model = quantized(seeded(_DeepSums()), method="histogram")
    export(model.graph, tmp_path / "net.onnx")
    inputs = images(256, seed=9)
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
        as_floats = simulate(model.graph)(inputs).numpy()
    given = run(tmp_path / "net.onnx", inputs)
    assert np.array_equal(simulated, given)
    assert not np.array_equal(as_floats, given), "rounding in float must be seen to differ, or the test shows nothing"


def test_sums_too_large_for_float32_are_exact(tmp_path: Path) -> None:
    """Weights that are all equal and inputs that are all large: sums pass 2**24, where float32 drops odd numbers."""
    wide = nn.Sequential(nn.Conv2d(3, 1536, 1), nn.ReLU(), nn.Conv2d(1536, 4, 1), nn.Flatten(), nn.Linear(256, 5))
    with torch.no_grad():
        wide[0].weight.fill_(0.3)
        wide[0].bias.fill_(1.0)
        wide[2].weight.copy_(torch.full((4, 1536, 1, 1), 0.5) + 0.002 * torch.randn(4, 1536, 1, 1))
    model = quantized(wide.eval())
    simulation = model.simulation()
    parts = [sum(name.startswith("weight_") for name, _ in layer.named_buffers()) for layer in simulation.children()]
    assert max(parts) > 1, "the test must reach sums that float32 cannot hold"
    export(model.graph, tmp_path / "net.onnx")
    inputs = images(16, seed=5)
    with torch.no_grad():
        assert np.array_equal(simulation(inputs).numpy(), run(tmp_path / "net.onnx", inputs))


@pytest.mark.skipif(architecture() == "x86_64" and not has_vnni(), reason="8-bit weights saturate on this CPU")
def test_int8_activations_equal_what_arm_computes(tmp_path: Path) -> None:
    """Arm's scheme. x86 leaves some of it in float of its own accord (here a sum), so parity asks for Arm's graph."""
    model = quantized(seeded(PATTERNS["Clamped"]()), scheme=Scheme("int8", 8))
    target = load_target("rpi4")
    export(model.graph, tmp_path / "net.onnx", target=target)
    graph = inspect_integer_graph(tmp_path / "net.onnx", int8_activations=target.fuses_int8_activations)
    assert graph.float_islands == []
    inputs = images(64, seed=5)
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    assert np.array_equal(simulated, run(tmp_path / "net.onnx", inputs, target=target))
    if architecture() == "x86_64":
        assert not np.array_equal(simulated, run(tmp_path / "net.onnx", inputs)), "or the test shows nothing"
    of_x86 = load_target("x86")
    assert not of_x86.fuses_int8_activations
    asked = of_x86.model_copy(update={"session": SessionSettings(config={"session.qdqisint8allowed": "1"})})
    assert asked.fuses_int8_activations


def test_nothing_of_the_float_graph_is_left_to_run() -> None:
    model = quantized(seeded(PATTERNS["Residual"]()), scheme=UINT8_7)
    simulation = simulate_integers(model.graph)
    left = {str(node.target) for node in simulation.graph.nodes if node.op == "call_function"}
    assert not any("conv2d" in name or "relu" in name or "hardtanh" in name for name in left), left
