"""A run in, its variants out: each form of the model with its accuracy, latency, size and memory side by side.

What enters: run.json and a target's profile. What leaves: one row a stage, the baseline first, and with it what was
measured of the file that was exported from it. Tables, trade-off plots and comparisons of runs all start from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecompress.reporting import value_text
from edgecompress.reporting.summary import Json, section
from edgecompress.reporting.value_text import number

_INT8_KINDS = ("quantize", "qat")


def pair(value: object) -> list[float] | None:
    """The two ends of an interval as floats, or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else [low, high]


def variants(stages: Sequence[Json], profile: Json) -> list[dict[str, Any]]:
    """The stages, each with `model` (its name in the profile, None where it was not measured) and what was measured.

    `stages` come from `summary.stage_rows`. The exported fp32 file is the last float stage, the int8 file the stage
    that made integers, and the baseline file the first model.
    """
    finished = [row for row in stages if row.get("status") in ("complete", None)]
    models = section(profile, "models")
    last_float = next((row for row in reversed(finished) if row.get("kind") not in _INT8_KINDS), None)
    integers = next((row for row in reversed(finished) if row.get("kind") in _INT8_KINDS), None)
    rows = []
    for row in stages:
        name = None
        if row is integers and section(models, "int8"):
            name = "int8"
        elif row is last_float and section(models, "fp32"):
            name = "fp32"
        elif row["is_baseline"] and section(models, "baseline"):
            name = "baseline"
        model = section(models, name) if name else {}
        latency = section(model, "latency_ms")
        rows.append(
            {
                **row,
                "model": name,
                "latency_ms_p50": number(latency.get("p50")),
                "latency_ms_p50_ci95": pair(latency.get("p50_ci95")),
                "peak_rss_bytes": number(model.get("peak_rss_bytes")),
                "file_bytes": number(model.get("size_bytes")),
                "file_bytes_compressed": number(model.get("size_bytes_compressed")),
            }
        )
    return rows


def mark_front(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points with `front`: whether no other is as good or better in both, x being better low and y high."""

    def beaten(point: Json) -> bool:
        return any(
            other["x"] <= point["x"]
            and other["y"] >= point["y"]
            and (other["x"], other["y"]) != (point["x"], point["y"])
            for other in points
        )

    return [{**point, "front": not beaten(point)} for point in points]


def name_of(row: Json) -> str:
    """What to call a variant: its `label` if it has one, or its stage, and the file's form where that says more."""
    if row.get("label"):
        return str(row["label"])
    stage = value_text.printable(row.get("id"), limit=24)
    return stage if row["model"] in (None, row.get("id")) else f"{stage} ({row['model']})"
