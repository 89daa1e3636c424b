"""May I ship this? The verdict, the budgets against what was measured, and the reasons.

What enters: the manifest, parity and profile of a run. What leaves: the facts of the page's first question: what is bad
comes first, whether or not it misses a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecompress.reporting import summary, value_text
from edgecompress.reporting.fact_rows import command_text, run_words, sayings
from edgecompress.reporting.report_gain import baseline_and_last
from edgecompress.reporting.report_trust import class_rows, layer_notes
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.value_text import number
from edgecompress.run_directory import RunDirectory
from edgecompress.settings.gates import allows_drop, missed_gates
from edgecompress.settings.target import SPEED_BUDGET

# A class that lost this much accuracy, and more than one image, is said first.
LOUD_CLASS_DROP = 0.10
_STATUS_MEANS = {
    **dict.fromkeys(("met", "passed", "ok", "within"), True),
    **dict.fromkeys(("missed", "failed", "exceeded", "not met", "over"), False),
}


def decision_facts(
    run: RunDirectory, manifest: Json, parity: Json | None, profile: Json | None, target: str
) -> dict[str, Any]:
    """The verdict with its headline, what must be said before anything else, the reasons, and the budgets."""
    facts = profile or {}
    gates = [gate for gate in entries(manifest, "gates") if gate.get("target") in (None, target)]
    judged = [target] if facts.get("measured") else []  # its own verdict on speed stands, among its budgets
    if judged:
        gates = [gate for gate in gates if gate.get("gate") != SPEED_BUDGET]
    budgets = budget_rows(facts, summary.stage_rows(manifest))
    failed_stages = [stage for stage in entries(manifest, "stages") if stage.get("status") == "failed"]
    broken = [f"Stage {stage.get('id')} failed: {stage.get('error') or 'no reason given'}" for stage in failed_stages]
    if manifest.get("status") == "failed" and not failed_stages:
        broken.append("The run failed before it was done.")
    missed = missed_gates(manifest, target, without_speed_on=judged) + _parity_misses(parity or {})
    if facts.get("verdict") != "hold":  # otherwise the profile's own reasons name the budgets
        missed += [f"Budget missed: {budget['label']}." for budget in budgets if budget["met"] is False]
    verdict, reasons = summary.judge(profile, missed=broken + missed)
    headlines = {
        "ship": _all_met(gates, budgets, target),
        "hold": f"Not on {target} as it is.",
        "inconclusive": f"What was measured on {target} does not decide it.",
        "unmeasured": f"Nothing was measured on {target}, so there is no latency to judge by.",
    }
    slower = summary.slower_sentences(manifest, [facts] if facts else [])
    resume = [*run_words(manifest, target), "--output", str(run.path), "--resume"]
    return {
        "verdict": verdict,
        "label": {"ship": "Ship", "hold": "Hold", "inconclusive": "Inconclusive", "unmeasured": "Not measured"}[
            verdict
        ],
        "headline": " ".join([*(text[0].upper() + text[1:] for text in slower), headlines[verdict]]),
        "notes": loud_notes(manifest) + _loud_facts(parity or {}, facts),
        "reasons": list(dict.fromkeys(sayings(reasons))),
        "resume": command_text(*resume) if failed_stages or manifest.get("status") == "failed" else None,
        "budgets": budgets,
    }


def _all_met(gates: Sequence[Json], budgets: Sequence[Json], target: str) -> str:
    met = {
        "gate": [gate.get("passed") is True for gate in gates],
        "budget": [budget["met"] is True for budget in budgets],
    }
    texts = [f"{sum(marks)} {noun}{'' if sum(marks) == 1 else 's'}" for noun, marks in met.items() if any(marks)]
    open_ones = sum(not mark for marks in met.values() for mark in marks)
    subject = (
        f"{open_ones} of what was asked for could not be checked; the rest" if open_ones else "Everything asked for"
    )
    return f"{subject} is met on {target}" + (f": {' and '.join(texts)}." if texts else ".")


def _parity_misses(parity: Json) -> list[str]:
    misses = sayings(parity.get("failures"))
    if parity.get("constant_predictions") and not misses:
        misses.append("Parity: the model predicts one class for every image, so agreement means nothing.")
    for key, name in (("onnx_fp32", "fp32"), ("onnx_int8", "int8")):
        if section(parity, key).get("passed") is False and not misses:
            misses.append(f"Parity: the {name} ONNX file does not agree closely enough.")
    return misses


def loud_notes(manifest: Json) -> list[str]:
    """The run's notes that come before anything else: all but those that only describe the data or single layers."""
    quiet = [*sayings(section(manifest, "data").get("notes")), *layer_notes(manifest)]
    return [note for note in sayings(manifest.get("notes")) if note not in quiet]


