"""A profile in, the figures of where the time goes out.

What enters: a profile's document. What leaves: figures as facts for `drawing`; None where nothing was measured.
"""

from __future__ import annotations

from typing import Any

from edgecompress.reporting import summary, value_text
from edgecompress.reporting.figures import Figure
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.value_text import number
from edgecompress.reporting.variants import pair

_MODELS = ("baseline", "fp32", "int8")
_OPERATORS = 8
_SHOWN_SHARE = 99.0  # of inferences: the last hundredth would squash all the rest


def distribution_figure(profile: Json) -> Figure | None:
    """Which share of inferences took at most how long."""
    series: list[dict[str, Any]] = []
    for name in _MODELS:
        quantiles = [
            (number(value), 100 * float(share))
            for share, value in section(profile, "models", name, "latency_ms_quantiles").items()
        ]
        known = [(value, share) for value, share in quantiles if value is not None and share <= _SHOWN_SHARE]
        if len(known) > 2:
            series.append({"name": name, "x": [x for x, _ in known], "y": [y for _, y in known], "marks": False})
    if not series:
        return None
    values = [x for line in series for x in line["x"]]
    return {
        "id": "distribution-figure",
        "kind": "lines",
        "title": "How latency is distributed",
        "description": "The share of all measured inferences that took at most so long, the slowest hundredth left "
        "out; a long flat end is jitter.",
        "x": {"label": "latency, ms", "log": max(values) > 4 * min(values) > 0},
        "y": {"label": "share of inferences, %", "limits": [0.0, 101.0]},
        "series": series,
    }


def operator_figure(profile: Json) -> Figure | None:
    """Where the model that ships spends its time, by operator."""
    shipped = summary.shipped_model(profile)
    rows = [
        row for row in entries(section(profile, "models", shipped), "operators") if number(row.get("ms")) is not None
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: -float(row["ms"]))
    shown = [
        _operator_row(row["operator"], int(row.get("count") or 0), row["ms"], row.get("share"))
        for row in rows[:_OPERATORS]
    ]
    others = rows[_OPERATORS:]
    if others:
        share = sum(number(row.get("share")) or 0.0 for row in others)
        shown.append(_operator_row(f"{len(others)} other operators", 0, sum(row["ms"] for row in others), share))
    return {
        "id": "operator-figure",
        "kind": "rows",
        "title": f"Time of {shipped} by operator",
        "description": "Time of one inference by ONNX Runtime's own profile, all nodes of an operator together. "
        "Profiling costs time itself, so the shares count, not the sum.",
        "x": {"label": "time, ms"},
        "rows": shown,
        "mark": None,
    }


def _operator_row(name: object, count: int, ms: float, share: object) -> dict[str, Any]:
    nodes = f" x {count}" if count > 1 else ""
    text = f"{value_text.percent_text(share)}, {value_text.number_text(ms)} ms"
    return {"label": f"{name}{nodes}", "series": "int8" if "Q" in str(name) else "fp32", "bar": ms, "text": text}


def scaling_figure(profile: Json, what: str) -> Figure | None:
    """How speed grows with `threads`, or throughput with `batch`; None below two of them."""
    key = "speedup" if what == "threads" else "gain"
    series: list[dict[str, Any]] = []
    for name in _MODELS:
        rows = [row for row in entries(section(profile, "scaling", name), what) if number(row.get(key)) is not None]
        if len(rows) > 1:
            intervals = [pair(row.get(f"{key}_ci95")) or [row[key], row[key]] for row in rows]
            line = {"name": name, "x": [row[what] for row in rows], "y": [row[key] for row in rows], "marks": True}
            series.append(line | {"low": [low for low, _ in intervals], "high": [high for _, high in intervals]})
    if not series:
        return None
    if what == "threads":
        most = max(max(line["x"]) for line in series)
        ideal = [{"name": "ideal", "x": [1, most], "y": [1, most], "quiet": True}]
        return {
            "id": "threads-figure",
            "kind": "lines",
            "title": "What more threads bring",
            "description": "Speed against one thread, bars are 95 % intervals; the thin line is perfect scaling.",
            "x": {"label": "threads", "ticks": sorted({x for line in series for x in line["x"]})},
            "y": {"label": "times as fast as one thread"},
            "series": [*ideal, *series],
        }
    return {
        "id": "batch-figure",
        "kind": "lines",
        "title": "What larger batches bring",
        "description": "Images per second against one image at a time, bars are 95 % intervals.",
        "x": {"label": "images at a time", "log": True, "ticks": sorted({x for line in series for x in line["x"]})},
        "y": {"label": "times the throughput"},
        "series": series,
    }


def roofline_figure(profile: Json) -> Figure | None:
    """Speed against arithmetic intensity, under the roofs that this machine was measured to have."""
    peaks = section(profile, "roofline", "threads")
    models = section(profile, "roofline", "models")
    points = []
    for name in _MODELS:
        model, share = section(profile, "models", name), section(models, name)
        macs, weights, speed = (
            number(model.get("macs")),
            number(model.get("weights_bytes")),
            number(share.get("gmacs_per_s")),
        )
        if macs and weights and speed:
            points.append((name, macs / weights, speed, str(share.get("threads", 1))))
    peak = section(peaks, points[0][3]) if points else {}
    memory, floating, integer = (
        number(peak.get(key)) for key in ("memory_gb_per_s", "float_gmacs_per_s", "int8_gmacs_per_s")
    )
    if not memory or not floating or not integer:
        return None
    low = min(x for _, x, _, _ in points) / 4
    high = max(max(x for _, x, _, _ in points) * 4, 4 * integer / memory)
    roofs = [
        {"name": name, "x": [low, roof / memory, high], "y": [low * memory, roof, roof], "quiet": quiet, "color": place}
        for place, (name, roof, quiet) in enumerate(
            (("roof in float", floating, True), ("roof in int8", integer, True))
        )
    ]
    marks = [{"name": name, "x": [x], "y": [speed], "marks": True, "points": True} for name, x, speed, _ in points]
    return {
        "id": "roofline-figure",
        "kind": "lines",
        "title": "Roofline: what the machine could do",
        "description": f"Thin lines are this machine's measured roofs: memory {value_text.number_text(memory)} GB/s, "
        f"{value_text.number_text(floating)} GMAC/s in float (lower) and {value_text.number_text(integer)} in int8 "
        "(upper). "
        "The distance of a mark to its roof is what small layers, other operators and conversions cost; "
        "a mark above the slope has its weights in the cache.",
        "x": {"label": "multiply-accumulates per byte of weights", "log": True},
        "y": {"label": "GMAC/s", "log": True},
        "series": [*roofs, *marks],
    }


def memory_figure(profile: Json) -> Figure | None:
    """Peak memory of the process that runs each model, and what the model adds to it."""
    rows: list[dict[str, Any]] = []
    for name in _MODELS:
        model = section(profile, "models", name)
        peak, own = number(model.get("peak_rss_bytes")), number(model.get("model_rss_bytes"))
        if peak is not None:
            added = f", {value_text.bytes_text(own)} by the model" if own is not None else ""
            interval = pair(model.get("peak_rss_bytes_range"))
            row = {"label": name, "bar": peak / 1e6, "text": f"{value_text.bytes_text(peak)}{added}"}
            low_high = (interval[0] / 1e6, interval[1] / 1e6) if interval else (None, None)
            rows.append({**row, "low": low_high[0], "high": low_high[1]})
    if not rows:
        return None
    return {
        "id": "memory-figure",
        "kind": "rows",
        "title": "Peak memory of the process",
        "description": "Most memory that the process held, with the range over fresh processes; most of it is the "
        "runtime itself.",
        "x": {"label": "peak memory, MB"},
        "rows": rows,
        "mark": None,
    }
