"""Pruning weights: the smallest are zeroed, and held at zero while finetuning goes on.

What enters: a module and how much to zero. What leaves: the module changed in place, and masks that put the zeros back.
Which weights are smallest is decided over all layers, in each, or among every few neighbours (N:M patterns).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgecompress.errors import PruningError
from edgecompress.models.channel_groups import matching
from edgecompress.models.complexity import WEIGHT_LAYERS, weight_layers
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.training.distill import TrainingBatch, TrainingLoss

# A smaller fall of the share of zeros is not worth a word: training moves a few weights to and from zero.
_LOST_SHARE = 0.005


class WeightMasks:
    """Zeroes the smallest weights by magnitude (L1), step by step, and holds them at zero.

    Raises ConfigurationError for a glob that matches nothing, PruningError where no layer is left to prune.
    """

    def __init__(self, module: nn.Module, *, stage: PruneStage) -> None:
        layers = weight_layers(module)
        excluded = matching(stage.exclude, list(layers), field="exclude")
        self._module = module
        self._stage = stage
        self._weights = {name: _weight(layer) for name, layer in layers.items() if name not in excluded}
        if not self._weights:
            raise PruningError(f"stage {stage.id}: exclude leaves no layer to prune")
        self.skipped: tuple[str, ...] = ()
        """Layers whose inputs are no multiple of the pattern's M."""
        if stage.pattern is not None:
            size = _pattern(stage.pattern)[1]
            self.skipped = tuple(name for name, w in self._weights.items() if w.shape[1] % size)
            self._weights = {name: w for name, w in self._weights.items() if name not in self.skipped}
            if not self._weights:
                raise PruningError(
                    f"stage {stage.id}: pattern {stage.pattern}: no layer has a multiple of {size} input channels"
                )
        self._masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self._weights.items()}

    def step(self, number: int) -> None:
        """Reach the sparsity of step `number` (1 is the first).

        Each step removes the same share of what is left, 1 - (1 - s)^(k / steps) in total after k, the
        schedule behind the paper's Table III. A pattern zeroes as many more of each M neighbours in each step.
        """
        progress = number / self._stage.steps
        if self._stage.pattern is not None:
            kept, size = _pattern(self._stage.pattern)
            for name, weight in self._weights.items():
                self._masks[name] = pattern_mask(weight.detach(), round((size - kept) * progress), size)
        else:
            assert self._stage.sparsity is not None
            wanted = 1.0 - (1.0 - self._stage.sparsity) ** progress
            if self._stage.scope == "global":
                self._prune_together(list(self._weights), wanted)
            else:
                for name in self._weights:
                    self._prune_together([name], wanted)
        self.apply()

    def _prune_together(self, names: list[str], fraction: float) -> None:
        magnitudes = torch.cat([self._weights[name].detach().abs().flatten() for name in names])
        count = round(fraction * magnitudes.numel())
        # By rank and not by threshold, so that equal magnitudes cannot remove more than was asked for.
        keep = torch.ones(magnitudes.numel(), dtype=torch.bool)
        keep[torch.argsort(magnitudes, stable=True)[:count]] = False
        parts = torch.split(keep, [self._weights[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            self._masks[name] = part.view_as(self._weights[name])

    def apply(self) -> None:
        """Put the zeros back; called after every optimizer step."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._masks[name] = self._masks[name].to(weight.device)
                weight.mul_(self._masks[name])

    def rewind(self, early: Mapping[str, Tensor]) -> None:
        """What is left goes back to `early`, the state of the same network at an earlier time.

        Frankle et al., 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", algorithm 1.
        """
        self._module.load_state_dict(dict(early))
        self.apply()

    def penalized(self, loss: TrainingLoss) -> TrainingLoss:
        """The loss with the stage's penalty on these weights beside it."""
        if self._stage.regularization is None:
            return loss
        power = {"l1": 1, "l2": 2}[self._stage.regularization]
        return PenalizedLoss(loss, list(self._weights.values()), power, self._stage.regularization_strength)

    @property
    def sparsity(self) -> float:
        """Fraction of masked weights among all that may be masked."""
        masked = sum(int((~mask).sum()) for mask in self._masks.values())
        return masked / sum(mask.numel() for mask in self._masks.values())


def lost_zeros(stage_id: str, before: float, after: float) -> str | None:
    """A warning where a stage left fewer zeros among the weights than there were before it, shares in [0, 1]."""
    if before - after <= _LOST_SHARE:
        return None
    return (
        f"stage {stage_id}: {before:.1%} of the weights were zero before it and {after:.1%} are after it: it does not "
        "hold the zeros that pruning made. Of the stages that train, put prune with method unstructured last; quantize "
        "keeps its zeros with effort fast and balanced"
    )


def _weight(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer, WEIGHT_LAYERS)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


class PenalizedLoss(TrainingLoss):
    """A loss and beside it `strength` times the sum of |w|^power over some weights."""

    def __init__(self, loss: TrainingLoss, weights: list[nn.Parameter], power: int, strength: float) -> None:
        super().__init__()
        self.loss = loss
        self._weights = weights  # in a list, so that they are no parameters of the loss: the student trains them
        self._power, self._strength = power, strength

    def forward(self, batch: TrainingBatch, logits: Tensor) -> Tensor:
        """Mean over the batch, and the penalty."""
        value: Tensor = self.loss(batch, logits)
        penalty = torch.stack([weight.float().abs().pow(self._power).sum() for weight in self._weights]).sum()
        return value + self._strength * penalty

    @contextmanager
    def watching(self, student: nn.Module, example: Tensor) -> Iterator[None]:
        """As the loss within."""
        with self.loss.watching(student, example):
            yield


def pattern_mask(weight: Tensor, zeros: int, size: int) -> Tensor:
    """A mask that is false at the `zeros` smallest of every `size` neighbouring inputs of a filter.

    `weight` is [outputs, inputs, ...]; neighbours are consecutive inputs at one place of the kernel, as sparse matrix
    units read them (Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks").
    """
    groups = weight.abs().view(len(weight), -1, size, *weight.shape[2:])
    order = groups.argsort(dim=2, stable=True)
    mask = torch.ones_like(groups, dtype=torch.bool)
    return mask.scatter(2, order[:, :, :zeros], False).flatten(1, 2)


def _pattern(pattern: str) -> tuple[int, int]:
    kept, size = pattern.split(":")
    return int(kept), int(size)
