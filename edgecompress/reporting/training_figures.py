"""The lines of metrics.jsonl in, curves of training out.

What enters: one record an epoch. What leaves: figures as facts for `drawing`, and the stages' last epochs as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgecompress.reporting.figures import Figure, figures_of
from edgecompress.reporting.summary import Json
from edgecompress.reporting.value_text import number, printable

_POINTS = 200


def training_figures(records: Sequence[Json]) -> list[Figure]:
    """Validation accuracy and loss over the epochs of every stage; a stage's phases follow one another."""
    parts = (
        ("training-accuracy", "Validation accuracy while training", "val_accuracy", "accuracy on val, %", 100.0, False),
        ("training-loss", "Loss while training", "loss", "loss on train", 1.0, True),
    )
    return figures_of(*(_curves(records, *part) for part in parts))


def _curves(
    records: Sequence[Json], figure_id: str, title: str, key: str, label: str, scale: float, log: bool
) -> Figure | None:
    curves: dict[str, list[float]] = {}
    for record in records:
        value = number(record.get(key))
        if value is not None and (value > 0 or not log):
            curves.setdefault(str(record.get("stage")), []).append(scale * value)
    series: list[dict[str, Any]] = []
    for place, (stage, values) in enumerate(curves.items()):
        if len(values) > 1:
            step = -(-len(values) // _POINTS)
            epochs = sorted({*range(1, len(values) + 1, step), len(values)})
            line = {"name": f"stage {printable(stage, limit=24)}", "x": epochs, "y": [values[k - 1] for k in epochs]}
            series.append(line | {"marks": len(epochs) <= 30, "color": place})
    if not series:
        return None
    return {
        "id": figure_id,
        "kind": "lines",
        "title": title,
        "description": "One line a stage; the phases of a stage follow one another.",
        "x": {"label": "epoch", "whole": True},
        "y": {"label": label, "log": log},
        "series": series,
    }
