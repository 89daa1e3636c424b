"""Coupled channels: which layers lose channels together, and the cut itself.

What enters: a module. What leaves: its groups of coupled channels, and the module with some of them removed. What
shrinks together is torch-pruning's dependency graph (Fang et al., 2023, "DepGraph"); how many channels stay, and which,
is decided elsewhere.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.models.complexity import weight_layers
from edgecompress.settings.spelling import did_you_mean

PruningRecord = tuple[str, bool, tuple[int, ...]]
"""(module name, whether output channels, indices removed), one cut of a coupled group."""


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that can only be removed together, of all the layers that make or read them.

    `producers` are the layers that make them, in the model's order, and `name` is the first of these. Grouped
    convolutions lose a channel in each of their `blocks` at a time. `shape` is equal for groups of the same pattern of
    layers (Fang et al., 2024, "Isomorphic Pruning"). `root` and `handle` are torch-pruning's: the layer whose channels
    it counts, and the group.
    """

    name: str
    producers: tuple[str, ...]
    channels: int
    blocks: int
    shape: str
    root: str
    handle: Any

    def units(self, multiple: int) -> int:
        """The smallest number of channels that keeps every count a multiple of `multiple` and the blocks equal."""
        return math.lcm(multiple, self.blocks)


class ChannelGroups:
    """The coupled groups of `module`, in the order of its layers. Cutting changes the module in place.

    Raises PruningError where the channels cannot be traced.
    """

    def __init__(self, module: nn.Module, example: Tensor, *, protected: Sequence[str]) -> None:
        """Groups that hold an output channel of a layer in `protected` are left out."""
        self.module = module.eval()
        self._names = {child: name for name, child in module.named_modules()}
        self._order = {name: index for index, name in enumerate(self._names.values())}
        layers = weight_layers(module)
        self._protected = [layers[name] for name in protected]
        try:
            self._graph = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)
            self._handles()
        except Exception as error:  # the tracer raises many unrelated types for graphs it cannot follow
            raise PruningError(
                f"the model's channels cannot be traced ({type(error).__name__}: {error}); "
                "use method: unstructured, or another architecture"
            ) from error
        self._history: list[PruningRecord] = []

    def _handles(self) -> list[Any]:
        return list(self._graph.get_all_groups(ignored_layers=self._protected))

    def current(self) -> list[CoupledGroup]:
        """Every group with the channels that it has now."""
        groups = [self._describe(handle) for handle in self._handles()]
        return sorted(groups, key=lambda group: self._order[group.name])

    def _describe(self, handle: Any) -> CoupledGroup:
        producers: set[str] = set()
        blocks, parts = 1, []
        for dep, _ in handle:
            target = dep.target.module
            is_output = self._graph.is_out_channel_pruning_fn(dep.handler)
            parts.append(f"{type(target).__name__}:{'out' if is_output else 'in'}")
            if isinstance(target, nn.Module):
                if is_output and isinstance(target, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                    producers.add(self._names[target])
                blocks = math.lcm(blocks, self._blocks_of(target, is_output))
        root = handle[0].dep.target.module
        channels = int(self._graph.get_out_channels(root))
        ordered = tuple(sorted(producers, key=self._order.__getitem__))
        return CoupledGroup(ordered[0], ordered, channels, blocks, " ".join(parts), self._names[root], handle)

    def _blocks_of(self, layer: nn.Module, is_output: bool) -> int:
        """In how many blocks of equal size the layer's channels come; a depthwise layer's may go one by one."""
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, nn.Conv2d) and groups == layer.out_channels:
            return 1
        pruner = self._graph.get_pruner_of_module(layer)
        if pruner is None:
            return 1
        found = pruner.get_out_channel_groups(layer) if is_output else pruner.get_in_channel_groups(layer)
        return int(found)

    def cut(self, group: CoupledGroup, indices: Sequence[int]) -> None:
        """Remove these channels (positions among the group's) from every layer of the group."""
        layer = group.handle[0].dep.target.module
        doomed = sorted(int(index) for index in indices)
        prune = self._graph.get_pruner_of_module(layer).prune_out_channels
        handle = self._graph.get_pruning_group(layer, prune, list(doomed))
        if not self._graph.check_pruning_group(handle):
            raise PruningError(f"{group.name}: removing {len(doomed)} of {group.channels} channels would leave none")
        with torch.no_grad():
            handle.prune(record_history=False)
        self._history.append((group.root, True, tuple(doomed)))

    @property
    def history(self) -> tuple[PruningRecord, ...]:
        """Every cut so far, in order."""
        return tuple(self._history)


def replay_cuts(module: nn.Module, example: Tensor, cuts: Iterable[PruningRecord]) -> None:
    """Make recorded cuts on a fresh `module`. Raises PruningError when they do not fit it."""
    records = [(name, is_output, list(indices)) for name, is_output, indices in cuts]
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
    layers = list(weight_layers(module))
    return sorted({_last_layer(module, example), *matching(exclude, layers, field="exclude")})


def matching(patterns: Iterable[str], names: Sequence[str], *, field: str) -> set[str]:
    """The names that match any of the globs. Raises ConfigurationError for a glob that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ConfigurationError(f"{field}: '{pattern}' matches no layer{did_you_mean(pattern, names)}")
        found.update(matches)
    return found


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
