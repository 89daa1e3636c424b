"""`apply`: a recipe's stages, one after the other, into a run directory.

What enters: a recipe, a target for its int8 scheme and channel multiple, a run directory. What leaves: one
folder per stage and a manifest that is true after every stage, so that a run that stops can go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from edgecompress import console
from edgecompress.data.run_data import ImageData, open_data
from edgecompress.errors import RunError
from edgecompress.machine import describe_machine, versions
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint, save_checkpoint
from edgecompress.models.complexity import weight_sparsity
from edgecompress.models.model_building import CreatedModel, copy_of, create_model
from edgecompress.pruning.weight_masks import lost_zeros
from edgecompress.run_directory import SCHEMA_VERSION, Json, RunDirectory, versioned, write_json
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.gates import Gate, accuracy_gate, record_gates, speed_gate
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import DistillStage, QuantizeStage, Recipe, Stage, TrainStage
from edgecompress.settings.target import Target, own_target
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.stages.factorize_stage import factorize_stage
from edgecompress.stages.prune_stages import prune_stage
from edgecompress.stages.train_stages import PreparedSplits, Watch, run_stage
from edgecompress.steps.quantize_run import run_quantize_stage
from edgecompress.steps.run_state import (
    INITIAL,
    cost_entry,
    decision_of,
    evaluation_entry,
    last_float_id,
    recipe_document,
    require_same_data,
    require_trained_head,
    save_answers,
    seed_everything,
)
from edgecompress.steps.stage_cache import StageCache
from edgecompress.steps.stage_key import stage_key
from edgecompress.steps.training_context import stage_progress, training_context
from edgecompress.training import workers
from edgecompress.training.evaluate import collect_logits
from edgecompress.training.teaching import require_fitting_teachers


def start_manifest(recipe: Recipe, *, source: str, overrides: list[str], targets: list[str], command: str) -> Json:
    """The manifest of a run that has not begun a stage."""
    return {
        "schema_version": SCHEMA_VERSION,
        "edgecompress_version": versions().get("edgecompress"),
        "recipe_name": recipe.name,
        "recipe": recipe_document(recipe),
        "recipe_source": source,
        "overrides": overrides,
        "targets": targets,
        "command": command,
        "seed": recipe.seed,
        "status": "running",
        "started_at": _now(),
        "finished_at": None,
        "versions": versions(),
        "machine": describe_machine(),
        "notes": [],
        "stages": [
            {"id": stage.id, "kind": stage.kind, "status": "pending"}
            for stage in (*recipe.stages, *(() if _has_quantize(recipe) else (recipe.quantize_stage,)))
        ],
        "decisions": [],
        "gates": [],
        "artifacts": {},
    }


def _has_quantize(recipe: Recipe) -> bool:
    return isinstance(recipe.stages[-1], QuantizeStage)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def apply_recipe(
    recipe: Recipe,
    run: RunDirectory,
    target: Target | None,
    *,
    cache: StageCache | None = None,
    watch: Watch | None = None,
) -> Json:
    """Run every stage that is not complete yet; returns the manifest. `target` None means the machine at hand.

    A stage that `cache` holds is taken from there. `watch` sees every epoch of the stages that train, and may raise.
    """
    data = open_data(recipe.data)
    manifest = run.read_manifest()
    if "data" in manifest:
        require_same_data(manifest, data)
    require_fitting_teachers(recipe, data)
    trains = any(isinstance(stage, TrainingSettings) for stage in recipe.stages)
    splits = PreparedSplits(data, cache=trains)
    current, data = _initial_model(recipe, run, data, splits)
    console.note(f"run directory: {run.path}")
    earlier: dict[str, Checkpoint] = {}
    for stage in (*recipe.stages, *(() if _has_quantize(recipe) else (recipe.quantize_stage,))):
        if isinstance(stage, QuantizeStage) and workers.rank() != 0:
            break  # calibrated and placed by measuring: the first process alone does that
        entry = _entry(run.read_manifest(), stage.id)
        if entry["status"] == "complete":
            console.note(f"stage {stage.id}: complete, kept")
            stage_progress(run, stage.id).clear()  # left where the stage was completed and a crash came next
            if not isinstance(stage, QuantizeStage):
                current = load_checkpoint(run.stage(stage.id))
                earlier[stage.id] = current
            continue
        _update_entry(run, stage.id, {"status": "running", "started_at": _now()})
        started = time.perf_counter()
        zeros = 0.0 if isinstance(stage, DistillStage) and stage.model else weight_sparsity(current.module)
        work = _StageWork(recipe, stage, run, current, data, splits, target, earlier, watch)
        with run.replacing(run.stage(stage.id)):
            try:
                facts = work.run() if cache is None else work.run_cached(cache)
            except BaseException as error:
                _update_entry(run, stage.id, {"status": "failed", "error": str(error) or type(error).__name__})
                raise
            if not isinstance(stage, QuantizeStage):
                current = earlier[stage.id] = work.result
            facts |= {"status": "complete", "seconds": time.perf_counter() - started, "error": None}
            result = versioned({"id": stage.id, "kind": stage.kind, **facts})
            write_json(run.stage(stage.id) / "result.json", result)
            _update_entry(run, stage.id, facts)
            stage_progress(run, stage.id).clear()
        if workers.rank() == 0:
            kept = f"taken from {cache.folder}: " if cache is not None and "cache" in facts else ""
            accuracy = f"accuracy {facts['accuracy']:.2%} ({facts['accuracy_split']})"
            console.note(f"stage {stage.id}: {kept}{accuracy}; {facts['summary']}")
            _warn_of_lost_zeros(run, stage.id, zeros, facts["sparsity"])
            _warn_of_one_answer(run, stage.id, facts, data)
    if workers.rank() != 0:
        return run.read_manifest()
    return run.update_manifest(lambda m: _finish(m, recipe, run, target or own_target()))


def _warn_of_lost_zeros(run: RunDirectory, stage_id: str, before: float, after: float) -> None:
    text = lost_zeros(stage_id, before, after)
    if text is not None:
        console.warn(text)
        run.update_manifest(lambda m: m["notes"].append(text))


def _warn_of_one_answer(run: RunDirectory, stage_id: str, facts: Json, data: ImageData) -> None:
    """A model that takes every image for one class has an accuracy too: that class's share of the images."""
    label = facts.get("constant_class")
    if label is None:
        return
    text = (
        f"stage {stage_id}: the model takes every image for '{data.class_names[label]}', so its accuracy is that "
        "class's share of the images and says nothing; train it longer or with a lower learning_rate."
    )
    console.warn(text)
    run.update_manifest(lambda m: m["notes"].append(text) if text not in m["notes"] else None)


