"""`effort: best` tunes an int8 model as a whole: better on images it has not seen, or left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx import GraphModule

from edgecompress.int8 import finetuning, weight_ranges
from edgecompress.int8.finetuning import finetune
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.scheme import Scheme
from int8_models import PATTERNS, Residual, export, images, quantized, run, seeded

COARSE = Scheme("uint8", 7)


def noise(model: QuantizedModel, inputs: torch.Tensor) -> float:
    assert model.reference is not None
    with torch.no_grad():
        return float(((model.simulation()(inputs) - model.reference(inputs)) ** 2).sum())


def reference_of(model: QuantizedModel) -> GraphModule:
    assert model.reference is not None
    return model.reference


def test_tuning_helps_on_unseen_images_and_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_ranges, "_MOST_WEIGHTS", 0)  # the largest weights' steps, so that there is much to tune
    model = quantized(seeded(Residual()), scheme=COARSE, samples=images(64))
    tuned = finetune(model, reference_of(model), images(128, seed=1), images(32, seed=2))
    assert tuned.is_kept
    assert tuned.gain_db > 0.3
    unseen = images(256, seed=3)
    assert noise(tuned.model, unseen) < 0.95 * noise(model, unseen)


def test_what_does_not_help_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "_LEARNING_RATE", 10.0)  # spoils any model
    model = quantized(seeded(Residual()), scheme=COARSE, samples=images(64))
    tuned = finetune(model, reference_of(model), images(32, seed=1), images(16, seed=2))
    assert tuned.model is model
    assert not tuned.is_kept
    assert tuned.gain_db < 0


def test_a_gain_within_chance_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image with a large error gets better by far, most of the others worse."""
    model = quantized(seeded(Residual()), scheme=COARSE, samples=images(64))
    before = torch.ones(16, dtype=torch.float64)
    before[0] = 100.0
    after = torch.where(torch.arange(16) % 2 == 0, 0.9, 1.01).double()

    def noises(wanted: torch.Tensor, judged: QuantizedModel, inputs: torch.Tensor) -> torch.Tensor:
        return before if judged is model else after

    monkeypatch.setattr(finetuning, "_noise", noises)
    tuned = finetune(model, reference_of(model), images(32, seed=1), images(16, seed=2))
    assert tuned.gain_db > 3
    assert tuned.better == 8
    assert not tuned.is_kept
    assert tuned.model is model


def test_tuning_is_deterministic() -> None:
    model = quantized(seeded(Residual()), scheme=COARSE, samples=images(32))
    first, second = (
        finetune(model, reference_of(model), images(32, seed=1), images(16, seed=2)).model.graph for _ in range(2)
    )
    buffers = dict(second.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in first.named_buffers())


@pytest.mark.parametrize("name", ["Residual", "HardExcite", "Fire"])
def test_best_exports_what_it_simulates(name: str, tmp_path: Path) -> None:
    model = quantized(seeded(PATTERNS[name]()), samples=images(64), effort="best")
    assert "tuned as a whole" in model.correction
    path = tmp_path / "net.onnx"
    export(model.graph, path)
    inputs = images(64, seed=5)
    with torch.no_grad():
        simulated = model.simulation()(inputs).numpy()
    agree = np.isclose(simulated, run(path, inputs), atol=1e-4 * np.abs(simulated).max()).all(axis=1)
    assert agree.mean() >= 0.95
