"""What was done to an architecture since it was built: cuts of channels and factorizations, in order.

What enters: a freshly built module and its history. What leaves: the module in the shape of the one that the history
was recorded on, ready for its weights. JSON in, JSON out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from edgecompress.models.channel_groups import PruningRecord, replay_cuts
from edgecompress.models.factorize import FORMS, Factorization, replace

HistoryStep = PruningRecord | Factorization
"""A cut (a name, whether output channels, indices) or a factorization."""

History = tuple[HistoryStep, ...]


def replay(module: nn.Module, example: Tensor, history: Iterable[HistoryStep]) -> None:
    """Do to `module` what the history says, without weights. Raises PruningError where it does not fit."""
    # Cuts in a row share one traced graph, which takes seconds for a large network.
    for is_factorization, steps in itertools.groupby(history, key=lambda step: isinstance(step, Factorization)):
        if is_factorization:
            for step in steps:
                assert isinstance(step, Factorization)
                replace(module, step, with_weights=False)
        else:
            replay_cuts(module, example, [step for step in steps if not isinstance(step, Factorization)])


def history_to_json(history: History) -> list[dict[str, Any]]:
    """The history as model.json holds it."""
    return [_to_json(step) for step in history]


def _to_json(step: HistoryStep) -> dict[str, Any]:
    if isinstance(step, Factorization):
        return {"step": "factorize", "layer": step.layer, "form": step.form, "rank": step.rank}
    name, is_output, indices = step
    return {"step": "cut", "layer": name, "outputs": is_output, "indices": list(indices)}


def history_from_json(entries: Sequence[Any]) -> History:
    """The history of a model.json. Raises KeyError, TypeError or ValueError for anything else."""
    return tuple(_from_json(entry) for entry in entries)


def _from_json(entry: Any) -> HistoryStep:
    if isinstance(entry, list):  # the cuts of format version 1, which knew nothing else
        name, is_output, indices = entry
        return str(name), bool(is_output), tuple(int(index) for index in indices)
    if entry["step"] == "factorize":
        form = next((form for form in FORMS if form == entry["form"]), None)
        if form is None:
            raise ValueError(f"no such form of factorization: {entry['form']!r}")
        return Factorization(str(entry["layer"]), form, int(entry["rank"]))
    if entry["step"] != "cut":
        raise ValueError(f"no such step: {entry['step']!r}")
    return str(entry["layer"]), bool(entry["outputs"]), tuple(int(index) for index in entry["indices"])
