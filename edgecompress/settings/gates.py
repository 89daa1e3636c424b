"""Gates: what must hold for a run's models to ship, as run.json records it and as a sentence says it.

What enters: accuracies, speeds, and the limits that recipe and target set. What leaves: `Gate` rows of the manifest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgecompress.run_directory import Json
from edgecompress.settings.target import SPEED_BUDGET

EXPORT_COMPLETE = "export_complete"


@dataclass(frozen=True)
class Gate:
    """One thing that must hold. `sentence` says in words what was found; `subject` is the stage it is about."""

    gate: str
    value: float | bool | None
    limit: float | bool | None
    passed: bool
    sentence: str
    step: Literal["apply", "export"]
    target: str | None = None
    subject: str | None = None

    def to_dict(self) -> Json:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def record_gates(manifest: Json, gates: list[Gate], *, step: str, target: str | None = None) -> None:
    """Replace the gates of a step (and target) by new ones."""
    others = [g for g in manifest.setdefault("gates", []) if not (g["step"] == step and g["target"] == target)]
    manifest["gates"] = [*others, *(gate.to_dict() for gate in gates)]


def record_begun_export(manifest: Json, target: str) -> None:
    """Say that an export for a target replaces its files: what was found about the earlier ones holds no longer.

    Until the export records its own gates, the one that stands in their place is missed.
    """
    sentence = (
        f"The last export for {target} was begun and not completed: its files may be of two exports, and no parity "
        "was checked on them; give the export again."
    )
    gate = Gate(EXPORT_COMPLETE, False, True, False, sentence, step="export", target=target)
    record_gates(manifest, [gate], step="export", target=target)
    manifest.setdefault("exports", {}).pop(target, None)


def begun_exports(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The targets whose last export was not completed, each with the sentence that says so."""
    return {
        str(gate.get("target")): str(gate.get("sentence"))
        for gate in manifest.get("gates") or []
        if gate.get("gate") == EXPORT_COMPLETE and gate.get("passed") is False
    }


def missed_gates(
    manifest: Mapping[str, Any], target: str | None = None, *, without_speed_on: Collection[str] = ()
) -> list[str]:
    """Sentences of the gates that were missed, for all targets or for one (and those that hold for every target).

    `without_speed_on` names targets whose profile judges speed, longer measured than what chose the placement.
    """
    sentences = []
    for gate in manifest.get("gates") or []:
        if gate.get("passed") is not False or (target is not None and gate.get("target") not in (None, target)):
            continue
        if gate.get("gate") == SPEED_BUDGET and gate.get("target") in without_speed_on:
            continue
        sentences.append(str(gate.get("sentence") or f"Gate missed: {gate.get('gate', 'gate')}."))
    return sentences


def allows_drop(limit: float, drop: float) -> bool:
    """Whether accuracy drops by no more than its limit, both fractions, as measured on the images at hand.

    A difference of two fractions is not exact: 0.98 less 0.96 is a little more than 0.02.
    """
    return drop <= limit + 1e-12


def accuracy_gate(value: float, baseline: Json, limit: float, stage_id: str) -> Gate:
    """The gate on an accuracy against the recipe's first model: a fixed line, on the value and not on its interval."""
    drop = float(baseline["accuracy"]) - value
    return Gate(
        gate="max_accuracy_drop",
        value=drop,
        limit=limit,
        passed=allows_drop(limit, drop),
        sentence=(
            f"Stage {stage_id} has accuracy {value:.2%}, {drop * 100:.2f} points below the {baseline['id']} model's "
            f"{baseline['accuracy']:.2%} (limit {limit * 100:g} points, gates.max_accuracy_drop)."
        ),
        step="apply",
        subject=stage_id,
    )


def speed_gate(measured: Json, target: str, budget: float | None) -> Gate | None:
    """The gate on int8's speed against fp32; None where nobody asks, or where the interval holds the limit.

    Slower than fp32 is what it is about: a target's wish for more than that is judged by its profile.
    """
    if budget is None:
        return None
    limit, (low, high) = min(budget, 1.0), measured["speedup_ci95"]
    if low < limit <= high:
        return None
    ratio = float(measured["speedup"])
    return Gate(
        gate=SPEED_BUDGET,
        value=ratio,
        limit=limit,
        passed=low >= limit,
        sentence=(
            f"fp32 takes {ratio:.3g} times as long as int8 on {target} (95 % interval {low:.3g} to {high:.3g}; "
            f"at least {limit:g}, budgets.{SPEED_BUDGET})."
        ),
        step="apply",
        target=target,
    )
