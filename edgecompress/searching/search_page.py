"""What a search found, as a page: the front as a picture, the pick and why, and every trial with its own report.

What enters: the content of search.json. What leaves: search.html, self-contained as the report of a run is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from edgecompress.reporting import value_text
from edgecompress.reporting.report_page import render_html
from edgecompress.reporting.variants import mark_front, pair
from edgecompress.run_directory import Json
from edgecompress.searching.result_text import proxy_lines, range_text

_OTHER, _FRONT, _PICK = 0, 2, 1  # of the page's series: grey, blue, orange
_SIZE = "size of the int8 file, kB"


def page(document: Json) -> str:
    """The content of search.html."""
    front = {row["trial"]: row for row in document["front"]}
    spent = document["spent"]
    facts = {
        "title": f"{document['recipe']} on {document['target']}",
        "status": document["status"],
        "reason": document["reason"],
        "has_pick": document["pick"] is not None,
        "notes": [*document["not_measured_because"], *_nearest(document)],
        "figures": _figures(document, front),
        "front": [_row(row, row["trial"], document) | {"missed": row["missed"]} for row in document["front"]],
        "trials": [_trial(trial, document) for trial in document["trials"]],
        "space": [{"label": d["path"], "text": range_text(d)} for d in document["space"]],
        "spent": [
            {
                "label": "Trials",
                "text": f"{spent['complete']} complete, {spent['pruned']} given up early, {spent['failed']} failed",
            },
            {"label": "Training", "text": f"{spent['training_epochs']} epochs"},
            {"label": "Stages taken from the cache", "text": str(spent["stages_from_cache"])},
            {"label": "Time of all trials", "text": value_text.seconds_text(spent["seconds"])},
            *({"label": "How well it was foretold", "text": line} for line in proxy_lines(document)),
        ],
        "command": document["command"],
        "limit": f"{100 * document['max_accuracy_drop']:g} points",
    }
    return render_html("search.html.j2", facts)


def _nearest(document: Json) -> list[str]:
    return [f"Nearest: trial {p['trial']}: {' '.join(p['would_have_to_give'])}" for p in document["nearest"]]


def _figures(document: Json, front: dict[int, Json]) -> list[Json]:
    """Accuracy against the cost, and against size where the cost is another; each where two trials can be drawn."""
    label, unit = _cost_axis(document)
    figures = [_figure("cost", label, document, front, lambda trial: float(trial["cost"]) / unit)]
    if document["minimize"] != "size":
        figures.append(_figure("size", _SIZE, document, front, lambda trial: float(trial["size_bytes"]) / 1e3))
    return [figure for figure in figures if len(figure["points"]) > 1]


def _cost_axis(document: Json) -> tuple[str, float]:
    """What the cost is called, with its unit, and by what it is divided for that."""
    if document["minimize"] == "latency":
        return ("MACs, millions", 1e6) if document["cost_unit"] == "MACs" else ("latency, ms", 1.0)
    return ({"size": _SIZE, "memory": "peak memory, kB"}[document["minimize"]], 1e3)


def _figure(
    name: str, label: str, document: Json, front: dict[int, Json], cost_of: Callable[[Json], float]
) -> dict[str, Any]:
    points = []
    for trial in document["trials"]:
        if trial["status"] != "complete":
            continue
        is_pick, is_front = trial["id"] == document["pick"], trial["id"] in front
        interval = pair(trial.get("accuracy_ci95")) if is_front else None
        points.append(
            {
                "label": f"{trial['id']}, the pick" if is_pick else str(trial["id"]),
                "text": f"{value_text.percent_text(trial['accuracy'])} on val, {cost_of(trial):.4g} ({label})",
                "x": cost_of(trial),
                "y": 100 * float(trial["accuracy"]),
                "y_ci95": [100 * end for end in interval] if interval else None,
                "color": _PICK if is_pick else _FRONT if is_front else _OTHER,
            }
        )
    return {
        "id": f"{name}-figure",
        "kind": "scatter",
        "title": f"Accuracy against {label.partition(',')[0]}",
        "description": (
            f"Every complete trial by its number; the line joins those that no other beats in both. Whiskers are the "
            f"95 % intervals of the accuracy on val of trials on the front of accuracy and {document['minimize']}."
        ),
        "x": {"label": label},
        "y": {"label": "accuracy on val, %", "limits": [0.0, 100.0]},
        "points": mark_front(points),
    }


def _row(facts: Json, trial: int, document: Json) -> dict[str, Any]:
    latency = facts.get("latency_ms_p50")
    return {
        "trial": trial,
        "is_pick": trial == document["pick"],
        "accuracy": value_text.percent_text(facts["accuracy"]),
        "reported": f"{value_text.percent_text(facts['reported_accuracy'])} ({facts['reported_split']})",
        "latency": "not measured" if latency is None else f"{value_text.number_text(latency)} ms",
        "size": value_text.bytes_text(facts["size_bytes"]),
        "macs": value_text.count_text(facts["macs"]),
        "settings": _settings(facts["settings"]),
        "report": f"{quote(str(facts['run']))}/report/{quote(str(document['target']))}.html",
    }


def _trial(trial: Json, document: Json) -> dict[str, Any]:
    if trial["status"] == "complete":
        row = _row(trial, trial["id"], document) | {"status": "complete", "why": ""}
        is_here = trial["id"] not in [other["trial"] for other in document["elsewhere"]]
        return row if is_here else row | {"report": "", "why": "its run is on another machine"}
    names = ("accuracy", "reported", "latency", "size", "macs", "report")
    why = str(trial.get("reason") or trial.get("error") or "")
    facts = {"trial": trial["id"], "is_pick": False, "status": trial["status"], "why": why}
    return facts | {"settings": _settings(trial["settings"])} | dict.fromkeys(names, "")


def _settings(settings: Json) -> str:
    return ", ".join(f"{path.removeprefix('stages.')}={value}" for path, value in settings.items())
