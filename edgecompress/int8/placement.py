"""Which layers run on integers: candidates by predicted cost and noise, and the choice among those that were tried.

What enters: each layer's cost in either form, the cost of changing form, each layer's noise. What leaves: placements
worth a trial, and of the trials the front and the choice. Nothing is measured here. A placement's predicted cost is a
sum along the layers in the order in which they run, so the best one is found exactly by dynamic programming; changes of
form cost something, so layers in one form stay together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
Answer = Literal["met", "missed", "inconclusive"]

# A profile is a rough guide: what a change of form costs, and how int8 kernels compare when they stand alone.
# Candidates are made for several beliefs about both; which of them is right is measured.
_CHANGE_FACTORS = (1.0, 0.5, 2.0, 4.0)
_INT8_FACTORS = (1.0, 0.8, 1.25)
_WEIGHTS_PER_DECADE = 3
_DECADES = 6


@dataclass(frozen=True)
class LayerCost:
    """One layer in order of execution: its cost in float and in int8 (ms, or bytes), that of a change of form behind
    it, and its noise alone in int8. `may_be_int8` is False for a layer that has no integer kernel or is excluded."""

    layer: str
    float_cost: float
    int8_cost: float
    change_cost: float
    noise: float = 0.0
    may_be_int8: bool = True


@dataclass(frozen=True)
class Candidate:
    """A placement to try: the layers that leave int8, with the predicted cost and noise."""

    float_layers: tuple[str, ...]
    cost: float
    noise: float


@dataclass(frozen=True)
class Limits:
    """What a placement must hold, as fractions, on held-out images; None where nothing is asked."""

    max_accuracy_drop: float | None
    min_agreement: float | None

    def judge(self, trial: Json) -> Answer:
        """Whether a trial is accurate enough by its 95 % intervals; inconclusive where one of them holds a limit.

        A trial without intervals is judged by its numbers alone.
        """
        answers: set[Answer] = set()
        drop, agreement = _ends(trial, "accuracy_drop"), _ends(trial, "agreement")
        if self.max_accuracy_drop is not None and drop is not None:
            answers.add(_answer(-drop[1], -drop[0], -self.max_accuracy_drop))
        if self.min_agreement is not None and agreement is not None:
            answers.add(_answer(*agreement, self.min_agreement))
        return "missed" if "missed" in answers else "inconclusive" if "inconclusive" in answers else "met"

    def met_by(self, trial: Json) -> bool:
        """Whether a trial's numbers are good enough: the best guess where `judge` leaves it open."""
        drop, agreement = trial.get("accuracy_drop"), trial.get("agreement")
        if self.max_accuracy_drop is not None and drop is not None and drop > self.max_accuracy_drop + 1e-12:
            return False
        return self.min_agreement is None or agreement is None or agreement >= self.min_agreement - 1e-12


def _ends(trial: Json, key: str) -> tuple[float, float] | None:
    low_high = trial.get(f"{key}_ci95") or [trial.get(key)] * 2
    return None if low_high[0] is None else (float(low_high[0]), float(low_high[1]))


def _answer(low: float, high: float, least: float) -> Answer:
    """Where an interval lies against what is asked for at least."""
    return "met" if low >= least - 1e-12 else "missed" if high < least - 1e-12 else "inconclusive"


