"""Results in, sentences out: rows, plain sentences and the tables that the terminal shows.

What enters: a run's manifest, its gates and a target's profile, as JSON. What leaves: texts and rich tables. The
report uses the same texts and rows, so the terminal and the page can never tell two stories; a number that
nobody wrote shows as `-` and never stops a summary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from edgecompress.reporting.value_text import (
    MISSING,
    bytes_text,
    change_text,
    count_text,
    number,
    number_text,
    percent_text,
    points_text,
    printable,
    quantity_text,
    seconds_text,
)

Json = Mapping[str, Any]
_MODELS = ("baseline", "fp32", "int8")
# One row of the models table each: label, key, and the words for less and for more of it.
_MODEL_ROWS = (
    ("Latency, median", ("latency_ms", "p50"), "faster", "slower"),
    ("Latency, 90th percentile", ("latency_ms", "p90"), "faster", "slower"),
    ("Throughput", ("throughput_per_s",), "less", "more"),
    ("File size", ("size_bytes",), "smaller", "larger"),
    ("File size, compressed", ("size_bytes_compressed",), "smaller", "larger"),
    ("Peak memory", ("peak_rss_bytes",), "less", "more"),
    ("Load time", ("load_ms",), "faster", "slower"),
    ("First inference", ("first_inference_ms",), "faster", "slower"),
)


def section(document: Json, *keys: str) -> Json:
    """The mapping at a path of keys; empty where anything on the way is missing."""
    here: Any = document
    for key in keys:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else {}


def entries(document: Json, key: str) -> list[Json]:
    """The mappings in the list at a key; empty where there is none."""
    found = document.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def stage_rows(manifest: Json) -> list[dict[str, Any]]:
    """The stages as in run.json, the baseline first, each with `accuracy_delta_points` against the baseline.

    The delta is None for the baseline itself, and where the accuracies come from different splits.
    """
    rows = [dict(stage) for stage in entries(manifest, "stages")]
    baseline: Json = section(manifest, "baseline") or (rows[0] if rows else {})
    if baseline and baseline.get("id") not in [row.get("id") for row in rows]:
        rows.insert(0, {"id": "baseline", "kind": "given", "status": "complete", **baseline})
    reference = number(baseline.get("accuracy"))
    for row in rows:
        accuracy = number(row.get("accuracy"))
        row["is_baseline"] = row.get("id") == baseline.get("id", "baseline")
        comparable = row.get("accuracy_split") == baseline.get("accuracy_split", row.get("accuracy_split"))
        known = reference is not None and accuracy is not None and comparable and not row["is_baseline"]
        row["accuracy_delta_points"] = 100 * (accuracy - reference) if known else None  # type: ignore[operator]
    return rows


def model_rows(profile: Json) -> list[dict[str, Any]]:
    """What was measured, as texts: `label`, `baseline`, `fp32`, `int8`, and how they compare.

    `change` says how int8 compares with fp32, `change_from_baseline` how the model that ships compares with the
    baseline; "unclear" where the interval of their ratio holds 1, or the ranges over fresh processes overlap. Rows for
    which no model has a value are left out.
    """
    changes = {
        "change": ("fp32", "int8", "int8_speedup"),
        "change_from_baseline": ("baseline", shipped_model(profile), "end_to_end_speedup"),
    }
    rows = []
    for label, keys, less, more in _MODEL_ROWS:
        values = {name: section(profile, "models", name, *keys[:-1]).get(keys[-1]) for name in _MODELS}
        if all(value is None for value in values.values()):
            continue
        row = {"label": label} | {name: quantity_text(value, "_".join(keys)) for name, value in values.items()}
        ranges = {name: _interval(section(profile, "models", name).get(f"{keys[-1]}_range")) for name in _MODELS}
        for key, (before, after, speedup) in changes.items():
            row[key] = change_text(values[before], values[after], less=less, more=more)
            if row[key].endswith((less, more)) and _overlap(ranges[before], ranges[after]):
                row[key] = "unclear"
            ratio = number(section(profile, speedup).get("ratio"))
            if keys == ("latency_ms", "p50") and ratio is not None:  # paired, so closer than two medians
                interval = _interval(section(profile, speedup).get("ci95"))
                straddles = interval is not None and interval[0] <= 1 <= interval[1]
                row[key] = "unclear" if straddles else change_text(ratio, 1, less=less, more=more)
        rows.append(row)
    return rows


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def shipped_model(profile: Json) -> Literal["fp32", "int8"]:
    """The model that ships: int8 where there is one."""
    return "int8" if section(profile, "models", "int8") else "fp32"


def model_columns(profile: Json) -> list[tuple[str, str]]:
    """The columns of the models table, as keys of `model_rows` with their titles."""
    if not section(profile, "models", "baseline"):
        return [("fp32", "fp32"), ("int8", "int8"), ("change", "int8 is")]
    shipped = shipped_model(profile)
    columns = [(name, name) for name in ("baseline", "fp32", "int8") if section(profile, "models", name)]
    columns.append(("change_from_baseline", f"{shipped} against baseline"))
    return [*columns, ("change", "int8 against fp32")] if shipped == "int8" else columns


def speed_sentence(profile: Json) -> str | None:
    """The speed of what ships against the baseline, and of int8 against the same network in fp32.

    Each in the right word for its interval; None when neither was measured.
    """
    clauses = (
        _speed_clause(shipped_model(profile), "the baseline", section(profile, "end_to_end_speedup")),
        _speed_clause("int8", "the same network in fp32", section(profile, "int8_speedup")),
    )
    said = "; ".join(clause for clause in clauses if clause)
    return f"On {printable(profile.get('target', 'this target'))}, {said}." if said else None


def slower_sentences(manifest: Json, profiles: Iterable[Json] = ()) -> list[str]:
    """One sentence for each target on which int8 is slower than fp32 beyond doubt, to be said before anything else.

    Profiles decide; without any, what was measured when the placement was chosen.
    """
    found = [(profile.get("target"), section(profile, "int8_speedup")) for profile in profiles]
    if not found:
        placed = [section(d, "value") for d in entries(manifest, "decisions") if d.get("what") == "placement"]
        found = [
            (value.get("target"), {"ratio": last.get("speedup"), "ci95": last.get("speedup_ci95")})
            for value in placed
            for last in [section(value, "final") or value]
        ]
    sentences = []
    for target, speedup in found:
        ratio, interval = number(speedup.get("ratio")), _interval(speedup.get("ci95"))
        if ratio is not None and interval is not None and interval[1] < 1:
            low, high = (number_text(end) for end in interval)
            sentences.append(
                f"int8 is slower than fp32 on {printable(target)}: fp32 takes {number_text(ratio)} times as long "
                f"(95 % interval {low} to {high})."
            )
    return sentences


def _speed_clause(name: str, other: str, speedup: Json) -> str | None:
    ratio = number(speedup.get("ratio"))
    if ratio is None or ratio <= 0:
        return None
    low, high = _interval(speedup.get("ci95")) or (ratio, ratio)

    def interval(first: float, second: float) -> str:
        return f"95 % interval {number_text(first)} to {number_text(second)}" if first != second else "no interval"

    if low > 1:
        return f"{name} runs {number_text(ratio)} times faster than {other} ({interval(low, high)})"
    if high < 1:
        times = f"{number_text(1 / ratio)} times as long ({interval(1 / high, 1 / low)})"
        return f"{name} is slower than {other}: it takes {times}"
    return (
        f"no difference in speed between {name} and {other} was found: ratio {number_text(ratio)} "
        f"({interval(low, high)})"
    )


def _interval(value: object) -> tuple[float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None or low <= 0 else (low, high)


Verdict = Literal["ship", "hold", "inconclusive", "unmeasured"]


def judge(profile: Json | None, *, missed: Sequence[str] = ()) -> tuple[Verdict, list[str]]:
    """The verdict to show, and its reasons: what was missed first, then the profile's own reasons.

    `missed` holds one sentence for each gate that was missed; with any of them the verdict is "hold", whatever the
    profile says. Without a measurement there is no "ship".
    """
    facts: Json = profile or {}
    word = facts.get("verdict")
    reasons = [*missed, *(printable(reason) for reason in facts.get("reasons") or [])]
    if missed or word == "hold":
        return "hold", reasons
    if not facts or facts.get("measured") is False:
        return "unmeasured", reasons or [printable(reason) for reason in facts.get("not_measured_because") or []]
    return ("ship" if word == "ship" else "inconclusive"), reasons


def verdict_text(profile: Json) -> str:
    """The verdict and its reasons as plain text, one reason a line (print it with markup off)."""
    target = printable(profile.get("target", "this target"))
    verdict, reasons = judge(profile)
    words = {"ship": "SHIP", "hold": "HOLD", "inconclusive": "INCONCLUSIVE", "unmeasured": "NOT MEASURED"}
    return "\n".join(
        [f"Verdict for {target}: {words[verdict]}", *(f"  - {' '.join(reason.split())}" for reason in reasons)]
    )


def plain_table(title: str, columns: Sequence[tuple[str, bool]], *, caption: str | None = None) -> Table:
    """An empty table with a title and columns (header, whether it holds numbers), for a terminal of 80 characters."""
    table = Table(
        title=Text(title),
        caption=Text(caption) if caption else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for header, numeric in columns:
        table.add_column(header, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def stages_table(manifest: Json) -> Table:
    """Every stage from the baseline to the last: accuracy with the change in points, and what the model costs."""
    headers = ("accuracy", "points", "params", "MACs", "zeros", "size", "time")
    rows = stage_rows(manifest)
    splits = sorted({str(row["accuracy_split"]) for row in rows if row.get("accuracy_split")})
    caption = f"accuracy on {' and '.join(splits)}; points against the baseline (base)" if splits else None
    table = plain_table(
        "Stages", [("stage", False), ("kind", False), *((header, True) for header in headers)], caption=caption
    )
    for row in rows:
        unfinished = row.get("status") not in ("complete", None)
        name = printable(row.get("id", MISSING), limit=16) + (f" ({printable(row['status'])})" if unfinished else "")
        cells = [
            name,
            printable(row.get("kind", MISSING), limit=10),
            percent_text(row.get("accuracy")),
            "base" if row["is_baseline"] else points_text(row["accuracy_delta_points"]),
            count_text(row.get("params")),
            count_text(row.get("macs")),
            percent_text(row.get("sparsity")),
            bytes_text(row.get("size_bytes")),
            seconds_text(row.get("seconds")),
        ]
        table.add_row(*(Text(cell) for cell in cells), style="red" if row.get("status") == "failed" else None)
    return table


def models_table(profile: Json) -> Table:
    """The models side by side as measured on the target, and how they differ."""
    target = printable(profile.get("target", "this target"), limit=40)
    columns = model_columns(profile)
    crowded = len(columns) > 3  # two words on two lines and a short "times" keep five columns within 80 characters
    headers = [title.replace(" against ", " against\n") for _, title in columns]
    title = (
        f"Measured on {target}" if profile.get("measured") else f"Files for {target}, which was not at hand to measure"
    )
    table = plain_table(title, [("", False), *((header, True) for header in headers)])
    for row in model_rows(profile):
        cells = [row[key].replace(" times ", "x ") if crowded else row[key] for key, _ in columns]
        table.add_row(Text(row["label"]), *(Text(cell) for cell in cells))
    return table
