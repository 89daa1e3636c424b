"""Losses: the labels' alone, or mixed with what a teacher says.

What enters: one batch and the student's logits for it. What leaves: a scalar to descend. The formulas are plain
functions of logits, one a method, each beside its source; `TrainingLoss` is what the training loop calls, so that the
loop does not know whether a teacher stands behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.training.layer_matching import LayerMatcher
from edgecompress.training.teacher import FrozenTeacher


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


class TrainingLoss(nn.Module, ABC):
    """A loss function of the stages. Its parameters, if any, are trained along and never exported."""

    @abstractmethod
    def forward(self, batch: TrainingBatch, logits: Tensor) -> Tensor:
        """A scalar for the student's `logits` [N, K]."""

    @contextmanager
    def watching(self, student: nn.Module, example: Tensor) -> Iterator[None]:
        """Everything the loss needs of `student` while it is trained; `example` is one input batch."""
        yield


class LabelLoss(TrainingLoss):
    """Cross-entropy with the labels."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, batch: TrainingBatch, logits: Tensor) -> Tensor:
        """Mean over the batch."""
        return functional.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)


class DistillationLoss(TrainingLoss):
    """(1 - alpha) * labels + alpha * teacher's logits, and for method feature a term of the layers beside them."""

    def __init__(
        self,
        teacher: FrozenTeacher,
        settings: TeacherSettings,
        *,
        label_smoothing: float = 0.0,
        matcher: LayerMatcher | None = None,
    ) -> None:
        super().__init__()
        # The teacher is no module of the loss: it is not trained, not saved with it, and never in train mode.
        self.teacher = teacher
        self.settings = settings
        self.labels = LabelLoss(label_smoothing)
        self.matcher = matcher

    def forward(self, batch: TrainingBatch, logits: Tensor) -> Tensor:
        """Mean over the batch, in float32 whatever the student is trained in."""
        targets = self.teacher.targets(batch.images, batch.indices)
        with torch.autocast(logits.device.type, enabled=False):
            taught = self._divergence(logits.float(), targets.float(), batch.labels)
            labelled: Tensor = self.labels(batch, logits)
            loss = self.settings.alpha * taught + (1.0 - self.settings.alpha) * labelled
            if self.matcher is not None:
                loss = loss + self.settings.feature_weight * self.matcher()
        return loss

    def _divergence(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        chosen = self.settings
        if chosen.method == "dkd":
            return decoupled_divergence(
                student,
                teacher,
                labels,
                chosen.temperature,
                target_weight=chosen.target_weight,
                nontarget_weight=chosen.nontarget_weight,
            )
        if chosen.method == "relation":
            return relation_divergence(
                student,
                teacher,
                chosen.temperature,
                between_classes_weight=chosen.between_classes_weight,
                within_classes_weight=chosen.within_classes_weight,
            )
        return soft_target_divergence(student, teacher, chosen.temperature)

    @contextmanager
    def watching(self, student: nn.Module, example: Tensor) -> Iterator[None]:
        """Read the student's layers, where the method does. Raises TrainingError if the teacher has moved."""
        if self.matcher is None:
            yield
        else:
            with self.matcher.watching(student, example):
                yield
        self.teacher.require_unchanged()


def label_loss(label_smoothing: float = 0.0) -> TrainingLoss:
    """Cross-entropy with the labels."""
    return LabelLoss(label_smoothing)


def soft_target_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened predictions, mean over the batch.

    Both are logits [N, K]. T^2 keeps the gradient's size the same whatever the temperature
    (Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural Network", section 2).
    """
    log_student = functional.log_softmax(student / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def decoupled_divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    target_weight: float,
    nontarget_weight: float,
) -> Tensor:
    """T^2 * (target_weight * KL(b_t || b_s) + nontarget_weight * KL(q_t || q_s)), mean over the batch.

    b is (p_target, 1 - p_target) and q the softmax over the other classes alone (Zhao et al., 2022, "Decoupled
    Knowledge Distillation", eq. 7). With weights 1 and 1 - p_target of the teacher it would be the plain divergence;
    a weight of its own keeps what a confident teacher knows about the other classes. Logits are [N, K]; labels are
    int64 [N], or float shares [N, K], whose largest share is the target.
    """
    target = labels if labels.dim() == 1 else labels.argmax(dim=1)
    count, classes = student.shape
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, target[:, None], False)

    def decoupled(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        rest = scaled[others].view(count, classes - 1)
        rest_mass = torch.logsumexp(rest, dim=1)
        both = torch.stack([scaled.gather(1, target[:, None])[:, 0], rest_mass], dim=1)
        return functional.log_softmax(both, dim=1), functional.log_softmax(rest, dim=1)

    student_binary, student_rest = decoupled(student)
    teacher_binary, teacher_rest = decoupled(teacher)
    of_target = functional.kl_div(student_binary, teacher_binary, reduction="batchmean", log_target=True)
    of_others = functional.kl_div(student_rest, teacher_rest, reduction="batchmean", log_target=True)
    return (target_weight * of_target + nontarget_weight * of_others) * temperature**2


def relation_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    between_classes_weight: float,
    within_classes_weight: float,
) -> Tensor:
    """T^2 * (between * mean(1 - r over rows) + within * mean(1 - r over columns)) of softened predictions [N, K].

    r is Pearson's correlation of the student's row (or column) with the teacher's: a row is how an image's classes
    relate, a column how a class's images do. The student is free in scale and shift, so a much stronger teacher asks no
    more of it than it can (Huang et al., 2022, "Knowledge Distillation from A Stronger Teacher", eq. 6, 8 and 10).
    """
    ours = torch.softmax(student / temperature, dim=1)
    theirs = torch.softmax(teacher / temperature, dim=1)
    rows = 1.0 - _correlation(ours, theirs).mean()
    columns = 1.0 - _correlation(ours.t(), theirs.t()).mean()
    return (between_classes_weight * rows + within_classes_weight * columns) * temperature**2


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two matrices [R, C], [R]; 0 where a row is constant."""
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    return functional.cosine_similarity(first, second, dim=1, eps=1e-8)
