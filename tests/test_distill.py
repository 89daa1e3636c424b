from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.training.distill import (
    DistillationLoss,
    TrainingBatch,
    decoupled_divergence,
    label_loss,
    relation_divergence,
    soft_target_divergence,
)
from edgecompress.training.teacher import FrozenTeacher


def _softmax(values: np.ndarray) -> np.ndarray:
    exponent = np.exp(values - values.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sum(p * (np.log(p) - np.log(q)), axis=1)


def _logits(seed: int, rows: int = 5, columns: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)) * 3


def test_divergence_matches_numpy() -> None:
    student, teacher, temperature = _logits(0), _logits(1), 4.0
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    expected = temperature**2 * float(np.mean(_divergence(p, q)))
    got = soft_target_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(got) == pytest.approx(expected, rel=1e-9)


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


def _decoupled_by_hand(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float, weights: tuple[float, float]
) -> float:
    rows = np.arange(len(labels))
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    binary = [np.stack([x[rows, labels], 1 - x[rows, labels]], axis=1) for x in (p, q)]
    rest = [np.stack([np.delete(x[i], labels[i]) / (1 - x[i, labels[i]]) for i in rows]) for x in (p, q)]
    terms = weights[0] * _divergence(*binary) + weights[1] * _divergence(*rest)
    return float(temperature**2 * np.mean(terms))


@pytest.mark.parametrize("weights", [(1.0, 8.0), (1.0, 0.0), (0.0, 1.0)])
def test_decoupled_divergence_matches_numpy(weights: tuple[float, float]) -> None:
    student, teacher, labels = _logits(0), _logits(1), np.array([0, 6, 3, 3, 1])
    got = decoupled_divergence(
        torch.tensor(student),
        torch.tensor(teacher),
        torch.tensor(labels),
        4.0,
        target_weight=weights[0],
        nontarget_weight=weights[1],
    )
    assert float(got) == pytest.approx(_decoupled_by_hand(student, teacher, labels, 4.0, weights), rel=1e-9)


def test_decoupled_terms_with_the_teachers_own_weight_are_the_plain_divergence() -> None:
    """Zhao et al., 2022, eq. 7: KL = KL(b_t || b_s) + (1 - p_target) KL(q_t || q_s)."""
    student, teacher, labels = _logits(0, rows=1), _logits(1, rows=1), np.array([2])
    rest = float(1 - _softmax(teacher / 2.0)[0, 2])
    got = decoupled_divergence(
        torch.tensor(student),
        torch.tensor(teacher),
        torch.tensor(labels),
        2.0,
        target_weight=1.0,
        nontarget_weight=rest,
    )
    assert float(got) == pytest.approx(
        float(soft_target_divergence(torch.tensor(student), torch.tensor(teacher), 2.0)), rel=1e-9
    )


def test_decoupled_target_of_mixed_labels_is_the_larger_share() -> None:
    student, teacher = torch.tensor(_logits(0)), torch.tensor(_logits(1))
    labels = torch.tensor([0, 6, 3, 3, 1])
    shares = 0.7 * nn.functional.one_hot(labels, 7) + 0.3 * nn.functional.one_hot((labels + 1) % 7, 7)
    weights = {"target_weight": 1.0, "nontarget_weight": 2.0}
    hard, mixed = (decoupled_divergence(student, teacher, given, 4.0, **weights) for given in (labels, shares))
    assert torch.equal(hard, mixed)


def test_decoupled_divergence_is_finite_for_a_certain_teacher() -> None:
    student = torch.zeros(1, 4, requires_grad=True)
    teacher = torch.tensor([[200.0, 0.0, -50.0, 0.0]])
    value = decoupled_divergence(student, teacher, torch.tensor([0]), 1.0, target_weight=1.0, nontarget_weight=8.0)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_relation_divergence_matches_numpy() -> None:
    student, teacher, temperature = _logits(0), _logits(1), 3.0
    ours, theirs = _softmax(student / temperature), _softmax(teacher / temperature)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ours.T, theirs.T, strict=True)])
    got = relation_divergence(
        torch.tensor(student),
        torch.tensor(teacher),
        temperature,
        between_classes_weight=2.0,
        within_classes_weight=0.5,
    )
    assert float(got) == pytest.approx(temperature**2 * (2.0 * rows + 0.5 * columns), rel=1e-6)


def _taught(teacher: nn.Module, **settings: Any) -> DistillationLoss:
    chosen = TeacherSettings.model_validate({"stage": "teacher", "temperature": 3.0} | settings)
    return DistillationLoss(FrozenTeacher([teacher], temperature=chosen.temperature), chosen)


def test_alpha_mixes_the_two_terms() -> None:
    teacher = nn.Linear(3, 4)
    inputs, logits = torch.randn(6, 3), torch.randn(6, 4)
    batch = TrainingBatch(inputs, torch.tensor([0, 1, 2, 3, 0, 1]), None)
    soft = soft_target_divergence(logits, teacher(inputs), 3.0)
    hard = label_loss()(batch, logits)
    mixed = _taught(teacher, alpha=0.25)(batch, logits)
    assert float(mixed) == pytest.approx(0.25 * float(soft.detach()) + 0.75 * float(hard), rel=1e-5)


@pytest.mark.parametrize("method", ["kd", "dkd", "relation"])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_flows_to_the_student_only(method: str, mixed: bool) -> None:
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = nn.Linear(3, 4)
    loss = _taught(teacher, method=method, alpha=1.0)
    inputs = torch.randn(6, 3)
    labels: Tensor = torch.tensor([0, 1, 2, 3, 0, 1])
    if mixed:
        labels = 0.6 * nn.functional.one_hot(labels, 4) + 0.4 * nn.functional.one_hot(labels.flip(0), 4)
    loss(TrainingBatch(inputs, labels, None), student(inputs)).backward()
    assert student.weight.grad is not None
    assert student.weight.grad.abs().sum() > 0
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_the_teacher_is_no_part_of_the_loss() -> None:
    teacher = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    loss = _taught(teacher).train()
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("method", ["kd", "dkd", "relation"])
def test_losses_are_made_in_float32_under_autocast(method: str) -> None:
    loss = _taught(nn.Linear(3, 4), method=method)
    batch = TrainingBatch(torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]), None)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(batch, torch.randn(6, 4, dtype=torch.bfloat16))
    assert value.dtype == torch.float32
