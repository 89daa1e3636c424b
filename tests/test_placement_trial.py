"""Accuracy with intervals, the finished model measured again, and the gate on its speed with its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from conftest import CommandLine
from edgecompress.int8 import placement_trial
from edgecompress.int8.conv_kernels import KernelChoice
from edgecompress.int8.placement import Candidate, LayerCost
from edgecompress.int8.placement_trial import HeldOut, judged
from edgecompress.settings.gates import missed_gates, speed_gate
from edgecompress.steps import placement_run
from edgecompress.training.evaluate import paired_drop_interval

RECIPE = """
model: {name: student_cnn}
data: {name: digits}
stages:
  - {id: dense, kind: train, epochs: 2, batch_size: 64}
  - {id: int8, kind: quantize, effort: fast, placement_trials: 1, calibration: {samples: 32}}
gates: {max_accuracy_drop: 1.0, int8_min_top1_agreement: 0.0}
"""


def first_layer_in_float(costs: list[LayerCost], *, by_noise: bool) -> list[Candidate]:
    """The only placement that is tried beside full int8."""
    return [Candidate((costs[0].layer,), 1.0, 0.0)]


def test_the_interval_of_a_drop_holds_the_truth_as_often_as_it_says() -> None:
    """Pairs of answers drawn at random: 3 % of them lost, 1 % won, so the true drop is 2 points."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        kinds = generator.choice(4, size=400, p=[0.03, 0.01, 0.86, 0.10])
        before, after = np.isin(kinds, [0, 2]), np.isin(kinds, [1, 2])
        low, high = paired_drop_interval(torch.from_numpy(before), torch.from_numpy(after))
        held += low <= 0.02 <= high
    assert 930 <= held <= 985


def test_an_interval_of_pairs_is_narrower_than_one_of_two_accuracies() -> None:
    right = torch.ones(500, dtype=torch.bool)
    right[:100] = False
    low, high = paired_drop_interval(right, right)
    assert low == pytest.approx(-high)
    assert high < 0.01  # two intervals of 80 % on 500 images would allow 5 points
    assert paired_drop_interval(right, torch.zeros(500, dtype=torch.bool))[0] > 0.75


def test_judged_compares_the_same_images() -> None:
    labels = torch.arange(200) % 4
    reference = torch.nn.functional.one_hot(labels, 4).float()
    logits = reference.clone()
    logits[:10] = logits[:10].roll(1, dims=1)
    found = judged(reference, logits, HeldOut(torch.zeros(200, 1, 2, 2), labels, torch.ones(200, dtype=torch.bool)))
    assert found["agreement"] == found["accuracy"] == pytest.approx(0.95)
    assert found["accuracy_drop"] == pytest.approx(0.05)
    for key in ("agreement", "accuracy_drop"):
        low, high = found[f"{key}_ci95"]
        assert low < found[key] < high
        assert high - low < 0.07


@pytest.mark.parametrize(
    ("interval", "budget", "passed"),
    [
        ([0.7, 0.9], 1.0, False),
        ([0.9, 1.1], 1.0, None),  # open: nothing is missed, and nothing shown
        ([1.1, 1.3], 1.0, True),
        ([1.1, 1.3], 2.0, True),  # faster than fp32; a wish for more is the profile's to judge
        ([0.7, 0.9], 0.5, True),  # the target allows it
        ([0.7, 0.9], None, None),
    ],
)
def test_the_gate_on_speed(interval: list[float], budget: float | None, passed: bool | None) -> None:
    gate = speed_gate({"speedup": sum(interval) / 2, "speedup_ci95": interval}, "x86", budget)
    assert (None if gate is None else gate.passed) is passed
    if passed is False:
        assert gate is not None
        manifest = {"gates": [gate.to_dict()]}
        assert missed_gates(manifest) == missed_gates(manifest, "x86") == [gate.sentence]
        assert missed_gates(manifest, "rpi4") == missed_gates(manifest, without_speed_on=["x86"]) == []


