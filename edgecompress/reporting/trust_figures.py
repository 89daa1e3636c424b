"""Parity and sensitivity in, the figures of whether int8 can be trusted out.

What enters: parity.json and sensitivity.json as documents. What leaves: figures as facts for `drawing`; None where
nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgecompress.reporting import value_text
from edgecompress.reporting.figures import Figure
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.value_text import number

_LAYERS = 14
_MANY_CLASSES = 15


def reliability_figure(parity: Json) -> Figure | None:
    """Accuracy against confidence before and after int8."""
    series = []
    for name in ("fp32", "int8"):
        bins = [
            (100 * row["confidence"], 100 * row["accuracy"])
            for row in entries(section(parity, "calibration", name), "bins")
            if number(row.get("confidence")) is not None and number(row.get("accuracy")) is not None
        ]
        if bins:
            series.append({"name": name, "x": [x for x, _ in bins], "y": [y for _, y in bins], "marks": True})
    if not series:
        return None
    diagonal = {"name": "as sure as right", "x": [0.0, 100.0], "y": [0.0, 100.0], "quiet": True}
    return {
        "id": "reliability-figure",
        "kind": "lines",
        "title": "Is it as right as it is sure?",
        "description": "Images grouped by the model's confidence. On the thin line it is right as often as it says; "
        "below it, it is too sure. Groups of few images scatter.",
        "x": {"label": "confidence, %", "limits": [0.0, 102.0]},
        "y": {"label": "accuracy, %", "limits": [0.0, 103.0]},
        "series": [diagonal, *series],
    }


def class_figure(classes: Sequence[Json]) -> Figure | None:
    """What int8 changed in every class, in points, the worst first; a table says it better for few classes."""
    changes = [100 * row["delta"] for row in classes]
    if len(changes) < _MANY_CLASSES or not any(changes):
        return None
    return {
        "id": "class-figure",
        "kind": "lines",
        "title": "What int8 changed in every class",
        "description": "All classes, the worst first: accuracy in int8 less accuracy in fp32, in points.",
        "x": {"label": "classes, worst first", "whole": True},
        "y": {"label": "points"},
        "series": [
            {"name": "no change", "x": [1, len(changes)], "y": [0.0, 0.0], "quiet": True},
            {"name": "int8", "x": list(range(1, len(changes) + 1)), "y": changes},
        ],
    }


def layer_figure(sensitivity: Json) -> Figure | None:
    """The layers that lose most when each alone is in int8, by their signal-to-noise ratio."""
    rows = [row for row in entries(sensitivity, "layers") if number(row.get("alone_sqnr_db")) is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: float(row["alone_sqnr_db"]))
    shown = []
    for row in rows[:_LAYERS]:
        gain = number(row.get("gain_db"))
        text = f"{row['alone_sqnr_db']:.1f} dB" + (f", {gain:+.2f} if in float" if gain is not None else "")
        shown.append({"label": row.get("layer"), "series": "int8", "dot": row["alone_sqnr_db"], "text": text})
    total = number(section(sensitivity, "full").get("sqnr_db"))
    rest = f" The {_LAYERS} worst of {len(rows)}." if len(rows) > _LAYERS else ""
    whole = " The dashed line is the whole model in int8." if total is not None else ""
    return {
        "id": "layer-figure",
        "kind": "rows",
        "title": "Which layers lose most by int8",
        "description": "Signal-to-noise ratio of the logits with one layer alone in int8, the worst first; "
        f"more is better.{whole}{rest}",
        "x": {"label": "signal to noise, dB"},
        "rows": shown,
        "mark": total,
    }


def calibration_rows(parity: Json, stages: Sequence[Json]) -> list[dict[str, str]]:
    """Expected calibration error of every stage and of both files, as texts."""
    rows = [
        {
            "what": f"stage {value_text.printable(row.get('id'), limit=40)}, PyTorch",
            "ece": value_text.percent_text(row["ece"]),
            "confidence": value_text.MISSING,
            "accuracy": value_text.percent_text(row.get("accuracy")),
        }
        for row in stages
        if number(row.get("ece")) is not None
    ]
    for name in ("fp32", "int8"):
        found = section(parity, "calibration", name)
        if number(found.get("ece")) is not None:
            rows.append(
                {
                    "what": f"{name} file",
                    "ece": value_text.percent_text(found["ece"]),
                    "confidence": value_text.percent_text(found.get("mean_confidence")),
                    "accuracy": value_text.percent_text(section(parity, "onnx_int8").get(f"accuracy_{name}")),
                }
            )
    return rows
