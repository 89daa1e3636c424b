"""Teachers: one or several frozen models that answer for a student's batch.

What enters: modules with their preprocessing, and a batch as the student sees it. What leaves: logits to learn from.
A teacher is never changed: that is checked, not assumed. It answers for each training image once where the student sees
the images as they are, and for the student's own view of them otherwise (Beyer et al., 2022, "Knowledge distillation: A
good teacher is patient and consistent": a fixed answer for a view that the teacher never saw loses much).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit
from edgecompress.errors import ModelError, TrainingError
from edgecompress.training.evaluate import collect_logits


class TeacherView(nn.Module):
    """A teacher that reads the student's normalized batch, re-normalized and resized to what it was trained on."""

    def __init__(self, teacher: nn.Module, *, student: Preprocessing, teacher_preprocessing: Preprocessing) -> None:
        super().__init__()
        require_same_channels(student, teacher_preprocessing)
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


def require_same_channels(student: Preprocessing, teacher: Preprocessing) -> None:
    """Raise ModelError where a student's batch is none that its teacher could read."""
    if student.channels != teacher.channels:
        raise ModelError(
            f"the teacher reads {teacher.channels} channels and the student {student.channels}; set the student's "
            f"model.preprocessing.channels: {teacher.channels}, or choose a teacher for the same images"
        )


class FrozenTeacher:
    """One or several teachers in eval mode, without gradients, whose weights and statistics stay as they are."""

    def __init__(self, members: Sequence[nn.Module], *, temperature: float) -> None:
        self.members = [member.eval().requires_grad_(False) for member in members]
        self._temperature = temperature
        self._fingerprint = self._read()
        self._kept: Tensor | None = None
        self._kept_seconds = 0.0

    def targets(self, images: Tensor, indices: Tensor | None) -> Tensor:
        """Logits [N, K] for a batch: the kept ones of these positions, or the teacher's for these very images."""
        if self._kept is not None:
            if indices is None:
                raise TrainingError("mixed images have no kept teacher logits; set teacher.view: augmented")
            if self._kept.device != images.device:
                self._kept = self._kept.to(images.device)
            return self._kept[indices.to(images.device)]
        return self._ask(images)

    def keep(
        self,
        train: PreparedSplit,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        autocast: AbstractContextManager[object],
    ) -> None:
        """Answer once for every image of the training split, as it is; `targets` then looks the answers up."""
        started = time.perf_counter()
        for member in self.members:
            member.to(device)
        with autocast:
            answers = [
                collect_logits(member, train, preprocessing, description="teacher's logits") for member in self.members
            ]
        self._kept = self._together(answers)
        self._kept_seconds = time.perf_counter() - started
        self.require_unchanged()

    def describe_cost(self, epochs: int) -> str:
        """How often the teachers ran in `epochs` epochs, and what keeping their answers saved, in words."""
        if self._kept is None:
            return "the teacher saw each batch as the student did"
        saved = f"in place of {epochs}" if epochs > 1 else "as the training has one epoch"
        return f"the teacher's logits were kept: one pass, {self._kept_seconds:.1f} s, {saved}"

    def require_unchanged(self) -> None:
        """Raises TrainingError when a weight or a batch-norm statistic has moved, or a member is in train mode."""
        modules = [module for member in self.members for module in member.modules()]
        parameters = [parameter for member in self.members for parameter in member.parameters()]
        if any(module.training for module in modules):
            fault = "is in train mode"
        elif any(parameter.requires_grad or parameter.grad is not None for parameter in parameters):
            fault = "gathers gradients"
        elif self._read() != self._fingerprint:
            fault = "has other weights or statistics than before"
        else:
            return
        raise TrainingError(
            f"the teacher {fault}: it must stay as it was when training began; if the model is code of your own, let "
            "its forward() change neither its mode nor its buffers"
        )

    def _ask(self, images: Tensor) -> Tensor:
        answers = []
        with torch.no_grad():
            for member in self.members:
                member.to(images.device)  # a no-op after the first batch
                answers.append(member(images).float())
        return self._together(answers)

    def _together(self, answers: list[Tensor]) -> Tensor:
        """Logits whose softmax at the temperature is the members' mean probability there; one member's are its own."""
        if len(answers) == 1:
            return answers[0]
        log_probabilities = torch.stack([functional.log_softmax(a / self._temperature, dim=1) for a in answers])
        mean = torch.logsumexp(log_probabilities, dim=0) - torch.log(torch.tensor(float(len(answers))))
        return mean * self._temperature

    def _read(self) -> str:
        digest = hashlib.sha256()
        for member in self.members:
            for name, tensor in member.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
