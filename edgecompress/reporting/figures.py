"""Stages and a profile in, the figures of what was gained and paid out, as facts that `drawing` draws.

What enters: the rows of `variants`. What leaves: figures as JSON: numbers in the units that their axes name, and a
sentence that says what is drawn. A figure that would hold a single point is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecompress.reporting import value_text
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.value_text import number
from edgecompress.reporting.variants import mark_front, name_of, pair

Figure = dict[str, Any]


def figures_of(*found: Figure | None) -> list[Figure]:
    """Those that there are."""
    return [figure for figure in found if figure is not None]


def accuracy_figure(stages: Sequence[Json]) -> Figure | None:
    """Accuracy in percent by stage, with its 95 % interval; the mark is the baseline. None below two stages."""
    rows: list[dict[str, Any]] = []
    for row in stages:
        accuracy = number(row.get("accuracy"))
        if accuracy is None:
            continue
        interval = _percent(pair(row.get("accuracy_ci95")))
        rows.append(
            {
                "label": value_text.printable(row.get("id"), limit=24),
                "series": row.get("model") or ("int8" if row.get("kind") in ("quantize", "qat") else "fp32"),
                "dot": 100 * accuracy,
                "low": interval[0] if interval else None,
                "high": interval[1] if interval else None,
                "text": value_text.percent_text(accuracy),
            }
        )
    if len(rows) < 2:
        return None
    marks = [
        100 * float(row["accuracy"]) for row in stages if row["is_baseline"] and number(row.get("accuracy")) is not None
    ]
    return {
        "id": "accuracy-figure",
        "kind": "rows",
        "title": "Accuracy by stage",
        "description": "Dots are measured accuracies, whiskers their 95 % intervals; the dashed line is the baseline.",
        "x": {"label": "accuracy, %", "limits": [0.0, 100.0]},
        "rows": rows,
        "mark": marks[0] if marks else None,
    }


def latency_figure(profile: Json, budgets: Sequence[Json]) -> Figure | None:
    """Latency in ms of each model: bars to the median, dots at the 90th percentile; the mark is its budget.

    None when no latency was measured.
    """
    rows: list[dict[str, Any]] = []
    for name in ("baseline", "fp32", "int8"):
        latency = section(profile, "models", name, "latency_ms")
        median, tail = number(latency.get("p50")), number(latency.get("p90"))
        if median is None:
            continue
        interval = pair(latency.get("p90_ci95")) if tail is not None else None
        row = {"label": name, "bar": median, "dot": tail}
        row |= {"low": interval[0] if interval else None, "high": interval[1] if interval else None}
        text = f"{value_text.number_text(median)} ms" + (
            f", 90 % within {value_text.number_text(tail)} ms" if tail else ""
        )
        rows.append({**row, "text": text})
    if not rows:
        return None
    highest = max(value for row in rows for value in (row["bar"], row["dot"], row["high"]) if value is not None)
    budget = next((number(row["limit"]) for row in budgets if row["name"] == "latency_ms_p90"), None)
    mark = budget if budget is not None and budget <= 3 * highest else None  # a far budget would squash the bars
    end = "; the dashed line is its budget." if mark is not None else "."
    return {
        "id": "latency-figure",
        "kind": "rows",
        "title": "Latency of one inference",
        "description": f"Bars end at the median, dots mark the 90th percentile with its 95 % interval{end}",
        "x": {"label": "latency, ms"},
        "rows": rows,
        "mark": mark,
    }


def latency_trade_off(rows: Sequence[Json]) -> Figure | None:
    """Accuracy against median latency of every file that was measured, with intervals both ways."""
    points = [
        point | {"x": row["latency_ms_p50"], "x_ci95": row["latency_ms_p50_ci95"]}
        for row, point in _points(rows)
        if row["latency_ms_p50"] is not None
    ]
    for point in points:
        point["text"] = f"{value_text.number_text(point['x'])} ms, {point['text']}"
    return _trade_off("latency-trade-off", "Accuracy against latency", "median latency, ms", points)


def size_trade_off(rows: Sequence[Json]) -> Figure | None:
    """Accuracy against the compressed size of every stage, in kB or MB."""
    sizes = {id(row): number(row.get("size_bytes_compressed")) or number(row.get("size_bytes")) for row in rows}
    largest = max((size for size in sizes.values() if size), default=1.0)
    unit, scale = ("MB", 1e6) if largest >= 1e6 else ("kB", 1e3)
    points = []
    for row, point in _points(rows):
        size = sizes[id(row)]
        if size:
            kept = "compressed" if number(row.get("size_bytes_compressed")) else "uncompressed"
            text = f"{value_text.bytes_text(size)} {kept}, {point['text']}"
            points.append(point | {"x": size / scale, "x_ci95": None, "text": text})
    return _trade_off("size-trade-off", "Accuracy against size", f"compressed size of the weights, {unit}", points)


def placement_figure(placement: Json) -> Figure | None:
    """Agreement with fp32 against latency for every placement that was measured; None below two of them."""
    trials = entries(placement, "trials")
    points: list[dict[str, Any]] = []
    for trial in trials:
        latency, agreement = number(trial.get("latency_ms")), number(trial.get("agreement"))
        if latency is None or agreement is None:
            continue
        layers = len(trial.get("float_layers") or [])
        text = (
            f"{value_text.number_text(latency)} ms, {value_text.percent_text(agreement)} agreement, {layers} in float"
        )
        chosen = trial.get("id") == placement.get("choice")
        label = f"{trial.get('id')}{' (chosen)' if chosen else ''}"
        points.append({"label": label, "series": "int8", "x": latency, "y": 100 * agreement, "text": text})
    return _trade_off(
        "placement-figure",
        "Placements that were tried",
        "latency, ms",
        points,
        y="agreement with fp32, %",
        description="Each mark is one choice of layers that stay in float, measured on held-out images and on this "
        "CPU; the dashed line joins those that no other beats in both.",
    )


def _points(rows: Sequence[Json]) -> list[tuple[Json, dict[str, Any]]]:
    """The variants whose accuracy is known, as points without x."""
    found = []
    for row in rows:
        if number(row.get("accuracy")) is not None:
            interval = _percent(pair(row.get("accuracy_ci95")))
            series = (
                row.get("series")
                or row["model"]
                or ("int8" if row.get("kind") in ("quantize", "qat") else f"stage {row.get('id')}")
            )
            point = {
                "label": name_of(row),
                "series": series,
                "color": row.get("color"),
                "y": 100 * row["accuracy"],
                "y_ci95": interval,
            }
            found.append((row, point | {"text": f"{value_text.percent_text(row['accuracy'])} accuracy"}))
    return found


def _trade_off(
    figure_id: str,
    title: str,
    x: str,
    points: list[dict[str, Any]],
    *,
    y: str = "accuracy, %",
    description: str = "Up and to the left is better. Bars are 95 % intervals; the dashed line joins the variants that "
    "no other beats in both.",
) -> Figure | None:
    if len(points) < 2:
        return None
    low, high = min(point["x"] for point in points), max(point["x"] for point in points)
    return {
        "id": figure_id,
        "kind": "scatter",
        "title": title,
        "description": description,
        "x": {"label": x, "log": low > 0 and high > 4 * low},
        "y": {"label": y, "limits": [0.0, 100.0]},
        "points": mark_front(points),
    }


def _percent(interval: list[float] | None) -> list[float] | None:
    return None if interval is None else [100 * end for end in interval]
