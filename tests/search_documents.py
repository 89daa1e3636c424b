"""The content of a search.json as a search writes it, made up, for tests of what is made of it."""

from __future__ import annotations

import math
from typing import Any


def search_document(*, recipe: str = "prune_kd", pick: int | None = 1, count: int = 12) -> dict[str, Any]:
    """`count` complete trials along a front, one of them on another machine, one given up and one that failed."""
    trials = [_complete(number, count) for number in range(count)]
    ended = {"accuracy_split": "val", "early": []}
    settings = {"stages.pruned.channel_ratio": 0.9}
    trials.append({"id": count, "status": "pruned", "settings": settings, "reason": f"{recipe}: no use", **ended})
    trials.append({"id": count + 1, "status": "failed", "settings": settings, "error": "no layer can be cut", **ended})
    front = [
        {key: value for key, value in trial.items() if key not in ("id", "status", "early")}
        | {"trial": trial["id"], "accuracy_drop": 0.01, "missed": [] if trial["id"] == pick else ["too slow by 0.1 ms"]}
        for trial in trials[: count // 2]
    ]
    rank = {"rank_correlation": 0.9, "trials": count}
    return {
        "status": "complete",
        "recipe": recipe,
        "command": f"edgecompress search {recipe} --target x86",
        "target": "x86",
        "minimize": "latency",
        "max_accuracy_drop": 0.01,
        "space": [{"path": "stages.pruned.channel_ratio", "low": 0.1, "high": 0.9, "log": False}],
        "measured": True,
        "not_measured_because": [],
        "cost_unit": "ms",
        "trials": trials,
        "front": front,
        "pick": pick,
        "reason": "Trial 1 has the least latency." if pick is not None else "None of the points keeps the budgets.",
        "nearest": [] if pick is not None else [{"trial": 2, "run": "r", "would_have_to_give": ["0.1 ms of latency"]}],
        "elsewhere": [{"trial": count - 1, "worker": "other", "run": f"trials/{count - 1:04d}"}],
        "proxies": {"early_accuracy": rank, "predicted_latency": rank, "macs": {"rank_correlation": None, "trials": 0}},
        "spent": {"seconds": 900.0, "training_epochs": 40, "stages_from_cache": 9, "complete": count, "pruned": 1}
        | {"failed": 1, "running": 0},
    }


def _complete(number: int, count: int) -> dict[str, Any]:
    """The first half of the trials is on the front, the second is less accurate at the same cost."""
    place = number % max(1, count // 2)
    accuracy = 0.95 - 0.2 * math.exp(-place) - (0.05 if number >= count // 2 else 0.0)
    return {
        "id": number,
        "status": "complete",
        "settings": {"stages.pruned.channel_ratio": round(0.9 - 0.1 * place, 2), "stages.pruned.scope": "layer"},
        "run": f"trials/{number:04d}",
        "accuracy": accuracy,
        "accuracy_split": "val",
        "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01],
        "reported_accuracy": accuracy - 0.002,
        "reported_split": "test",
        "latency_ms_p50": 0.1 * (1 + place),
        "size_bytes": 20_000 * (1 + place),
        "peak_rss_bytes": None,
        "macs": 100_000 * (1 + place),
        "params": 5000,
        "cost": 0.1 * (1 + place),
        "thoroughness": "quick",
        "early": [],
    }
