"""Losses: the labels' alone, or mixed with a teacher's soft targets.

What enters: images, logits and labels of one batch. What leaves: a scalar to descend. A loss is a plain
function, so the training loop does not know whether a teacher stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.errors import ModelError
from edgecompress.preprocessing import Preprocessing


@dataclass(frozen=True)
class TrainingBatch:
    """What one step trains on.

    `images` are normalized [N, C, H, W]; `labels` are classes [N], or shares of the classes [N, K] where images were
    mixed; `indices` [N] are the images' positions in the split, None where images were mixed.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor | None


LossFunction = Callable[[TrainingBatch, Tensor], Tensor]
"""(batch, logits [N, K]) -> scalar, the mean over the batch.

Where it is a module, its parameters are trained along and dropped afterwards; a teacher must be none of its children.
"""


def label_loss(label_smoothing: float = 0.0) -> LossFunction:
    """Cross-entropy with the labels."""

    def loss(batch: TrainingBatch, logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)

    return loss


def soft_target_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened predictions, mean over the batch.

    Both are logits [N, K]. T^2 keeps the gradient's size the same whatever the temperature
    (Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural Network", section 2).
    """
    log_student = functional.log_softmax(student.float() / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def distillation_loss(
    teacher: nn.Module, *, temperature: float, alpha: float, label_smoothing: float = 0.0
) -> LossFunction:
    """alpha * soft targets + (1 - alpha) * labels. The teacher is frozen here and sees the student's view."""
    teacher.eval().requires_grad_(False)
    labels_only = label_loss(label_smoothing)

    def loss(batch: TrainingBatch, logits: Tensor) -> Tensor:
        teacher.to(batch.images.device)  # a no-op after the first batch
        with torch.no_grad():
            targets = teacher(batch.images)
        soft = soft_target_divergence(logits, targets, temperature)
        return alpha * soft + (1.0 - alpha) * labels_only(batch, logits)

    return loss


class TeacherView(nn.Module):
    """A teacher that reads the student's normalized batch, re-normalized and resized to what it was trained on."""

    def __init__(self, teacher: nn.Module, *, student: Preprocessing, teacher_preprocessing: Preprocessing) -> None:
        super().__init__()
        if student.channels != teacher_preprocessing.channels:
            raise ModelError(
                f"the teacher reads {teacher_preprocessing.channels} channels and the student {student.channels}; "
                "choose a teacher for the same images"
            )
        self.teacher = teacher
        self.size = teacher_preprocessing.input_size
        # (x * s_student + m_student - m_teacher) / s_teacher, per channel, as one scale and one shift.
        student_mean, student_std = torch.tensor(student.mean), torch.tensor(student.std)
        mean, std = torch.tensor(teacher_preprocessing.mean), torch.tensor(teacher_preprocessing.std)
        self.register_buffer("scale", (student_std / std).view(1, -1, 1, 1))
        self.register_buffer("shift", ((student_mean - mean) / std).view(1, -1, 1, 1))
        self.scale: Tensor
        self.shift: Tensor
        self.same_values = (student.mean, student.std) == (teacher_preprocessing.mean, teacher_preprocessing.std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] for the student's batch [N, C, H, W]."""
        if not self.same_values:
            images = images * self.scale + self.shift
        if images.shape[-1] != self.size:
            images = functional.interpolate(
                images, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        logits: Tensor = self.teacher(images)
        return logits
