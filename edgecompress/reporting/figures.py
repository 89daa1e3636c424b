"""Stages and a profile in, the two figures of the report as plain geometry out.

What enters: rows of `summary.stage_rows` and a profile. What leaves: axes with round ticks, and bars, dots and
intervals in data units. The template draws them as SVG with positions in percent, so that a figure fits a phone without
its type shrinking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgecompress.reporting import summary
from edgecompress.reporting.summary import Json, number, section


def _axis(low: float, high: float) -> dict[str, Any]:
    """An axis that holds [low, high], with about five ticks at multiples of 1, 2 or 5 times a power of ten."""
    rough = max(high - low, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [{"at": i * step, "text": f"{i * step:.{decimals}f}"} for i in range(first, last + 1)]
    return {"low": first * step, "high": last * step, "ticks": ticks}


def _pair(value: object) -> tuple[float | None, float | None]:
    """The two ends of an interval, or two times None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None, None
    low, high = number(value[0]), number(value[1])
    return (None, None) if low is None or high is None else (low, high)


def accuracy_figure(stages: Sequence[Json]) -> dict[str, Any] | None:
    """Accuracy in percent by stage, with its 95 % interval; the mark is the baseline. None below two stages."""
    rows: list[dict[str, Any]] = []
    for row in stages:
        accuracy = number(row.get("accuracy"))
        if accuracy is None:
            continue
        low, high = (None if end is None else 100 * end for end in _pair(row.get("accuracy_ci95")))
        text = summary.percent_text(accuracy)
        rows.append(
            {
                "label": summary.printable(row.get("id"), limit=24),
                "bar": None,
                "dot": 100 * accuracy,
                "low": low,
                "high": high,
                "text": text,
            }
        )
    if len(rows) < 2:
        return None
    values = [value for row in rows for value in (row["dot"], row["low"], row["high"]) if value is not None]
    margin = 0.1 * max(max(values) - min(values), 1.0)
    axis = _axis(max(0.0, min(values) - margin), min(100.0, max(values) + margin))
    marks = [
        100 * float(row["accuracy"]) for row in stages if row["is_baseline"] and number(row.get("accuracy")) is not None
    ]
    return {"unit": "%", "axis": axis, "rows": rows, "mark": marks[0] if marks else None}


def latency_figure(profile: Json, budgets: Sequence[Json]) -> dict[str, Any] | None:
    """Latency in ms of each model: bars to the median, dots at the 90th percentile; the mark is its budget.

    None when no latency was measured.
    """
    rows: list[dict[str, Any]] = []
    for name in ("baseline", "fp32", "int8"):
        latency = section(profile, "models", name, "latency_ms")
        median, tail = number(latency.get("p50")), number(latency.get("p90"))
        if median is None:
            continue
        low, high = _pair(latency.get("p90_ci95")) if tail is not None else (None, None)
        text = f"{summary.number_text(median)} ms" + (f", 90 % within {summary.number_text(tail)} ms" if tail else "")
        rows.append({"label": name, "bar": median, "dot": tail, "low": low, "high": high, "text": text})
    if not rows:
        return None
    highest = max(value for row in rows for value in (row["bar"], row["dot"], row["high"]) if value is not None)
    budget = next((number(row["limit"]) for row in budgets if row["name"] == "latency_ms_p90"), None)
    mark = budget if budget is not None and budget <= 3 * highest else None  # a far budget would squash the bars
    return {"unit": "ms", "axis": _axis(0.0, 1.02 * max(highest, mark or 0.0)), "rows": rows, "mark": mark}
