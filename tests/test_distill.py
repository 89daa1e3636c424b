from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgecompress.distill import TeacherView, TrainingBatch, distillation_loss, label_loss, soft_target_divergence
from edgecompress.errors import ModelError
from edgecompress.preprocessing import Preprocessing


def _softmax(values: np.ndarray) -> np.ndarray:
    exponent = np.exp(values - values.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def test_divergence_matches_numpy() -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(5, 7)) * 3, generator.normal(size=(5, 7)) * 3
    temperature = 4.0
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    expected = temperature**2 * float(np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1)))
    got = soft_target_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_divergence_is_zero_for_equal_logits_up_to_a_shift() -> None:
    logits = torch.randn(4, 3)
    assert float(soft_target_divergence(logits, logits + 5.0, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_temperature_keeps_the_gradient_of_the_same_size() -> None:
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    norms = []
    for temperature in (4.0, 16.0):
        student = torch.zeros(64, 10, requires_grad=True)
        soft_target_divergence(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.2)


def test_alpha_mixes_the_two_terms() -> None:
    teacher = nn.Linear(3, 4)
    inputs, logits = torch.randn(6, 3), torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    soft = soft_target_divergence(logits, teacher(inputs), 3.0)
    batch = TrainingBatch(inputs, labels, None)
    hard = label_loss()(batch, logits)
    mixed = distillation_loss(teacher, temperature=3.0, alpha=0.25)(batch, logits)
    assert float(mixed) == pytest.approx(0.25 * float(soft.detach()) + 0.75 * float(hard), rel=1e-5)


def test_the_teacher_is_frozen_and_in_eval_mode() -> None:
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    logits = torch.randn(6, 4, requires_grad=True)
    batch = TrainingBatch(torch.randn(6, 3), torch.zeros(6, dtype=torch.long), None)
    distillation_loss(teacher, temperature=3.0, alpha=1.0)(batch, logits).backward()
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


class _Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return images.flatten(1)


def _preprocessing(size: int, mean: float, std: float, channels: int = 1) -> Preprocessing:
    return Preprocessing(size, channels, (mean,) * channels, (std,) * channels, "bilinear", 1.0)


def test_teacher_sees_its_own_normalization_of_the_same_image() -> None:
    student, teacher = _preprocessing(8, 0.5, 0.25), _preprocessing(8, 0.1, 2.0)
    recorder = _Recorder()
    raw = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    TeacherView(recorder, student=student, teacher_preprocessing=teacher)(student.normalize(raw))
    assert torch.allclose(recorder.seen, teacher.normalize(raw), atol=1e-5)


def test_teacher_sees_its_own_size() -> None:
    recorder = _Recorder()
    view = TeacherView(
        recorder, student=_preprocessing(8, 0.5, 0.5), teacher_preprocessing=_preprocessing(16, 0.5, 0.5)
    )
    view(torch.zeros(2, 1, 8, 8))
    assert recorder.seen.shape == (2, 1, 16, 16)


def test_channels_that_differ_are_refused() -> None:
    with pytest.raises(ModelError, match="3 channels and the student 1"):
        TeacherView(
            nn.Identity(), student=_preprocessing(8, 0.5, 0.5), teacher_preprocessing=_preprocessing(8, 0.5, 0.5, 3)
        )
