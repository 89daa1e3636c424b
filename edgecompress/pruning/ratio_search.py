"""How many channels each group keeps, so that a share of the MACs, the parameters or the latency goes.

What enters: a pruner with its scores, and the share to remove. What leaves: the mildest plan found that removes it.
MACs and parameters are counted on copies; latency is measured, plan by plan, because MACs are not speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from edgecompress import console
from edgecompress.errors import PruningError
from edgecompress.measure.latency_trial import LatencyShare
from edgecompress.models.complexity import Complexity, measure_complexity
from edgecompress.pruning.prune import ChannelPruner, Widths, with_widths

Json = dict[str, Any]
LatencyOf = Callable[[nn.Module], LatencyShare]
"""How long a candidate takes, as a share of the model before the cut."""

# A latency within this of what was asked for is near enough: measuring closer would take minutes.
_LATENCY_TOLERANCE = 0.02
_LATENCY_TRIALS = 6
_BISECTIONS = 12
_GIVE_BACKS = 16
EXPECTED_COUNTS = 12  # of plans, before one is settled on
_MOST = 0.9999  # of every group, down to its floor


@dataclass(frozen=True)
class Plan:
    """Channels that each group keeps, what that removes of the model before, and what was tried on the way."""

    widths: Widths
    removed_macs: float
    removed_params: float
    latency: LatencyShare | None = None
    trials: list[Json] = field(default_factory=list)

    def removed(self, what: str) -> float:
        """The share of the MACs, the params or the latency that this plan removes."""
        if what == "latency":
            assert self.latency is not None
            return 1 - self.latency.share
        return self.removed_macs if what == "macs" else self.removed_params

    def to_dict(self) -> Json:
        latency = None if self.latency is None else self.latency.to_dict()
        removed = {"removed_macs": self.removed_macs, "removed_params": self.removed_params}
        return {"widths": self.widths, **removed, "latency": latency, "trials": self.trials}


class RatioSearch:
    """Plans of one pruner, each counted once."""

    def __init__(
        self, pruner: ChannelPruner, scored: Mapping[str, Tensor], *, on_count: Callable[[], None] = lambda: None
    ) -> None:
        """`on_count` is called before a plan is counted, which takes seconds for a large network."""
        self.pruner = pruner
        self.scored = scored
        self._on_count = on_count
        self.before: Complexity = measure_complexity(pruner.module, pruner.example)
        self._known: dict[tuple[int, ...], Plan] = {}

    def counted(self, widths: Widths) -> Plan:
        """The plan with its MACs and parameters counted."""
        key = tuple(widths.values())
        if key not in self._known:
            self._on_count()
            after = measure_complexity(self.module_of(widths), self.pruner.example)
            self._known[key] = Plan(widths, 1 - after.macs / self.before.macs, 1 - after.params / self.before.params)
        return self._known[key]

    def module_of(self, widths: Widths) -> nn.Module:
        """A copy of the module of this shape; its weights mean nothing."""
        return with_widths(self.pruner.module, self.pruner.example, self.pruner.protected, widths)

    def plan(self, ratio: float) -> Plan:
        """The plan of this channel ratio, counted."""
        return self.counted(self.pruner.plan(ratio, self.scored))

    def reaching(self, what: str, share: float) -> Plan:
        """The mildest plan that removes at least `share` of the MACs or the params. Raises PruningError."""
        below, above = self.plan(0.0), self.plan(_MOST)
        if below.removed(what) >= share:  # layer_ratios alone reach it
            return below
        if above.removed(what) < share:
            raise self._unreachable(what, share, above)
        low, high = 0.0, _MOST
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            plan = self.plan(middle)
            if plan.removed(what) >= share:
                high, above = middle, plan
            else:
                low, below = middle, plan
        return self._between(below, above, what, share)

    def _between(self, below: Plan, above: Plan, what: str, share: float) -> Plan:
        """Where groups change together between two plans: only as many as it takes, the least important first."""
        changed = sorted(
            (name for name in above.widths if above.widths[name] < below.widths[name]), key=self._loss_of(below, above)
        )
        fewest, most = 0, len(changed)
        best = above
        while most - fewest > 1:
            middle = (fewest + most) // 2
            some = {name: above.widths[name] for name in changed[:middle]}
            plan = self.counted({**below.widths, **some})
            if plan.removed(what) >= share:
                most, best = middle, plan
            else:
                fewest = middle
        # Some of these cost channels and bring little: give back what the share does not need, the best first.
        for name in reversed(changed[:most][-_GIVE_BACKS:]):
            plan = self.counted({**best.widths, name: below.widths[name]})
            best = plan if plan.removed(what) >= share else best
        return best

    def _loss_of(self, below: Plan, above: Plan) -> Callable[[str], float]:
        """The mean score of the units that a group loses between two plans."""

        def loss(name: str) -> float:
            if name not in self.scored:
                return 0.0
            blocks = self.pruner.initial[name].blocks
            ordered = self.scored[name].sort().values
            total = self.pruner.initial[name].channels
            first, last = (total - below.widths[name]) // blocks, (total - above.widths[name]) // blocks
            return float(ordered[first:last].mean())

        return loss

    def reaching_latency(self, share: float, latency_of: LatencyOf) -> Plan:
        """The mildest plan measured that removes at least `share` of the latency. Raises PruningError.

        Plans are those of MACs: the first removes `share` of them, the next ones follow the chord through what was
        measured. Stops within two points of `share`, or after six plans.
        """
        measured: dict[float, Plan] = {}
        trials: list[Json] = []
        most = self.plan(_MOST)
        low, high = (0.0, 0.0), (most.removed_macs, 1.0)  # (share of MACs, share of latency) below and above
        best: Plan | None = None
        wanted = min(share, most.removed_macs)
        with console.progress("measuring plans", _LATENCY_TRIALS) as advance:
            for _ in range(_LATENCY_TRIALS):
                plan = self.reaching("macs", wanted)
                if plan.removed_macs in measured:
                    break  # the plans here lie no closer together
                latency = latency_of(self.module_of(plan.widths))
                plan = Plan(plan.widths, plan.removed_macs, plan.removed_params, latency)
                measured[plan.removed_macs] = plan
                trials.append({"removed_macs": plan.removed_macs, "latency": latency.to_dict()})
                reached = plan.removed("latency")
                advance(1, f"{plan.removed_macs:.1%} of the MACs less, {reached:.1%} of the latency")
                if reached >= share:
                    high = (plan.removed_macs, reached)
                    best = plan if best is None or plan.removed_macs < best.removed_macs else best
                    if reached - share <= _LATENCY_TOLERANCE:
                        break
                elif plan.removed_macs >= most.removed_macs - 1e-9:
                    raise self._unreachable("latency", share, plan)
                else:
                    low = max(low, (plan.removed_macs, reached))
                wanted = _on_chord(low, high, share + _LATENCY_TOLERANCE / 2)
                if best is None and len(trials) >= _LATENCY_TRIALS - 1:
                    wanted = most.removed_macs
        if best is None:
            best = max(measured.values(), key=lambda plan: plan.removed("latency"))
            raise self._unreachable("latency", share, best)
        return Plan(best.widths, best.removed_macs, best.removed_params, best.latency, trials)

    def _unreachable(self, what: str, share: float, most: Plan) -> PruningError:
        stage, pruner = self.pruner.stage, self.pruner
        noun = {"macs": "MACs", "params": "parameters", "latency": "latency"}[what]
        limits = [f"max_layer_ratio {stage.max_layer_ratio:g}", f"channel counts in multiples of {pruner.multiple}"]
        if stage.exclude:
            limits.append(f"exclude ({', '.join(stage.exclude)})")
        if stage.layer_ratios:
            limits.append(f"layer_ratios of {len(stage.layer_ratios)} layers")
        if pruner.unscored:
            limits.append(f"{len(pruner.unscored)} groups without batch norm, which bn_scale cannot rank")
        return PruningError(
            f"stage {stage.id}: {what}_ratio {share:g} cannot be reached: at most {most.removed(what):.1%} of the "
            f"{noun} can be removed, limited by {', '.join(limits)}; ask for less, or loosen one of these"
        )


def _on_chord(low: tuple[float, float], high: tuple[float, float], share: float) -> float:
    """The share of MACs at which the line between two measured points removes `share` of the latency."""
    if high[1] - low[1] < 1e-6:
        return high[0]
    place = low[0] + (high[0] - low[0]) * (share - low[1]) / (high[1] - low[1])
    margin = 0.05 * (high[0] - low[0])  # or the search would crawl along one end
    return min(max(place, low[0] + margin), high[0] - margin)
