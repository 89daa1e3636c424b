from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecompress.data.images import ArrayItems, ImageSplit, PreparedSplit
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ModelError, TrainingError
from edgecompress.training.teacher import FrozenTeacher, TeacherView


class _Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(0)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        self.calls += 1
        return images.flatten(1)


def _preprocessing(size: int, mean: float, std: float, channels: int = 1) -> Preprocessing:
    return Preprocessing(size, channels, (mean,) * channels, (std,) * channels, "bilinear", 1.0)


def _split(count: int = 70) -> tuple[PreparedSplit, Preprocessing]:
    pixels = np.random.default_rng(0).integers(0, 256, size=(count, 4, 4), dtype=np.uint8)
    preprocessing = _preprocessing(4, 0.5, 0.5)
    split = ImageSplit("train", np.zeros(count, dtype=np.int64), ArrayItems(pixels))
    return split.prepare(preprocessing, cache=True), preprocessing


def test_it_sees_its_own_normalization_of_the_same_image() -> None:
    student, teacher = _preprocessing(8, 0.5, 0.25), _preprocessing(8, 0.1, 2.0)
    recorder = _Recorder()
    raw = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    TeacherView(recorder, student=student, teacher_preprocessing=teacher)(student.normalize(raw))
    assert torch.allclose(recorder.seen, teacher.normalize(raw), atol=1e-5)


def test_it_sees_its_own_size() -> None:
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


def test_several_teachers_answer_with_their_mean_probability_at_the_temperature() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    inputs = torch.randn(6, 3)
    together = FrozenTeacher([first, second], temperature=2.5).targets(inputs, None)
    mean = (torch.softmax(first(inputs) / 2.5, 1) + torch.softmax(second(inputs) / 2.5, 1)) / 2
    assert torch.allclose(torch.softmax(together / 2.5, dim=1), mean, atol=1e-6)


def test_kept_answers_are_those_of_the_images_at_the_positions_and_the_teacher_runs_once() -> None:
    split, preprocessing = _split()
    recorder = _Recorder()
    teacher = FrozenTeacher([recorder], temperature=4.0)
    teacher.keep(split, preprocessing, device=torch.device("cpu"), autocast=contextlib.nullcontext())
    calls = recorder.calls
    positions = torch.tensor([69, 3, 3, 0])
    images, _ = next(split.batches(4, indices=positions))
    answers = teacher.targets(torch.zeros(4, 1, 4, 4), positions)  # what the student sees does not matter
    assert torch.allclose(answers, preprocessing.normalize(images).flatten(1), atol=1e-6)
    assert recorder.calls == calls
    assert "one pass" in teacher.describe_cost(20)
    assert "in place of 20" in teacher.describe_cost(20)


def test_kept_answers_can_be_learned_from() -> None:
    split, preprocessing = _split()
    teacher = FrozenTeacher([_Recorder()], temperature=4.0)
    teacher.keep(split, preprocessing, device=torch.device("cpu"), autocast=contextlib.nullcontext())
    student = torch.zeros(2, 16, requires_grad=True)
    nn.functional.mse_loss(student, teacher.targets(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))).backward()
    assert student.grad is not None


def test_kept_answers_need_positions() -> None:
    split, preprocessing = _split()
    teacher = FrozenTeacher([_Recorder()], temperature=4.0)
    teacher.keep(split, preprocessing, device=torch.device("cpu"), autocast=contextlib.nullcontext())
    with pytest.raises(TrainingError, match="mixed images have no kept teacher logits"):
        teacher.targets(torch.zeros(2, 1, 4, 4), None)


def test_a_teacher_that_moves_is_an_error() -> None:
    norm = nn.BatchNorm1d(4)
    teacher = FrozenTeacher([nn.Sequential(nn.Linear(3, 4), norm)], temperature=4.0)
    teacher.require_unchanged()
    assert norm.running_mean is not None
    norm.running_mean += 1e-3
    with pytest.raises(TrainingError, match="other weights or statistics"):
        teacher.require_unchanged()


def test_a_teacher_in_train_mode_is_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    teacher = FrozenTeacher([module], temperature=4.0)
    module[1].train()
    with pytest.raises(TrainingError, match="train mode"):
        teacher.require_unchanged()


def test_a_teacher_that_learns_is_an_error() -> None:
    module = nn.Linear(3, 4)
    teacher = FrozenTeacher([module], temperature=4.0)
    module.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="gradients"):
        teacher.require_unchanged()
