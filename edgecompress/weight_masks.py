"""Pruning weights: the smallest are zeroed, and held at zero while finetuning goes on.

What enters: a module and how much to zero. What leaves: the module changed in place, and masks that put the zeros back.
Which weights are smallest is decided over all layers, in each, or in every few neighbours (N:M patterns).
"""

from __future__ import annotations

import torch
from torch import nn

from edgecompress.channel_groups import matching
from edgecompress.complexity import WEIGHT_LAYERS, weight_layers
from edgecompress.errors import PruningError
from edgecompress.recipe import PruneStage


class WeightMasks:
    """Zeroes the smallest weights and holds them at zero while finetuning goes on (L1 magnitude pruning)."""

    def __init__(self, module: nn.Module, *, stage: PruneStage) -> None:
        layers = weight_layers(module)
        excluded = matching(stage.exclude, list(layers), field="exclude")
        self._weights = {name: _weight(layer) for name, layer in layers.items() if name not in excluded}
        if not self._weights:
            raise PruningError(f"stage {stage.id}: exclude leaves no layer to prune")
        self._masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self._weights.items()}
        self._stage = stage

    def step(self, number: int) -> None:
        """Reach the sparsity of step `number` (1 is the first).

        Each step removes the same share of what is left, 1 - (1 - s)^(k / steps) in total after k, the
        schedule behind the paper's Table III.
        """
        assert self._stage.sparsity is not None
        wanted = 1.0 - (1.0 - self._stage.sparsity) ** (number / self._stage.steps)
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

    @property
    def sparsity(self) -> float:
        """Fraction of masked weights among all that may be masked."""
        masked = sum(int((~mask).sum()) for mask in self._masks.values())
        return masked / sum(mask.numel() for mask in self._masks.values())


def _weight(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer, WEIGHT_LAYERS)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight
