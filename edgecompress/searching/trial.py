"""One trial: a point of the space as a run directory, cheap facts first, real measuring last.

What enters: settings, the search's own terms, what other trials had come to at the same epoch. What leaves: a complete
run (applied, exported with int8, profiled, reported) and its facts, or the reason why it was given up on the way. The
accuracy that decides is the int8 file's own, on val: test is only ever reported.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgecompress import console
from edgecompress.data.run_data import ImageData, open_data
from edgecompress.exporting.parity import run_onnx
from edgecompress.measure.explanation import LATENCY_ALONE, Depth
from edgecompress.measure.measuring import THOROUGHNESS
from edgecompress.measure.profiling import not_at_hand
from edgecompress.measure.verdict import decide
from edgecompress.models.checkpoint import Checkpoint, example_input, rebuild
from edgecompress.models.model_building import copy_of
from edgecompress.reporting.report_page import write_report
from edgecompress.run_directory import Json, RunDirectory, alone_in, read_json
from edgecompress.searching.front import EarlyRecord
from edgecompress.searching.latency_table import LatencyTable, layer_shapes
from edgecompress.searching.space import SearchSpace
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.gates import allows_drop
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import DistillStage, QuantizeStage, Recipe, TrainStage
from edgecompress.settings.search_space import label
from edgecompress.settings.target import Target
from edgecompress.stages.train_stages import Watch
from edgecompress.steps.apply_run import apply_recipe, start_manifest
from edgecompress.steps.export_run import BASELINE_FILE, FP32_FILE, INT8_FILE, export_folder, export_run
from edgecompress.steps.profile_run import profile_run
from edgecompress.steps.run_state import last_float_id
from edgecompress.steps.stage_cache import StageCache
from edgecompress.training.evaluate import wilson_interval
from edgecompress.training.training_loop import EpochRecord

Minimize = Literal["latency", "size", "memory"]
FloatStage = TrainStage | DistillStage | PruneStage | FactorizeStage
TRIALS = "trials"
_EARLIEST_SHARE = 0.5  # of a trial's epochs, before which nothing is judged


class TrialStopped(Exception):  # noqa: N818  (no error: the trial was given up, and why is its message)
    """Raised in the middle of a trial that is not worth going on with."""


@dataclass(frozen=True)
class Terms:
    """What all trials of a search share."""

    space: SearchSpace
    directory: Path
    target: Target
    minimize: Minimize
    max_accuracy_drop: float
    cache: StageCache
    table: LatencyTable
    command: str

    @property
    def not_measured_because(self) -> list[str]:
        """Why nothing can be timed for the target on this machine; empty where it can."""
        return not_at_hand(self.target)

    def run_of(self, trial: int) -> RunDirectory:
        return RunDirectory(self.directory / TRIALS / f"{trial:04d}")


Judge = Callable[[EarlyRecord], str | None]
"""Keeps a trial's early record, and says why the trial is hopeless, or None."""


@dataclass
class Trial:
    """One trial in progress."""

    number: int
    settings: dict[str, Any]
    terms: Terms
    judge: Judge
    early: list[EarlyRecord] = field(default_factory=list)

    def run(self) -> Json:
        """Make the run complete; returns its facts. Goes on where an earlier attempt stopped.

        Raises TrialStopped where it is hopeless, and whatever its stages raise.
        """
        terms, started = self.terms, time.monotonic()
        recipe = terms.space.recipe_with(self.settings, max_accuracy_drop=terms.max_accuracy_drop)
        with alone_in(terms.run_of(self.number).path):
            facts = self._made(recipe, terms.run_of(self.number))
        return {"status": "complete", **facts, "seconds": time.monotonic() - started}

    def _made(self, recipe: Recipe, run: RunDirectory) -> Json:
        """The run made complete; its facts."""
        terms = self.terms
        if not run.manifest_path.is_file():
            run.write_manifest(
                start_manifest(
                    recipe,
                    source=terms.space.source,
                    overrides=self._overrides(),
                    targets=[terms.target.name],
                    command=terms.command,
                )
            )
        try:
            apply_recipe(recipe, run, terms.target, cache=terms.cache, watch=self._watch(recipe))
            export_run(run, terms.target, int8=True)
            profile = self._profile(run)
            facts = self._facts(recipe, run, profile)
        except BaseException as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            run.update_manifest(lambda m: m.update(status="failed", error=why, finished_at=_now()))
            raise
        run.update_manifest(lambda m: m.update(status="complete", error=None, finished_at=_now()))
        write_report(run, terms.target.name)
        return facts

    def _overrides(self) -> list[str]:
        """What `--set` takes to make the same run without a search."""
        chosen = [f"{path}={label(value)}" for path, value in self.settings.items()]
        return [*chosen, f"gates.max_accuracy_drop={self.terms.max_accuracy_drop:g}"]

    def cost_facts(self) -> Json:
        """What was spent, for a trial that did not end well."""
        run = self.terms.run_of(self.number)
        lines = run.read_metrics() if run.manifest_path.is_file() else []
        manifest = run.read_manifest() if run.manifest_path.is_file() else {"stages": []}
        cached = {entry["id"] for entry in manifest["stages"] if "cache" in entry}
        return {
            "training_epochs": len([line for line in lines if line.get("stage") not in cached]),
            "stages_from_cache": sorted(cached),
            "worker": socket.gethostname(),
        }

    # ---- while it trains

    def _watch(self, recipe: Recipe) -> Watch:
        """Counts the epochs of stages that are this trial's own, and asks the judge from half of them on."""
        own = own_stages(self.terms.space, recipe)
        total = sum(_epochs_of(stage) for stage in own)
        before = {stage.id: sum(_epochs_of(earlier) for earlier in own[:n]) for n, stage in enumerate(own)}
        seen: dict[str, int] = {}

        def watch(stage_id: str, record: EpochRecord, checkpoint: Checkpoint) -> None:
            if stage_id not in before:
                return
            seen[stage_id] = seen.get(stage_id, 0) + 1
            epochs = before[stage_id] + seen[stage_id]
            if epochs < max(1, math.ceil(_EARLIEST_SHARE * total)) or epochs >= total:
                return
            cost = self._predicted_cost(checkpoint)
            early = EarlyRecord(self.number, epochs, record.val_accuracy, cost)
            self.early.append(early)
            reason = self.judge(early)
            if reason is not None:
                raise TrialStopped(reason)

        return watch

    def _predicted_cost(self, checkpoint: Checkpoint) -> float:
        """The search's cost on paper: milliseconds by the table, MACs where there is none, or bytes of int8 weights."""
        layers = self._layers(checkpoint)
        if self.terms.minimize == "latency":
            predicted = self.terms.table.predict_ms(layers)
            return float(sum(layer.macs for layer in layers)) if predicted is None else predicted
        return float(sum(layer.weights for layer in layers))

    def _layers(self, checkpoint: Checkpoint) -> Sequence[Any]:
        if not self.terms.not_measured_because and self.terms.minimize == "latency":
            self.terms.table.measure(checkpoint.architecture)
        module = copy_of(checkpoint.module).float().cpu()
        return layer_shapes(module, example_input(checkpoint.architecture, batch=1))

    # ---- once it is trained

    def _profile(self, run: RunDirectory) -> Json:
        how: Json = {"seconds": THOROUGHNESS["quick"].seconds, "thoroughness": "quick", "depth": LATENCY_ALONE}
        return profile_run(run, self.terms.target, folder=export_folder(run, self.terms.target), **how)

    def _facts(self, recipe: Recipe, run: RunDirectory, profile: Json) -> Json:
        """What a finished run is worth: accuracy on val, costs, and the limits that it misses."""
        manifest = run.read_manifest()
        data = open_data(recipe.data)
        folder = export_folder(run, self.terms.target)
        checkpoint, _ = rebuild(run.stage(last_float_id(recipe)))
        baseline_id = str(manifest["baseline"]["id"])
        baseline_file = folder / BASELINE_FILE if (folder / BASELINE_FILE).is_file() else folder / FP32_FILE
        baseline_model, _ = rebuild(run.stage(baseline_id))
        accuracy, images = _val_accuracy(folder / INT8_FILE, data, checkpoint, self.terms.target)
        before, _ = _val_accuracy(baseline_file, data, baseline_model, self.terms.target)
        int8 = profile["models"]["int8"]
        layers = self._layers(checkpoint)
        last: Json = next(e for e in manifest["stages"] if e["id"] == recipe.quantize_stage.id)
        facts: Json = {
            "accuracy": accuracy,
            "accuracy_split": "val",
            "accuracy_ci95": list(wilson_interval(accuracy, images)),
            "baseline_accuracy": before,
            "reported_accuracy": last["accuracy"],
            "reported_baseline_accuracy": manifest["baseline"]["accuracy"],
            "reported_split": last["accuracy_split"],
            "latency_ms_p50": int8["latency_ms"]["p50"],
            "size_bytes": int8["size_bytes"],
            "peak_rss_bytes": int8["peak_rss_bytes"],
            "macs": sum(layer.macs for layer in layers),
            "params": last["params"],
            "predicted_latency_ms": None if self.terms.not_measured_because else self.terms.table.predict_ms(layers),
            "thoroughness": "quick",
        }
        return facts | {"cost": cost_of(facts, self.terms.minimize)} | self.cost_facts() | {"run": self._relative(run)}

    def _relative(self, run: RunDirectory) -> str:
        return run.path.relative_to(self.terms.directory).as_posix()


def cost_of(facts: Json, minimize: Minimize) -> float:
    """What the search makes small: milliseconds, bytes, or MACs where a latency cannot be measured."""
    if minimize == "size":
        return float(facts["size_bytes"])
    value = facts["latency_ms_p50"] if minimize == "latency" else facts["peak_rss_bytes"]
    return float(facts["macs"] if value is None else value)


def missed_limits(run: RunDirectory, target: Target, drop: float, limit: float) -> list[str]:
    """Sentences on the limits that a finished run misses: the search's own on accuracy, and the target's budgets."""
    own = [] if allows_drop(limit, drop) else [f"It loses {100 * drop:.2f} points on val, {100 * limit:g} are allowed."]
    path = run.profile_path(target.name)
    if not path.is_file():
        return [*own, f"It was not profiled on {target.name}."]
    # No accuracy is given: that on val is judged above, and the run's own verdict is about test.
    return [*own, *decide(read_json(path), target=target, gates_missed=[], accuracy_drop=None).missed]


def own_stages(space: SearchSpace, recipe: Recipe) -> list[FloatStage]:
    """The stages that train and may differ from trial to trial: from the first one that holds something searched."""
    paths = [dimension.path for dimension in space.dimensions]
    names = {path.split(".")[1] for path in paths if path.startswith("stages.")}
    is_own = [stage.id in names or str(number) in names for number, stage in enumerate(recipe.stages)]
    if any(not path.startswith("stages.") for path in paths):
        first = 0
    else:
        first = is_own.index(True) if True in is_own else len(is_own)
    return [stage for stage in recipe.stages[first:] if not isinstance(stage, QuantizeStage)]


def _epochs_of(stage: FloatStage) -> int:
    if isinstance(stage, PruneStage):
        return stage.epochs + (stage.steps - 1) * stage.epochs_between
    return stage.epochs


def _val_accuracy(path: Path, data: ImageData, checkpoint: Checkpoint, target: Target) -> tuple[float, int]:
    """Accuracy of an ONNX file on val, and the number of images."""
    preprocessing = checkpoint.architecture.preprocessing
    split = data.splits["val"].prepare(preprocessing, cache=False)
    logits = run_onnx(path, split, preprocessing, np.arange(len(split), dtype=np.int64), target=target)
    return float(np.mean(logits.argmax(axis=1) == split.labels.numpy())), len(split)


def measure_again(terms: Terms, trial: int, facts: Json) -> Json:
    """Profile a finished run in full, as `profile` does by default, and write its report anew; returns its facts."""
    run = terms.run_of(trial)
    console.note(f"trial {trial}: measuring again, at length")
    how: Json = {"seconds": THOROUGHNESS["standard"].seconds, "thoroughness": "standard", "depth": Depth()}
    with alone_in(run.path):
        profile = profile_run(run, terms.target, folder=export_folder(run, terms.target), **how)
        write_report(run, terms.target.name)
    int8 = profile["models"]["int8"]
    again = facts | {
        "latency_ms_p50": int8["latency_ms"]["p50"],
        "peak_rss_bytes": int8["peak_rss_bytes"],
        "thoroughness": "standard",
    }
    return again | {"cost": cost_of(again, terms.minimize)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