def _initial_model(
    recipe: Recipe, run: RunDirectory, data: ImageData, splits: PreparedSplits
) -> tuple[Checkpoint, ImageData]:
    """Build the recipe's model; where weights come with it, evaluate it as the baseline."""
    seed_everything(recipe.seed)
    created = create_model(recipe.model, data)
    require_trained_head(recipe, created.new_head, data)
    data = data.with_num_classes(created.architecture.num_classes)
    for text in created.notes:
        console.warn(text)
    checkpoint = Checkpoint(created.module.eval(), created.architecture)
    notes = [*data.notes, *created.notes]
    if not recipe.has_trained_weights:
        text = "The model has random weights: its accuracy and parity mean nothing, only its speed and size do."
        console.warn(text + " Give model.checkpoint or model.pretrained: true, or a train stage.")
        notes.insert(0, text)
    baseline: Json | None = run.read_manifest().get("baseline")
    if not isinstance(recipe.stages[0], TrainStage) and baseline is None and workers.rank() == 0:
        baseline = _evaluate_initial(run, checkpoint, data, splits)

    def change(manifest: Json) -> None:
        manifest["data"] = data.describe()
        manifest["model"] = _describe_model(created)
        manifest["notes"] = list(dict.fromkeys(notes))
        if baseline is not None:
            manifest["baseline"] = baseline

    run.update_manifest(change)
    if baseline is not None and recipe.has_trained_weights and baseline["id"] == INITIAL:
        _warn_of_one_answer(run, INITIAL, baseline, data)
    return checkpoint, data


def _describe_model(created: CreatedModel) -> Json:
    return {
        "name": created.architecture.name,
        "weights": created.weights,
        "num_classes": created.architecture.num_classes,
        "preprocessing": created.architecture.preprocessing.to_dict(),
        "notes": list(created.notes),
    }


def _evaluate_initial(run: RunDirectory, checkpoint: Checkpoint, data: ImageData, splits: PreparedSplits) -> Json:
    with run.replacing(run.stage(INITIAL)):
        save_checkpoint(checkpoint, run.stage(INITIAL))
        facts = _evaluate(run, INITIAL, checkpoint, data, splits)
    console.note(f"given model: accuracy {facts['accuracy']:.2%} ({facts['accuracy_split']})")
    return {"id": INITIAL, **facts}


def _evaluate(
    run: RunDirectory, stage_id: str, checkpoint: Checkpoint, data: ImageData, splits: PreparedSplits
) -> Json:
    preprocessing = checkpoint.architecture.preprocessing
    split = splits.get(data.report_split, preprocessing)
    # A copy, since a layout stays: a later stage would compute other last bits than one that goes on from disk.
    module = copy_of(checkpoint.module).to(memory_format=torch.channels_last)
    logits = collect_logits(module, split, preprocessing, description=f"evaluating {stage_id}")
    save_answers(run, stage_id, logits, split.labels)
    cost = cost_entry(run, checkpoint, stage_id, example_input(checkpoint.architecture))
    return evaluation_entry(logits, split.labels, data.report_split) | cost