def candidates(costs: Sequence[LayerCost], *, by_noise: bool) -> list[Candidate]:
    """Placements worth a trial, the cheapest first; full int8 and full float are not among them.

    With `by_noise`, noise is given a price that rises until no layer is left in int8: each price's best placement
    has the least noise for its cost (the lower hull of the front).
    """
    if not costs:
        return []
    prices = [0.0]
    total = sum(cost.noise for cost in costs)
    if by_noise and total > 0:
        scale = sum(max(cost.float_cost, cost.int8_cost) for cost in costs) / total
        steps = range(-_DECADES * _WEIGHTS_PER_DECADE // 2, _DECADES * _WEIGHTS_PER_DECADE // 2 + 1)
        prices += [scale * 10 ** (step / _WEIGHTS_PER_DECADE) for step in steps]
    found: dict[tuple[str, ...], Candidate] = {}
    for price in prices:
        # Where noise decides, its price moves the border anyway; the beliefs would only make near-copies.
        beliefs = itertools.product(_CHANGE_FACTORS, _INT8_FACTORS) if price == 0 else [(1.0, 1.0), (4.0, 1.0)]
        for change_factor, int8_factor in beliefs:
            forms = _best_forms(costs, price=price, change_factor=change_factor, int8_factor=int8_factor)
            candidate = _candidate(costs, forms)
            may = [cost.layer for cost in costs if cost.may_be_int8]
            if candidate.float_layers and set(candidate.float_layers) != set(may):
                found.setdefault(candidate.float_layers, candidate)
    return sorted(found.values(), key=lambda candidate: (candidate.cost, candidate.noise))


def _best_forms(costs: Sequence[LayerCost], *, price: float, change_factor: float, int8_factor: float) -> list[bool]:
    """For each layer whether it is int8, such that cost + price * noise is least (Viterbi over two states)."""
    infinite = float("inf")
    best = {False: 0.0, True: 0.0}
    choices: list[dict[bool, bool]] = []
    for index, cost in enumerate(costs):
        own = {
            False: cost.float_cost,
            True: cost.int8_cost * int8_factor + price * cost.noise if cost.may_be_int8 else infinite,
        }
        change = costs[index - 1].change_cost * change_factor if index else 0.0
        came_from = {form: min((False, True), key=lambda old: best[old] + change * (old != form)) for form in own}
        best = {form: own[form] + best[came_from[form]] + change * (came_from[form] != form) for form in own}
        choices.append(came_from)
    form = min(best, key=best.__getitem__)
    forms = []
    for came_from in reversed(choices):
        forms.append(form)
        form = came_from[form]
    return forms[::-1]


def _candidate(costs: Sequence[LayerCost], forms: Sequence[bool]) -> Candidate:
    pairs = list(zip(costs, forms, strict=True))
    cost = sum(layer.int8_cost if is_int8 else layer.float_cost for layer, is_int8 in pairs)
    changes = zip(costs, forms[:-1], forms[1:], strict=False)
    cost += sum(layer.change_cost for layer, before, after in changes if before != after)
    return Candidate(
        float_layers=tuple(layer.layer for layer, is_int8 in pairs if not is_int8 and layer.may_be_int8),
        cost=cost,
        noise=sum(layer.noise for layer, is_int8 in pairs if is_int8),
    )


def first_accurate(ordered: Sequence[Candidate], is_accurate: Callable[[Candidate], bool]) -> int:
    """Index of the first candidate that is accurate enough, found by bisection; len(ordered) where none is.

    `ordered` goes from the most noise to the least, along which accuracy rises, but for chance.
    """
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        if is_accurate(ordered[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def front(trials: Sequence[Json]) -> list[Json]:
    """Trials that no other beats in latency and agreement at once, the fastest first.

    Where latency was not measured the predicted cost takes its place.
    """
    kept: list[Json] = []
    for trial in sorted(trials, key=lambda trial: (_speed(trial), -(trial.get("agreement") or 0.0))):
        if not kept or (trial.get("agreement") or 0.0) > (kept[-1].get("agreement") or 0.0):
            kept.append(trial)
    return kept


def choose(
    trials: Sequence[Json], *, limits: Limits, optimize: Literal["latency", "size"], needs_speed: bool
) -> tuple[Json, str]:
    """The trial to use and why, in words. The first trial is full int8.

    Of those that are accurate enough beyond doubt (and, with `needs_speed`, not slower than fp32 beyond doubt) the
    fastest or the smallest; where there is none, of those whose numbers are good enough; else full int8.
    """
    full = trials[0]
    accurate = [trial for trial in trials if limits.met_by(trial)]
    usable = [trial for trial in accurate if not needs_speed or not is_slower(trial)]
    sure = [trial for trial in usable if limits.judge(trial) == "met"]
    if usable:
        among = sure or usable
        best = min(among, key=_speed if optimize == "latency" else lambda trial: (trial["size_bytes"], _speed(trial)))
        certainty = "accurate enough" if sure else "accurate enough by its numbers, which is inconclusive"
        return best, f"{certainty}, and of {len(among)} such placements the one with the least {optimize}"
    if len(trials) == 1:
        return full, "the runtime's profile promises nothing from any other placement"
    if accurate:
        return full, f"none of {len(accurate)} placements that are accurate enough is as fast as fp32"
    is_open = any(limits.judge(trial) == "inconclusive" for trial in trials)
    doubt = ", though for some that is inconclusive" if is_open else ""
    return full, f"none of {len(trials)} placements is accurate enough{doubt}"


def is_slower(trial: Json) -> bool:
    """Whether the whole interval says that fp32 is faster."""
    return trial.get("speedup") is not None and bool(trial["speedup_ci95"][1] < 1)


def is_faster(trial: Json) -> bool:
    """Whether the whole interval says that this placement is faster than fp32."""
    return trial.get("speedup") is not None and bool(trial["speedup_ci95"][0] > 1)


def _speed(trial: Json) -> float:
    """Time against fp32, or the predicted cost where it was not measured."""
    speedup = trial.get("speedup")
    return 1.0 / speedup if speedup else float(trial["predicted"])
