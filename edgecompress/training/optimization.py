"""The optimizer, its schedule, and the average of weights over time.

What enters: a module's parameters and the training settings. What leaves: torch's own objects, set up as small nets
like them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edgecompress.settings.training_settings import TrainingSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay on matrices and kernels alone.

    Decay on batch-norm scales and biases hurts small nets (He et al., 2019, "Bag of Tricks", section 3.1).
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def cosine_with_warmup(steps_per_epoch: int, epochs: int, warmup_epochs: float) -> Callable[[int], float]:
    """The learning rate's factor at each step: a linear rise, then half a cosine (Loshchilov and Hutter, 2017)."""
    total = steps_per_epoch * epochs
    warmup = min(round(steps_per_epoch * warmup_epochs), total - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def make_average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `module`'s weights and statistics, updated by `update_parameters` each step.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the random start is forgotten within few steps.
    """

    def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():  # batch norm counts its batches
            return current
        kept = min(decay, (1.0 + float(updates)) / (10.0 + float(updates)))
        return torch.lerp(current.to(averaged.dtype), averaged, kept)

    return AveragedModel(module, avg_fn=average, use_buffers=True)
