"""What each coupled group of channels is worth: loss, MACs and latency against the share of it that is removed.

What enters: a float module, images to settle batch norm on and held-out images to judge with. What leaves: one row a
group, and from the rows a share for each layer that together remove a share of the MACs where it costs least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.errors import PruningError
from edgecompress.measure.latency_trial import LatencyShare
from edgecompress.models.complexity import measure_complexity
from edgecompress.models.model_building import copy_of
from edgecompress.pruning.prune import ChannelPruner, reestimate_batch_norm, with_widths
from edgecompress.settings.prune_settings import STRUCTURED_TARGETS, PruneStage
from edgecompress.training.evaluate import accuracy

RATIOS = (0.25, 0.5, 0.75)
_BISECTIONS = 12
_BATCH = 64


@dataclass(frozen=True)
class Point:
    """One group cut by `ratio` (`removed` after rounding), batch norm settled anew, nothing finetuned."""

    ratio: float
    removed: float
    accuracy: float
    loss_increase: float
    removed_macs: float
    removed_params: float
    latency: LatencyShare | None = None


@dataclass(frozen=True)
class GroupSensitivity:
    """One coupled group: the layers that lose channels together, and a point for each ratio."""

    group: str
    layers: tuple[str, ...]
    channels: int
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def ratio_within(self, loss: float) -> float:
        """The largest ratio at which the loss stays within `loss`, between the measured ones along straight lines."""
        last = (0.0, 0.0)
        highest = 0.0
        for point in self.points:
            highest = max(highest, point.loss_increase)  # a cut further can only look better by luck
            if highest > loss:
                span = highest - last[1]
                share = 0.0 if span <= 0 else (loss - last[1]) / span
                return last[0] + max(0.0, share) * (point.ratio - last[0])
            last = (point.ratio, highest)
        return last[0]


class ChannelSensitivity:
    """Measures one module's groups; `settle` are normalized training batches, `images` and `labels` are held out."""

    def __init__(
        self,
        module: nn.Module,
        *,
        stage: PruneStage,
        channel_multiple: int,
        example: Tensor,
        settle: Sequence[tuple[Tensor, Tensor]],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self.module, self.stage, self.multiple, self.example = copy_of(module), stage, channel_multiple, example
        self.settle, self.images, self.labels = settle, images, labels
        self.pruner = self._pruner(self.module, {})
        self.before = measure_complexity(self.module, example)
        self.accuracy, self.loss = self._judge(self.module)

    def _pruner(self, module: nn.Module, ratios: Mapping[str, float]) -> ChannelPruner:
        """A pruner that cuts these groups by these shares, and no other."""
        no_target = dict.fromkeys(STRUCTURED_TARGETS)
        exact = {_exact(name): ratio for name, ratio in ratios.items()}
        stage = self.stage.model_copy(update={**no_target, "layer_ratios": exact})
        return ChannelPruner(
            module,
            stage=stage,
            channel_multiple=self.multiple,
            example=self.example,
            scoring_batches=self.settle,
        )

    def measure(
        self,
        *,
        latency_of: Callable[[nn.Module], LatencyShare] | None,
        on_point: Callable[[], None] = lambda: None,
    ) -> list[GroupSensitivity]:
        """A row a group, in the model's order. Latency is measured at the middle ratio, where `latency_of` is given."""
        scored = self.pruner.score()
        rows = []
        for name, group in self.pruner.initial.items():
            points: list[Point] = []
            for ratio in RATIOS:
                module = copy_of(self.module)
                pruner = self._pruner(module, {name: ratio})
                widths = pruner.plan(0.0, scored)
                on_point()
                if name not in scored or widths[name] == group.channels:
                    continue
                pruner.cut_to(widths, scored)
                reestimate_batch_norm(module, (images for images, _ in self.settle))
                after = measure_complexity(module, self.example)
                found, loss = self._judge(module)
                timed = latency_of(module) if latency_of is not None and ratio == RATIOS[len(RATIOS) // 2] else None
                points.append(
                    Point(
                        ratio=ratio,
                        removed=1 - widths[name] / group.channels,
                        accuracy=found,
                        loss_increase=loss - self.loss,
                        removed_macs=1 - after.macs / self.before.macs,
                        removed_params=1 - after.params / self.before.params,
                        latency=timed,
                    )
                )
            rows.append(GroupSensitivity(name, group.producers, group.channels, tuple(points)))
        return rows

    def _judge(self, module: nn.Module) -> tuple[float, float]:
        """Accuracy and mean cross-entropy on the held-out images."""
        with torch.inference_mode():
            logits = torch.cat([module(batch) for batch in torch.split(self.images, _BATCH)])
        return accuracy(logits, self.labels), float(functional.cross_entropy(logits, self.labels))

    def propose(self, rows: Sequence[GroupSensitivity], macs_ratio: float) -> tuple[dict[str, float], float]:
        """A share for each group at which every cut alone costs the same loss, and the MACs that they remove together.

        The least such loss that removes `macs_ratio` of the MACs. Raises PruningError where the measured shares do not
        remove as much.
        """
        most = max([0.0, *(point.loss_increase for row in rows for point in row.points)])
        if self._removed(rows, most) < macs_ratio:
            raise PruningError(
                f"no shares to propose: with every group cut as far as was measured, {self._removed(rows, most):.1%} "
                f"of the MACs go, and {macs_ratio:.1%} are asked for; lower --macs-ratio"
            )
        low, high = 0.0, most
        for _ in range(_BISECTIONS):
            middle = math.sqrt(max(low, most * 1e-6) * high)  # losses span orders of magnitude
            if self._removed(rows, middle) >= macs_ratio:
                high = middle
            else:
                low = middle
        ratios = {row.group: round(row.ratio_within(high), 4) for row in rows}
        return {name: ratio for name, ratio in ratios.items() if ratio > 0}, self._removed(rows, high)

    def _removed(self, rows: Sequence[GroupSensitivity], loss: float) -> float:
        ratios = {row.group: round(row.ratio_within(loss), 4) for row in rows}
        if not any(ratios.values()):
            return 0.0
        widths = self._pruner(copy_of(self.module), ratios).plan(0.0, {})
        after = measure_complexity(with_widths(self.module, self.example, self.pruner.protected, widths), self.example)
        return 1 - after.macs / self.before.macs


def _exact(name: str) -> str:
    """A glob that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