@pytest.mark.slow
def test_int8_that_is_slower_ends_with_exit_code_three(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is replaced, since how fast this machine is must not decide a test."""
    measured: list[Path] = []

    def clock(fp32: Path, int8: Path, target: Any) -> dict[str, Any]:
        assert fp32.is_file()
        measured.append(int8)
        return {"speedup": 0.8, "speedup_ci95": [0.7, 0.9], "latency_ms": 2.0, "fp32_latency_ms": 1.6}

    monkeypatch.setattr(placement_run, "candidates", first_layer_in_float)
    monkeypatch.setattr(placement_run, "timed", clock)
    monkeypatch.setattr(placement_trial, "timed", clock)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    made = command_line("apply", recipe, "--output", tmp_path / "run")
    assert made.exit_code == 3, made.stderr
    run = json.loads((tmp_path / "run/run.json").read_text())
    (decision,) = [d["value"] for d in run["decisions"] if d["what"] == "placement"]
    assert (decision["form"], decision["trials"]) == ("full", 2)
    assert len(measured) == 3, "the chosen model is measured again"
    assert decision["final"]["speedup_ci95"] == [0.7, 0.9]
    assert decision["final"]["agreement_ci95"][0] <= decision["final"]["agreement"]
    placement = json.loads((tmp_path / "run/stages/int8/placement.json").read_text())
    assert placement["final"] == decision["final"]
    assert made.stdout.startswith("int8 is slower than fp32 on ")
    assert "gate missed: fp32 takes 0.8 times as long as int8" in made.stdout
    exported = command_line("export", tmp_path / "run", "--int8")
    assert exported.exit_code == 3, exported.stderr
    assert (tmp_path / "run/export/model.int8.onnx").is_file()
    # A profile measures longer and asks for itself; without one, what chose the placement decides.
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    target = decision["target"]
    assert len(missed_gates(manifest, target)) == 1
    assert missed_gates(manifest, target, without_speed_on=[target]) == []


@pytest.mark.slow
def test_placements_are_timed_with_the_kernels_that_the_device_will_use(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full int8 is slower than fp32 by its own kernels and faster by matrix products: then nothing else is tried."""
    products: list[int] = []

    def clock(fp32: Path, int8: Path, target: Any) -> dict[str, Any]:
        products.append(_matrix_products(int8))
        speedup = 1.2 if products[-1] else 0.8
        return {"speedup": speedup, "speedup_ci95": [speedup - 0.1, speedup + 0.1], "latency_ms": 2.0}

    def choice(path: Path, target: Any) -> KernelChoice:
        convs = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
        return KernelChoice(tuple(convs[:2]), len(convs), 1.5, (1.4, 1.6))

    for module in (placement_run, placement_trial):
        monkeypatch.setattr(module, "timed", clock)
    monkeypatch.setattr(placement_run, "choose_conv_kernels", choice)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    made = command_line("apply", recipe, "--output", tmp_path / "run")
    assert made.exit_code == 0, made.stderr
    assert products == [0, 2]
    placement = json.loads((tmp_path / "run/stages/int8/placement.json").read_text())
    assert [trial["speedup"] for trial in placement["trials"]] == [1.2]
    run = json.loads((tmp_path / "run/run.json").read_text())
    (decision,) = [d["value"] for d in run["decisions"] if d["what"] == "placement"]
    assert decision["matrix_product_convs"] == placement["matrix_product_convs"]
    assert len(decision["matrix_product_convs"]) == 2

    # With layers in float, the others keep their kernels, and so does the finished model.
    products.clear()
    monkeypatch.setattr(placement_run, "candidates", first_layer_in_float)
    monkeypatch.setattr(placement_run, "_seems_slow", lambda trial: len(products) < 3)
    made = command_line("apply", recipe, "--output", tmp_path / "mixed")
    assert made.exit_code == 0, made.stderr
    assert products == [0, 2, 1, 2]


def _matrix_products(path: Path) -> int:
    """How many convolutions of an int8 file have weights with another zero point than 0."""
    graph = onnx.load(path).graph
    zeros = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scaling = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    convs = [scaling.get(node.input[1]) for node in graph.node if node.op_type == "Conv"]
    return sum(bool(zeros[node.input[2]].any()) for node in convs if node is not None and len(node.input) > 2)
