"""What did I gain and pay? From the first model to the last, in sentences, tables and figures.

What enters: the stages of a run and a profile. What leaves: the facts of the page's second question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecompress.reporting import summary, value_text
from edgecompress.reporting.figures import (
    accuracy_figure,
    figures_of,
    latency_figure,
    latency_trade_off,
    placement_figure,
    size_trade_off,
)
from edgecompress.reporting.summary import Json
from edgecompress.reporting.value_text import number
from edgecompress.reporting.variants import variants

_SPARSE = 0.05  # a share of zeros that no training leaves by itself


def gain_facts(stages: Sequence[Json], profile: Json, budgets: Sequence[Json], placement: Json) -> dict[str, Any]:
    """Sentences, the few numbers that matter, the stages, the files, and the trade-offs."""
    rows = variants(stages, profile)
    return {
        "sentence": gain_sentence(stages),
        "speed": summary.speed_sentence(profile),
        "sparsity": sparsity_sentence(stages),
        "changes": _changes(stages, profile),
        "stages": [{**_stage(row), "unmeasured": _unmeasured(row, profile)} for row in rows],
        "models": summary.model_rows(profile),
        "model_columns": [{"key": key, "title": title} for key, title in summary.model_columns(profile)],
        "figures": figures_of(
            latency_trade_off(rows),
            size_trade_off(rows),
            accuracy_figure(rows),
            latency_figure(profile, budgets),
            placement_figure(placement),
        ),
    }


def sparsity_sentence(stages: Sequence[Json]) -> str | None:
    """What zeros among the weights buy, where a stage has them."""
    sparse = [row for row in stages if (number(row.get("sparsity")) or 0.0) >= _SPARSE]
    if not sparse:
        return None
    row = sparse[-1]
    size, packed = number(row.get("size_bytes")), number(row.get("size_bytes_compressed"))
    buys = (
        f" They buy compressed size: {value_text.bytes_text(packed)} of {value_text.bytes_text(size)}."
        if size and packed
        else ""
    )
    name, zeros = value_text.printable(row.get("id"), limit=40), value_text.percent_text(row["sparsity"])
    return f"Stage {name} has {zeros} zeros among its weights. ORT's CPU kernels gain no speed from zeros.{buys}"


def baseline_and_last(stages: Sequence[Json]) -> tuple[Json, Json] | None:
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
    ends = baseline_and_last(stages)
    if ends is None:
        return None
    first, last = ends
    compute = value_text.change_text(first.get("macs"), last.get("macs"), less="fewer MACs", more="more MACs")
    size = value_text.change_text(first.get("size_bytes"), last.get("size_bytes"), less="smaller", more="larger")
    parts = ["as many MACs" if compute == "the same" else compute, "as large" if size == "the same" else size]
    parts = [part for part in parts if part != value_text.MISSING]
    if number(last["accuracy_delta_points"]) is not None:
        before, after = value_text.percent_text(first.get("accuracy")), value_text.percent_text(last.get("accuracy"))
        split = f"{last['accuracy_split']} " if last.get("accuracy_split") else ""
        samples = f" on {last['samples']:,} {split}images" if isinstance(last.get("samples"), int) else ""
        change = value_text.points_text(last["accuracy_delta_points"])
        parts.append(f"accuracy {change} points ({before} to {after}{samples})")
    return f"From {first['id']} to {last['id']}: {', '.join(parts)}." if parts else None


def _changes(stages: Sequence[Json], profile: Json) -> list[dict[str, Any]]:
    """The few numbers that matter most, each with what it was and what it became."""
    changes: list[dict[str, Any]] = []

    def add(what: str, text: str, before: str, after: str, worse: bool) -> None:
        if text != value_text.MISSING:
            changes.append({"what": what, "text": text, "before": before, "after": after, "worse": worse})

    ends = baseline_and_last(stages)
    if ends is not None:
        first, last = ends
        delta = last["accuracy_delta_points"]
        before, after = (value_text.percent_text(row.get("accuracy")) for row in ends)
        points = value_text.points_text(delta)
        add("Accuracy", points if points == value_text.MISSING else f"{points} points", before, after, worse=False)
        for what, key, text_of, less, more in (
            ("MACs", "macs", value_text.count_text, "fewer", "more"),
            ("Size", "size_bytes", value_text.bytes_text, "smaller", "larger"),
        ):
            old, new = first.get(key), last.get(key)
            text = value_text.change_text(old, new, less=less, more=more)
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
    keys += [
        "calibration_samples",
        "ece",
        "model",
        "latency_ms_p50",
        "latency_ms_p50_ci95",
        "peak_rss_bytes",
        "summary",
        "error",
        "is_baseline",
    ]
    return {key: row.get(key) for key in keys}


def _unmeasured(row: Json, profile: Json) -> str | None:
    """Why a stage has no latency and no memory; None where it has them, or is not finished."""
    if row.get("status") not in ("complete", None) or number(row.get("latency_ms_p50")) is not None:
        return None
    exported_alone = row["model"] is None and summary.section(profile, "models")
    return "not exported" if exported_alone else "not measured"