def _loud_facts(parity: Json, profile: Json) -> list[str]:
    """What must be said first whether or not it misses a gate: a slower int8, a class that got much worse."""
    facts = []
    speed = summary.speed_sentence(profile)
    if speed and "slower" in speed and not any("slower" in str(reason) for reason in profile.get("reasons") or []):
        facts.append(speed)
    loud = [c for c in class_rows(parity) if c["delta"] <= -LOUD_CLASS_DROP and -c["delta"] * (c["samples"] or 0) > 1.5]
    if loud:
        names = ", ".join(f"{c['name']} ({value_text.points_text(100 * c['delta'])})" for c in loud[:3])
        more = f" and {len(loud) - 3} more" if len(loud) > 3 else ""
        points = f"{100 * LOUD_CLASS_DROP:.0f} points"
        facts.append(f"int8 loses {points} of accuracy or more on {len(loud)} of the classes: {names}{more}.")
    return facts


def budget_rows(profile: Json, stages: Sequence[Json]) -> list[dict[str, Any]]:
    """Each budget of the target with what was found, its interval, and whether it is `met` (None: open).

    The profile's own list is used where it has one; else the target's budgets are set against what was measured.
    """
    given = entries(profile, "budgets")
    wanted = {str(row.get("budget", "budget")): row.get("limit") for row in given} or {
        name: limit for name, limit in section(profile, "target_facts", "budgets").items() if limit is not None
    }
    statuses = {str(row.get("budget", "budget")): row for row in given}
    rows = []
    for name, limit in wanted.items():
        value, interval = _found(name, profile, stages)
        own = statuses.get(name, {})
        value, interval = own.get("value", value), own.get("ci95", interval)
        status = str(own.get("status") or _budget_status(name, limit, value, interval)).replace("_", " ")
        row = {"name": name, "label": value_text.label_text(name), "limit": limit, "value": value, "ci95": interval}
        rows.append({**row, "status": status, "met": _STATUS_MEANS.get(status)})
    return rows


def _found(name: str, profile: Json, stages: Sequence[Json]) -> tuple[Any, Any]:
    """What was found for a budget, and its interval or range; the model judged is int8 where there is one."""
    model = section(profile, "models", "int8") or section(profile, "models", "fp32")
    if name == "min_int8_speedup":
        speedup = section(profile, "int8_speedup")
        return speedup.get("ratio"), speedup.get("ci95")
    if name == "max_accuracy_drop" and "accuracy_drop" in profile:  # of the file itself, which the stage's may not be
        return number(profile["accuracy_drop"]), None
    if name == "max_accuracy_drop":
        ends = baseline_and_last(stages)
        points = number(ends[1]["accuracy_delta_points"]) if ends else None
        return None if points is None else -points / 100, None
    if name.startswith("latency_ms_"):
        latency, percentile = section(model, "latency_ms"), name.removeprefix("latency_ms_")
        return latency.get(percentile), latency.get(f"{percentile}_ci95")
    return model.get(name), model.get(f"{name}_range")


def _budget_status(name: str, limit: Any, value: Any, interval: Any) -> str:
    """`missed` only when the whole interval lies beyond the limit, `open` when it straddles it."""
    bound, found = number(limit), number(value)
    if bound is None or found is None:
        return "not measured"
    if name == "max_accuracy_drop":
        return "met" if allows_drop(bound, found) else "missed"
    ends = [number(end) for end in interval] if isinstance(interval, (list, tuple)) and len(interval) == 2 else []
    known = [end for end in ends if end is not None] or [found]
    low, high = min(known), max(known)
    if name.startswith("min_"):
        low, high, bound = -high, -low, -bound
    return "missed" if low > bound else "open" if high > bound else "met"
