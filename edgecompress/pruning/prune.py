"""Pruning channels: how many each coupled group keeps, and which.

What enters: a module, a prune stage's settings and some training images. What leaves: the module changed in place,
and the history from which the same cuts can be made again on a fresh module. Counts are rounded to the nearest multiple
that the target's kernels like, and no layer loses more than `max_layer_ratio` of its channels.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from edgecompress.errors import ConfigurationError
from edgecompress.models.channel_groups import ChannelGroups, CoupledGroup, PruningRecord, matching, protected_layers
from edgecompress.models.complexity import weight_layers
from edgecompress.models.model_building import copy_of
from edgecompress.pruning.channel_importance import scores
from edgecompress.settings.prune_settings import PruneStage

Widths = dict[str, int]
"""Channels that each coupled group keeps, by the group's name."""


class ChannelPruner:
    """Plans how many channels each group of `module` keeps, and cuts it to a plan, in one step or several."""

    def __init__(
        self,
        module: nn.Module,
        *,
        stage: PruneStage,
        channel_multiple: int,
        example: Tensor,
        scoring_batches: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """`scoring_batches` are normalized images and labels, read by importance taylor and hessian alone.

        Raises PruningError where the channels cannot be traced, ConfigurationError for globs that do not fit.
        """
        self.module = module.eval()
        self.stage = stage
        self.multiple = channel_multiple
        self.example = example
        self._batches = scoring_batches
        self.protected = protected_layers(module, example, stage.exclude)
        self._groups = ChannelGroups(module, example, protected=self.protected)
        self.initial = {group.name: group for group in self._groups.current()}
        self._own_ratios = _ratios_by_group(stage, list(self.initial.values()), list(weight_layers(module)))
        self.unscored: tuple[str, ...] = ()

    def score(self) -> dict[str, Tensor]:
        """One score a unit of each group now: a channel, or one in each block of a grouped convolution."""
        groups = self._groups.current()
        found = scores(self.module, groups, importance=self.stage.importance, batches=self._batches)
        self.unscored = tuple(group.name for group in groups if group.name not in found)
        return {group.name: _by_unit(found[group.name], group) for group in groups if group.name in found}

    def plan(self, ratio: float, scored: Mapping[str, Tensor], *, progress: float = 1.0) -> Widths:
        """What each group keeps when `ratio` of the channels are removed; `progress` 0.5 is half of the way there.

        Ranked over all groups, among isomorphic ones or in each, as the stage's `scope` says. Groups of `layer_ratios`
        lose their own share.
        """
        pools: dict[str, list[str]] = {}
        kept = {name: self.initial[name].channels for name in self.initial}
        for name, group in self.initial.items():
            if name in self._own_ratios:
                kept[name] = self._rounded(group, group.channels * (1 - progress * self._own_ratios[name]))
            elif name in scored:
                key = {"layer": name, "isomorphic": group.shape, "global": ""}[self.stage.scope]
                pools.setdefault(key, []).append(name)
        for names in pools.values():
            kept |= self._ranked(names, progress * ratio, scored)
        return kept

    def _ranked(self, names: Sequence[str], ratio: float, scored: Mapping[str, Tensor]) -> Widths:
        """The highest scores of a pool stay, and of each group at least its floor."""
        groups = [self.initial[name] for name in names]
        if len(groups) == 1:
            return {names[0]: self._rounded(groups[0], groups[0].channels * (1 - ratio))}
        ranks = []
        for group in groups:
            ordered = scored[group.name].sort(descending=True).values.clone()
            ordered[: math.ceil(self._floor(group) / group.blocks)] = math.inf
            ranks.append(ordered)
        total = round(sum(group.channels // group.blocks for group in groups) * (1 - ratio))
        pooled = torch.cat(ranks)
        stays = torch.zeros(len(pooled), dtype=torch.bool)
        # By rank and not by threshold, so that equal scores cannot remove more than was asked for.
        stays[torch.argsort(pooled, descending=True, stable=True)[:total]] = True
        parts = torch.split(stays, [len(rank) for rank in ranks])
        return {
            group.name: self._rounded(group, int(part.sum()) * group.blocks)
            for group, part in zip(groups, parts, strict=True)
        }

    def _floor(self, group: CoupledGroup) -> float:
        return max(1.0, group.channels * (1 - self.stage.max_layer_ratio) - 1e-9)

    def _rounded(self, group: CoupledGroup, wanted: float) -> int:
        """The nearest count that kernels like, between the group's floor and all of its channels; halves go down."""
        unit = group.units(self.multiple)
        nearest = math.ceil(wanted / unit - 0.5 - 1e-9) * unit
        lowest = math.ceil(self._floor(group) / unit) * unit
        return min(group.channels, max(nearest, lowest))

    def part_of(self, final: Widths, progress: float) -> Widths:
        """The counts on the way to `final`: at `progress` 0.5, half of what will go is gone."""
        if progress >= 1:
            return dict(final)
        return {
            name: self._rounded(group, group.channels - progress * (group.channels - final[name]))
            for name, group in self.initial.items()
        }

    def cut_to(self, widths: Mapping[str, int], scored: Mapping[str, Tensor]) -> None:
        """Remove the channels that score lowest until each group has its count. A group never grows back."""
        for group in self._groups.current():
            doomed = (group.channels - widths[group.name]) // group.blocks
            if doomed > 0:
                lowest = torch.argsort(scored[group.name], stable=True)[:doomed]
                self._groups.cut(group, _in_every_block(lowest, group))

    @property
    def history(self) -> tuple[PruningRecord, ...]:
        """Every cut so far, in order."""
        return self._groups.history


def with_widths(module: nn.Module, example: Tensor, protected: Sequence[str], widths: Mapping[str, int]) -> nn.Module:
    """A copy of `module` of this shape, to be counted or timed: which channels it keeps means nothing."""
    copied = copy_of(module)
    groups = ChannelGroups(copied, example, protected=protected)
    for group in groups.current():
        doomed = (group.channels - widths.get(group.name, group.channels)) // group.blocks
        if doomed > 0:
            groups.cut(group, _in_every_block(torch.arange(doomed), group))
    return copied


def _by_unit(score: Tensor, group: CoupledGroup) -> Tensor:
    return score.view(group.blocks, -1).mean(dim=0)


def _in_every_block(units: Tensor, group: CoupledGroup) -> list[int]:
    size = group.channels // group.blocks
    return [int(unit) + block * size for block in range(group.blocks) for unit in units]


def _ratios_by_group(stage: PruneStage, groups: Sequence[CoupledGroup], layers: Sequence[str]) -> dict[str, float]:
    """Each group's own ratio, of `layer_ratios`. Raises ConfigurationError where globs do not fit the model."""
    matching(stage.layer_ratios, layers, field="layer_ratios")
    found: dict[str, tuple[str, float]] = {}
    for pattern, ratio in stage.layer_ratios.items():
        matched = [group for group in groups if fnmatch.filter(group.producers, pattern)]
        if not matched:
            raise ConfigurationError(
                f"stage {stage.id}: layer_ratios: '{pattern}' names only layers that keep their channels "
                "(the classifier, exclude, or what they are added to); take it out"
            )
        for group in matched:
            other, before = found.setdefault(group.name, (pattern, ratio))
            if before != ratio:
                raise ConfigurationError(
                    f"stage {stage.id}: layer_ratios: '{other}' and '{pattern}' give different ratios to channels that "
                    f"can only go together ({', '.join(group.producers)}); give them one ratio"
                )
    return {name: ratio for name, (_, ratio) in found.items()}


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
