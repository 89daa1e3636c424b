"""A run's files in, the facts of one target's report out, in the order in which the page asks its questions.

What enters: run.json, export/parity.json and profile/<target>.json of a run directory, of which the last two may be
missing. What leaves: one JSON-able document. The pages are rendered from it and hold no logic of their own, so HTML,
Markdown and JSON cannot differ in what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecompress.reporting import figures, summary
from edgecompress.reporting.report_evidence import (
    class_rows,
    command_text,
    loud_notes,
    making_facts,
    run_words,
    sayings,
    time_facts,
    trust_facts,
)
from edgecompress.reporting.summary import Json, entries, number, section
from edgecompress.run_directory import RunDirectory, read_json
from edgecompress.settings.target import SPEED_BUDGET

# A class that lost this much accuracy, and more than one image, is said first.
LOUD_CLASS_DROP = 0.10
_STATUS_MEANS = {
    **dict.fromkeys(("met", "passed", "ok", "within"), True),
    **dict.fromkeys(("missed", "failed", "exceeded", "not met", "over"), False),
}


def report_document(run: RunDirectory, target: str) -> dict[str, Any]:
    """The facts that both pages are rendered from, as JSON: numbers raw, sentences composed, in the page's order.

    A parity or profile file that does not exist is named under `missing` with the command that makes it. Raises
    RunError when `run` is no run directory, or when a file in it cannot be read.
    """
    manifest = run.read_manifest()
    parity = _read_if_there(run.export_for(target) / "parity.json")
    profile = _read_if_there(run.profile_path(target))
    stages = summary.stage_rows(manifest)
    recipe = section(manifest, "recipe")
    return {
        "title": f"{manifest.get('recipe_name', 'run')} on {target}",
        "target": target,
        "run": str(run.path),
        "subject": _subject(manifest, recipe),
        "decision": _decision(run, manifest, parity, profile, target),
        "missing": _missing(run, target, parity, profile),
        "gain": {
            "sentence": gain_sentence(stages),
            "speed": summary.speed_sentence(profile or {}),
            "changes": _changes(stages, profile or {}),
            "stages": [_stage(row) for row in stages],
            "models": summary.model_rows(profile or {}),
            "model_columns": [{"key": key, "title": title} for key, title in summary.model_columns(profile or {})],
            "accuracy_figure": figures.accuracy_figure(stages),
            "latency_figure": figures.latency_figure(profile or {}, budget_rows(profile or {}, stages)),
        },
        "trust": trust_facts(manifest, parity or {}, target),
        "time": time_facts(profile or {}, parity or {}),
        "making": making_facts(run, manifest, recipe, target),
    }


def _read_if_there(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None


def _missing(run: RunDirectory, target: str, parity: Json | None, profile: Json | None) -> list[dict[str, str]]:
    wanted = (
        ("parity", "whether the exported files compute what PyTorch computes", ("export", "--int8"), parity),
        ("profile", "how fast and how large the files are on the target", ("profile",), profile),
    )
    return [
        {
            "what": what,
            "meaning": meaning,
            "command": command_text(words[0], str(run.path), *words[1:], "--target", target),
        }
        for what, meaning, words, found in wanted
        if found is None
    ]


def _subject(manifest: Json, recipe: Json) -> dict[str, Any]:
    model = section(manifest, "model").get("name") or section(recipe, "model").get("name")
    data = section(manifest, "data").get("name") or section(recipe, "data").get("name")
    facts = {
        "Model": model,
        "Data": data,
        "Run": manifest.get("started_at"),
        "Seed": manifest.get("seed"),
        "edgecompress": manifest.get("edgecompress_version"),
    }
    return {
        "description": " ".join(str(recipe.get("description") or "").split()),
        "facts": [{"label": label, "text": str(value)} for label, value in facts.items() if value not in (None, "")],
    }


# 1. May I ship this?


def _decision(
    run: RunDirectory, manifest: Json, parity: Json | None, profile: Json | None, target: str
) -> dict[str, Any]:
    facts = profile or {}
    gates = [gate for gate in entries(manifest, "gates") if gate.get("target") in (None, target)]
    if facts.get("measured"):  # its own verdict on speed stands, among its budgets
        gates = [gate for gate in gates if gate.get("gate") != SPEED_BUDGET]
    budgets = budget_rows(facts, summary.stage_rows(manifest))
    failed_stages = [stage for stage in entries(manifest, "stages") if stage.get("status") == "failed"]
    broken = [f"Stage {stage.get('id')} failed: {stage.get('error') or 'no reason given'}" for stage in failed_stages]
    if manifest.get("status") == "failed" and not failed_stages:
        broken.append("The run failed before it was done.")
    missed = summary.missed_gates(gates, target) + _parity_misses(parity or {})
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


def _loud_facts(parity: Json, profile: Json) -> list[str]:
    """What must be said first whether or not it misses a gate: a slower int8, a class that got much worse."""
    facts = []
    speed = summary.speed_sentence(profile)
    if speed and "slower" in speed and not any("slower" in str(reason) for reason in profile.get("reasons") or []):
        facts.append(speed)
    loud = [c for c in class_rows(parity) if c["delta"] <= -LOUD_CLASS_DROP and -c["delta"] * (c["samples"] or 0) > 1.5]
    if loud:
        names = ", ".join(f"{c['name']} ({summary.points_text(100 * c['delta'])})" for c in loud[:3])
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
        row = {"name": name, "label": summary.label_text(name), "limit": limit, "value": value, "ci95": interval}
        rows.append({**row, "status": status, "met": _STATUS_MEANS.get(status)})
    return rows


def _found(name: str, profile: Json, stages: Sequence[Json]) -> tuple[Any, Any]:
    """What was found for a budget, and its interval or range; the model judged is int8 where there is one."""
    model = section(profile, "models", "int8") or section(profile, "models", "fp32")
    if name == "min_int8_speedup":
        speedup = section(profile, "int8_speedup")
        return speedup.get("ratio"), speedup.get("ci95")
    if name == "max_accuracy_drop":
        ends = _ends(stages)
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
    ends = [number(end) for end in interval] if isinstance(interval, (list, tuple)) and len(interval) == 2 else []
    known = [end for end in ends if end is not None] or [found]
    low, high = min(known), max(known)
    if name.startswith("min_"):
        low, high, bound = -high, -low, -bound
    return "missed" if low > bound else "open" if high > bound else "met"


# 2. What did I gain and pay?


def _ends(stages: Sequence[Json]) -> tuple[Json, Json] | None:
    """The baseline and the last finished stage, or None when they are the same."""
    finished = [row for row in stages if row.get("status") in ("complete", None)]
    baseline = next((row for row in stages if row["is_baseline"]), None)
    if baseline is None or not finished or finished[-1]["is_baseline"]:
        return None
    return baseline, finished[-1]


def gain_sentence(stages: Sequence[Json]) -> str | None:
    """From the baseline to the last stage in one sentence, each change in the word that fits it.

    `stages` come from `summary.stage_rows`. None when there is nothing to compare.
    """
    ends = _ends(stages)
    if ends is None:
        return None
    first, last = ends
    compute = summary.change_text(first.get("macs"), last.get("macs"), less="fewer MACs", more="more MACs")
    size = summary.change_text(first.get("size_bytes"), last.get("size_bytes"), less="smaller", more="larger")
    parts = ["as many MACs" if compute == "the same" else compute, "as large" if size == "the same" else size]
    parts = [part for part in parts if part != summary.MISSING]
    if number(last["accuracy_delta_points"]) is not None:
        before, after = summary.percent_text(first.get("accuracy")), summary.percent_text(last.get("accuracy"))
        split = f"{last['accuracy_split']} " if last.get("accuracy_split") else ""
        samples = f" on {last['samples']:,} {split}images" if isinstance(last.get("samples"), int) else ""
        change = summary.points_text(last["accuracy_delta_points"])
        parts.append(f"accuracy {change} points ({before} to {after}{samples})")
    return f"From {first['id']} to {last['id']}: {', '.join(parts)}." if parts else None


def _changes(stages: Sequence[Json], profile: Json) -> list[dict[str, Any]]:
    """The few numbers that matter most, each with what it was and what it became."""
    changes: list[dict[str, Any]] = []

    def add(what: str, text: str, before: str, after: str, worse: bool) -> None:
        if text != summary.MISSING:
            changes.append({"what": what, "text": text, "before": before, "after": after, "worse": worse})

    ends = _ends(stages)
    if ends is not None:
        first, last = ends
        delta = last["accuracy_delta_points"]
        before, after = (summary.percent_text(row.get("accuracy")) for row in ends)
        points = summary.points_text(delta)
        add("Accuracy", points if points == summary.MISSING else f"{points} points", before, after, worse=False)
        for what, key, text_of, less, more in (
            ("MACs", "macs", summary.count_text, "fewer", "more"),
            ("Size", "size_bytes", summary.bytes_text, "smaller", "larger"),
        ):
            old, new = first.get(key), last.get(key)
            text = summary.change_text(old, new, less=less, more=more)
            add(what, text, text_of(old), text_of(new), worse=text.endswith(more))
    latency = next((row for row in summary.model_rows(profile) if row["label"] == "Latency, median"), None)
    if latency is not None:
        shipped = summary.shipped_model(profile)
        for what, key, before, after in (
            ("Latency", "change_from_baseline", "baseline", shipped),
            ("int8 against fp32", "change", "fp32", "int8"),
        ):
            add(what, latency[key], latency[before], latency[after], worse=latency[key].endswith("slower"))
    return changes


def _stage(row: Json) -> dict[str, Any]:
    keys = ["id", "kind", "status", "accuracy", "accuracy_delta_points", "accuracy_ci95", "accuracy_split", "samples"]
    keys += ["params", "macs", "sparsity", "size_bytes", "size_bytes_compressed", "seconds", "epochs"]
    keys += ["calibration_samples", "summary", "error", "is_baseline"]
    return {key: row.get(key) for key in keys}
