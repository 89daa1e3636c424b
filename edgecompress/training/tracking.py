"""Experiment trackers: what metrics.jsonl says of each epoch, also told to TensorBoard, MLflow or Weights & Biases.

What enters: the trackers asked for, and a run. What leaves: curves and results in each tracker, through accelerate's
own classes for them. Nothing is sent anywhere unless a tracker is named; the packages are optional extras.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgecompress import console
from edgecompress.errors import ConfigurationError
from edgecompress.run_directory import Json
from edgecompress.settings.spelling import did_you_mean
from edgecompress.training.training_loop import EpochRecord

TRACKERS = ("tensorboard", "mlflow", "wandb")
PROJECT = "edgecompress"


def require_trackers(names: Sequence[str]) -> None:
    """Raises ConfigurationError for a name that is none, and where a package is missing, before anything is begun."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigurationError(f"--track {name}: there is no such tracker{did_you_mean(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"--track {name}: the package {name} is not installed; pip install 'edgecompress[{name}]'"
            )


class Tracking:
    """The trackers of one run. Steps count the epochs of each stage, those of several cuts one after the other."""

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = list(trackers)
        self._epochs: dict[str, int] = {}

    def watch(self, stage_id: str, record: EpochRecord, checkpoint: object) -> None:
        """Tell of an epoch, as a stage calls it."""
        step = self._epochs[stage_id] = self._epochs.get(stage_id, 0) + 1
        names = ("loss", "val_accuracy", "learning_rate", "images_per_second")
        values = {f"{stage_id}/{name}": float(getattr(record, name)) for name in names}
        for tracker in self._trackers:
            if tracker.name == "wandb":
                _log_to_wandb(tracker, stage_id, values, step)
            else:
                tracker.log(values, step=step)

    def results(self, manifest: Json, profiles: dict[str, Json]) -> None:
        """Tell of what the stages reached, and of what was measured."""
        values: dict[str, float] = {}
        for stage in manifest["stages"]:
            for name in ("accuracy", "params", "macs", "sparsity", "size_bytes", "seconds"):
                if isinstance(stage.get(name), int | float):
                    values[f"result/{stage['id']}/{name}"] = float(stage[name])
        for target, profile in profiles.items():
            for model, row in profile["models"].items():
                latency = row["latency_ms"]["p50"]
                if latency is not None:
                    values[f"profile/{target}/{model}/latency_ms_p50"] = float(latency)
        for tracker in self._trackers:
            tracker.log(values, step=None if tracker.name == "wandb" else 0)


def _log_to_wandb(tracker: Any, stage_id: str, values: dict[str, float], step: int) -> None:
    """Weights & Biases drops what comes at a lower step than before, so each stage has an axis of its own there."""
    axis = f"{stage_id}/epoch"
    if step == 1:
        tracker.tracker.define_metric(axis)
        tracker.tracker.define_metric(f"{stage_id}/*", step_metric=axis)
    tracker.log({**values, axis: float(step)}, step=None)


@contextmanager
def tracked(names: Sequence[str], run: Path, recipe: Json) -> Iterator[Tracking | None]:
    """The trackers of a run while it is made, closed afterwards whatever happens; None where none was asked for.

    TensorBoard's files go beside the run, to `tensorboard/<run>`: a run holds nothing that changes once it is complete.
    """
    if not names:
        yield None
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    folder = run.absolute().parent / "tensorboard"
    made = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = kind(run.name, folder)
            console.note(f"tracking: tensorboard --logdir {os.path.relpath(folder)}")
        elif name == "mlflow":
            tracker = kind(PROJECT, None, run_name=run.name)
        else:
            tracker = kind(PROJECT, name=run.name)
        try:
            tracker.start()
            tracker.store_init_configuration(_flat(recipe))
        except Exception as error:  # each tracker's client has exceptions of its own, with no base but this
            text = " ".join(str(error).split())[:300]
            raise ConfigurationError(f"--track {name}: cannot start ({type(error).__name__}: {text})") from error
        made.append(tracker)
    try:
        yield Tracking(made)
    finally:
        for tracker in made:
            tracker.finish()


def _flat(document: Any, place: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as `stages.pruned.epochs`, those that are set; trackers show plain values only."""
    if isinstance(document, dict):
        pairs = [(f"{place}.{key}".lstrip("."), value) for key, value in document.items()]
    elif isinstance(document, list):
        pairs = [
            (f"{place}.{item['id'] if isinstance(item, dict) and 'id' in item else number}", item)
            for number, item in enumerate(document)
        ]
    else:
        plain = document if isinstance(document, bool | int | float) else str(document)
        return {} if document is None else {place: plain}
    return {key: value for name, inner in pairs for key, value in _flat(inner, name).items()}