@dataclass
class _StageWork:
    """One stage of a run that is to be done: computed, or taken from a cache."""

    recipe: Recipe
    stage: Stage
    run_directory: RunDirectory
    current: Checkpoint
    data: ImageData
    splits: PreparedSplits
    target: Target | None
    earlier: dict[str, Checkpoint]
    watch: Watch | None
    result: Checkpoint = field(init=False)

    def run(self) -> Json:
        """Compute the stage; returns its facts. `result` holds the new model of a float stage."""
        seed_everything(self.recipe.seed)
        if not isinstance(self.stage, QuantizeStage):
            return self._train(self.stage)
        shared = (self.current, self.data, self.splits, self.target)
        return run_quantize_stage(self.recipe, self.stage, self.run_directory, *shared)

    def run_cached(self, cache: StageCache) -> Json:
        """Take the stage from the cache, or compute it and keep it there."""
        key = stage_key(
            self.stage,
            recipe=self.recipe,
            run=self.run_directory,
            current=self.current,
            earlier=self.earlier,
            data=self.data,
            target=self.target,
        )
        with cache.alone(key):
            facts = cache.restore(key, self.run_directory, self.stage.id)
            if facts is not None:
                if not isinstance(self.stage, QuantizeStage):
                    self.result = load_checkpoint(self.run_directory.stage(self.stage.id))
                return facts
            started = time.perf_counter()
            facts = self.run()
            seconds = time.perf_counter() - started
            cache.keep(key, self.run_directory, self.stage.id, facts, seconds=seconds)
            return dict(facts)

    def _train(self, stage: TrainStage | DistillStage | PruneStage | FactorizeStage) -> Json:
        run = self.run_directory
        labels: Json = {"stage": stage.id}
        context = training_context(
            self.recipe,
            run,
            self.data,
            self.splits,
            self.target,
            labels,
            earlier=self.earlier.__getitem__,
            progress=stage_progress(run, stage.id),
            watch=self.watch,
        )
        if isinstance(stage, PruneStage):
            outcome = prune_stage(stage, self.current, context)
        elif isinstance(stage, FactorizeStage):
            outcome = factorize_stage(stage, self.current, context)
        else:
            outcome = run_stage(stage, self.current, context)
        self.result = outcome.checkpoint
        save_checkpoint(outcome.checkpoint, run.stage(stage.id))
        if workers.rank() != 0:
            return {}
        facts = _evaluate(run, stage.id, outcome.checkpoint, self.data, self.splits)
        return facts | {"epochs": outcome.epochs, "summary": outcome.summary}


def _entry(manifest: Json, stage_id: str) -> Json:
    for entry in manifest["stages"]:
        if entry["id"] == stage_id:
            return dict(entry)
    raise RunError(f"run.json: no stage '{stage_id}'")


def _update_entry(run: RunDirectory, stage_id: str, facts: dict[str, Any]) -> None:
    def change(manifest: Json) -> None:
        for entry in manifest["stages"]:
            if entry["id"] == stage_id:
                entry.update(facts)

    run.update_manifest(change)


def _finish(manifest: Json, recipe: Recipe, run: RunDirectory, target: Target) -> None:
    """Baseline, gates and hashes, once every stage is complete."""
    manifest.setdefault("baseline", {"id": manifest["stages"][0]["id"], **_costs(manifest["stages"][0])})
    baseline = manifest["baseline"]
    gates = []
    if not recipe.has_trained_weights:
        sentence = "The model has random weights; train it, or give model.checkpoint or model.pretrained."
        gates.append(Gate("trained_weights", False, True, False, sentence, "apply"))
    for stage_id in (last_float_id(recipe), recipe.quantize_stage.id):
        if stage_id != baseline["id"]:
            value = float(_entry(manifest, stage_id)["accuracy"])
            gates.append(accuracy_gate(value, baseline, recipe.gates.max_accuracy_drop, stage_id))
    record_gates(manifest, gates, step="apply")
    record_gates(manifest, _speed_gates(manifest, target), step="apply", target=target.name)
    manifest["artifacts"] = run.artifacts(manifest.get("artifacts"))


def _speed_gates(manifest: Json, target: Target) -> list[Gate]:
    """The gate on int8's speed where it was measured for this target and the interval decides it."""
    decided = decision_of(manifest, "placement") or {"value": {}}
    measured = decided["value"].get("final") or decided["value"]
    if decided["value"].get("target") != target.name or measured.get("speedup") is None:
        return []
    gate = speed_gate(measured, target.name, target.budgets.min_int8_speedup)
    return [gate] if gate is not None else []


def _costs(entry: Json) -> Json:
    keys = ("accuracy", "accuracy_split", "accuracy_ci95", "samples", "params", "macs", "sparsity", "size_bytes")
    return {key: entry[key] for key in keys}
