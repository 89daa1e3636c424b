"""Pruning: removing channels (structured), or zeroing weights and holding them at zero (unstructured).

What enters: a module and how much to remove. What leaves: the module changed in place and, for channels, the
history from which the same cut can be made again on a fresh module. Which tensors shrink together is torch-pruning's
dependency graph (Fang et al., 2023, "DepGraph"). A step that removes nothing is an error, never a success.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.complexity import WEIGHT_LAYERS, weight_layers
from edgecompress.configuration import did_you_mean
from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.recipe import PruneStage

PruningRecord = tuple[str, bool, tuple[int, ...]]
"""(module name, whether output channels, indices removed), one cut of a coupled group."""


class ChannelPruner:
    """Cuts channels of `module` in `stage.steps` steps towards `stage.channel_ratio`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        stage: PruneStage,
        channel_multiple: int,
        example: Tensor,
        scoring_batches: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """`scoring_batches` are normalized images and labels, used by importance: taylor only."""
        self.module = module.eval()
        self.stage = stage
        self._scoring_batches = scoring_batches
        protected = [weight_layers(module)[name] for name in protected_layers(module, example, stage.exclude)]
        try:
            self._pruner = torch_pruning.pruner.BasePruner(
                module,
                example,
                importance=_importance(stage.importance, module),
                global_pruning=stage.scope == "global",
                pruning_ratio=stage.channel_ratio,
                max_pruning_ratio=stage.max_layer_ratio,
                iterative_steps=stage.steps,
                ignored_layers=protected,
                round_to=channel_multiple,
            )
        except Exception as error:  # the tracer raises many unrelated types for graphs it cannot follow
            raise PruningError(
                f"stage {stage.id}: the model's channels cannot be traced ({type(error).__name__}: {error}); "
                "use method: unstructured, or another architecture"
            ) from error

    def step(self) -> None:
        """Remove one step's channels."""
        if self.stage.importance == "taylor":
            _accumulate_gradients(self.module, self._scoring_batches)
        with torch.no_grad():
            self._pruner.step()
        self.module.zero_grad(set_to_none=True)

    @property
    def history(self) -> tuple[PruningRecord, ...]:
        """Every cut so far, in order."""
        return tuple((str(n), bool(out), tuple(int(i) for i in idx)) for n, out, idx in self._pruner.pruning_history())


def replay_history(module: nn.Module, example: Tensor, history: Iterable[PruningRecord]) -> None:
    """Make the cuts of `history` on a fresh `module`. Raises PruningError when they do not fit it."""
    records = [(name, is_output, list(indices)) for name, is_output, indices in history]
    if not records:
        return
    module.eval()
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)
        graph.load_pruning_history(records)
    except Exception as error:  # damaged histories fail in torch-pruning in many unrelated ways
        raise PruningError(f"the pruning history does not fit the architecture: {error!r}") from error


def protected_layers(module: nn.Module, example: Tensor, exclude: Sequence[str]) -> list[str]:
    """Layers that keep every output channel: the classifier, and what `exclude` names.

    Raises ConfigurationError for a glob that matches nothing.
    """
    names = list(weight_layers(module))
    protected = {_last_layer(module, example)}
    for pattern in exclude:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ConfigurationError(f"exclude: '{pattern}' matches no layer{did_you_mean(pattern, names)}")
        protected.update(matches)
    return sorted(protected)


def _last_layer(module: nn.Module, example: Tensor) -> str:
    """The weight layer that runs last, whose outputs are the classes."""
    order: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, layer in weight_layers(module).items()
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise PruningError("the model has no convolution or linear layer to prune")
    return order[-1]


def _importance(name: str, module: nn.Module) -> Any:
    if name == "taylor":
        return torch_pruning.importance.GroupTaylorImportance()
    if name == "bn_scale":
        if not any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
            raise PruningError("importance: bn_scale needs batch norm, and the model has none; use magnitude")
        return torch_pruning.importance.BNScaleImportance()
    return torch_pruning.importance.GroupMagnitudeImportance(p=2)


def _accumulate_gradients(module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    module.zero_grad(set_to_none=True)
    for images, labels in batches:
        functional.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by the plain mean over `batches` of normalized images.

    Removing channels shifts what later layers see; fresh statistics give finetuning a fair start
    (Li et al., 2020, "EagleEye", section 3.3).
    """
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average instead of an exponential one
    module.train()
    with torch.no_grad():
        for images in batches:
            module(images)
    module.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class WeightMasks:
    """Zeroes the smallest weights and holds them at zero while finetuning goes on (L1 magnitude pruning)."""

    def __init__(self, module: nn.Module, *, stage: PruneStage) -> None:
        layers = weight_layers(module)
        excluded: set[str] = set()
        for pattern in stage.exclude:
            matches = fnmatch.filter(layers, pattern)
            if not matches:
                raise ConfigurationError(f"exclude: '{pattern}' matches no layer{did_you_mean(pattern, layers)}")
            excluded.update(matches)
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


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode, so that a stage never changes the model of the stage before it."""
    return copy.deepcopy(module).eval()
