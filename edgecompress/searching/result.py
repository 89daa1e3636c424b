"""What a search found: the front, the pick and why, the nearest points where nothing is good enough, and the cost.

What enters: the trials as the study knows them. What leaves: the part of search.json that says what came of them. It is
made from nothing else, so that every worker writes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompress.run_directory import Json, RunDirectory
from edgecompress.searching.front import Point, nearest, pareto_front, pick, rank_correlation
from edgecompress.searching.study import TrialRecord
from edgecompress.searching.trial import Minimize, missed_limits
from edgecompress.settings.target import Target


@dataclass(frozen=True)
class SearchTerms:
    """What the trials are judged by."""

    directory: Path
    target: Target
    minimize: Minimize
    max_accuracy_drop: float
    not_measured_because: Sequence[str]

    @property
    def unit(self) -> str:
        """What the cost is counted in."""
        if self.minimize == "latency":
            return "MACs" if self.not_measured_because else "ms"
        return "bytes"


def found(records: Sequence[TrialRecord], terms: SearchTerms) -> Json:
    """Trials, front, pick, and how well the proxies ranked, as search.json holds them."""
    complete = [record for record in records if record.status == "complete"]
    here = [record for record in complete if (terms.directory / record.result["run"] / "run.json").is_file()]
    reference = max((float(record.result["baseline_accuracy"]) for record in complete), default=None)
    points = [] if reference is None else [_point(record, reference, terms) for record in here]
    front = pareto_front(points)
    chosen = pick(front)
    by_id = {record.id: record for record in complete}
    document: Json = {
        "measured": not terms.not_measured_because,
        "not_measured_because": list(terms.not_measured_because),
        "cost_unit": terms.unit,
        "baseline_accuracy": reference,
        "accuracy_split": "val",
        "trials": [_row(record) for record in records],
        "front": [_front_row(point, by_id[point.trial], reference) for point in front],
        "pick": None if chosen is None else chosen.trial,
        "reason": _reason(chosen, front, by_id, reference, terms),
        "nearest": [],
        "elsewhere": [
            {"trial": record.id, "worker": record.result.get("worker"), "run": record.result["run"]}
            for record in complete
            if record not in here
        ],
        "proxies": _proxies(complete),
        "spent": _spent(records),
    }
    if chosen is None:
        document["nearest"] = [
            {"trial": point.trial, "run": by_id[point.trial].result["run"], "would_have_to_give": list(point.missed)}
            for point in nearest(points)
        ]
    return document


def _point(record: TrialRecord, reference: float, terms: SearchTerms) -> Point:
    result, run = record.result, RunDirectory(terms.directory / record.result["run"])
    drop = reference - float(result["accuracy"])
    missed = missed_limits(run, terms.target, drop, terms.max_accuracy_drop)
    return Point(
        trial=record.id,
        accuracy=float(result["accuracy"]),
        cost=float(result["cost"]),
        missed=tuple(missed),
        shortfall=_shortfall(result, drop, terms),
    )


def _shortfall(result: Json, drop: float, terms: SearchTerms) -> float:
    """By how much the limits are missed, each as a share of itself; a point of accuracy stands for a limit of zero."""
    limit = terms.max_accuracy_drop
    total = max(0.0, drop - limit) / max(limit, 0.01)
    budgets = terms.target.budgets
    for value, most in (
        (result["latency_ms_p50"], budgets.latency_ms_p50),
        (result["size_bytes"], budgets.size_bytes),
        (result["peak_rss_bytes"], budgets.peak_rss_bytes),
    ):
        if value is not None and most is not None:
            total += max(0.0, float(value) / float(most) - 1)
    return total


def _row(record: TrialRecord) -> Json:
    kept = {key: value for key, value in record.result.items() if key not in ("status", "values", "worker")}
    row: Json = {"id": record.id, "status": record.status, "settings": record.settings, **kept}
    row |= {"error": record.error, "early": list(record.early)}
    return row | ({"attempts": record.attempts} if record.attempts > 1 else {})


def _front_row(point: Point, record: TrialRecord, reference: float | None) -> Json:
    result = record.result
    names = (
        *("run", "accuracy", "accuracy_split", "accuracy_ci95", "reported_accuracy", "reported_split"),
        *("latency_ms_p50", "size_bytes", "peak_rss_bytes", "macs", "params", "cost", "thoroughness"),
    )
    row: Json = {"trial": point.trial} | {name: result[name] for name in names}
    drop = None if reference is None else reference - point.accuracy
    return row | {"accuracy_drop": drop, "missed": list(point.missed), "settings": record.settings}


def _reason(
    chosen: Point | None,
    front: Sequence[Point],
    by_id: dict[int, TrialRecord],
    reference: float | None,
    terms: SearchTerms,
) -> str:
    """Why the pick, or why none."""
    if reference is None or not front:
        return "No trial is complete yet."
    limit = f"{100 * terms.max_accuracy_drop:g} points"
    if chosen is None:
        return (
            f"None of the {len(front)} points of the front loses at most {limit} of accuracy and keeps the budgets of "
            f"{terms.target.name}."
        )
    drop = 100 * (reference - chosen.accuracy)
    lost = f"loses {drop:.2f} points" if drop > 0 else f"gains {-drop:.2f} points"
    words = (
        f"Trial {chosen.trial} has the least {_what(terms)} ({_amount(chosen.cost, terms)}) of all that lose at most "
        f"{limit} and keep the budgets of {terms.target.name}: it {lost} on val, from {reference:.2%}."
    )
    facts = by_id[chosen.trial].result
    if facts["reported_split"] != "val":
        reported = 100 * (facts["reported_baseline_accuracy"] - facts["reported_accuracy"])
        words += f" On {facts['reported_split']}, which nothing was chosen by, it loses {reported:.2f} points."
    return words


def _what(terms: SearchTerms) -> str:
    return {"latency": "latency", "size": "size", "memory": "peak memory"}[terms.minimize] + (
        " on paper" if terms.unit == "MACs" else ""
    )


def _amount(cost: float, terms: SearchTerms) -> str:
    if terms.unit == "ms":
        return f"{cost:.4g} ms"
    return f"{cost / 1e6:.4g} M MACs" if terms.unit == "MACs" else f"{cost / 1e3:.4g} kB"


def _proxies(complete: Sequence[TrialRecord]) -> Json:
    """Spearman's rank correlation of what was known cheaply with what was measured in the end."""
    results = [record.result for record in complete]
    early = [record for record in complete if record.early]
    timed = [result for result in results if result["latency_ms_p50"] is not None]
    foretold = [result for result in timed if result["predicted_latency_ms"] is not None]
    return {
        "early_accuracy": {
            "rank_correlation": rank_correlation(
                [record.early[0]["accuracy"] for record in early], [record.result["accuracy"] for record in early]
            ),
            "trials": len(early),
        },
        "predicted_latency": {
            "rank_correlation": rank_correlation(
                [result["predicted_latency_ms"] for result in foretold],
                [result["latency_ms_p50"] for result in foretold],
            ),
            "trials": len(foretold),
        },
        "macs": {
            "rank_correlation": rank_correlation(
                [result["macs"] for result in timed], [result["latency_ms_p50"] for result in timed]
            ),
            "trials": len(timed),
        },
    }


def _spent(records: Sequence[TrialRecord]) -> Json:
    statuses = [record.status for record in records]
    return {
        "seconds": math.fsum(float(record.result.get("seconds", 0.0)) for record in records),
        "training_epochs": sum(int(record.result.get("training_epochs", 0)) for record in records),
        "stages_from_cache": sum(len(record.result.get("stages_from_cache", ())) for record in records),
        **{status: statuses.count(status) for status in ("complete", "pruned", "failed", "running")},
    }
