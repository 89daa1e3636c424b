"""`--dry-run`: what a command would do, with time, disk and memory, and nothing done.

What enters: a recipe, targets, and the probe of its models. What leaves: one row a step. Estimates are for deciding
whether to start: training follows from the probe; calibration and measuring are rough.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompress.data.images import available_memory_bytes
from edgecompress.data.run_data import ImageData, open_data
from edgecompress.run_directory import Json
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import DistillStage, QatStage, QuantizeStage, Recipe
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.steps.probe import ModelProbe, probe_model
from edgecompress.training.teaching import require_fitting_teachers, require_loadable_teachers

# Seconds of int8 beyond capture, in forward passes of its calibration images: from the times of EfficientNet-Lite0's
# 64 images in docs/measurements.md (15, 33 and 67 s), less what capture and export take of any net.
_QUANTIZE_PASSES = {"fast": 9.0, "balanced": 28.0, "best": 63.0}
_CAPTURE_SECONDS, _PLACEMENT_SECONDS, _EXPORT_SECONDS, _PROFILE_SECONDS, _REPORT_SECONDS = 6.0, 4.0, 4.0, 8.0, 3.0
_PARITY_PASSES = 4.0  # fp32, int8, and both in the variants of parity
_FLOAT, _INT8_BYTES, _REPORT_BYTES = 4, 1.2, 1_000_000  # bytes of a weight, with its scales; of a page
_STATE_COPIES = 3  # weights, momentum and the best epoch, while a stage trains


def plan_document(
    recipe: Recipe,
    output: Path,
    targets: Sequence[str],
    *,
    complete: Sequence[str],
    profiled_for: float | None,
    command: str,
) -> Json:
    """The plan as JSON: the steps, their totals, what the machine has, and what would not fit. Raises InputError."""
    started = time.perf_counter()
    data = data_at_hand(recipe)
    require_fitting_teachers(recipe, data)
    probes = probed(recipe, data)
    images = images_of(recipe, data)
    steps = planned_steps(recipe, targets, images, probes, profile_seconds=profiled_for, complete=complete)
    return {
        "dry_run": True,
        "command": command,
        "output": str(output),
        "recipe": recipe.name,
        "targets": list(targets),
        "data": data_facts(data),
        "steps": steps,
        **beside_machine(output, totals(steps, probes)),
        "probe": {"seconds": time.perf_counter() - started, "how": how_probed(probes)},
    }


def data_at_hand(recipe: Recipe) -> ImageData:
    """The recipe's data; a plan fetches nothing. Raises DataError where it is not there."""
    return open_data(recipe.data.model_copy(update={"download": False}))


def probed(recipe: Recipe, data: ImageData) -> dict[str, ModelProbe]:
    """The probe of each model, by the stage that brings it in. Raises ModelError where a checkpoint does not load."""
    require_loadable_teachers(recipe, data)
    models = models_to_probe(recipe)
    return {stage: probe_model(model, recipe, data, settings) for stage, (model, settings) in models.items()}


def data_facts(data: ImageData) -> Json:
    """The data as a plan names it."""
    return {"name": data.name, "splits": {name: len(split) for name, split in data.splits.items()}}


def how_probed(probes: Mapping[str, ModelProbe]) -> str:
    """What an estimate rests on, in words."""
    return f"{len(probes)} model(s), a few batches of up to {max(p.batch_size for p in probes.values())} images"


def beside_machine(output: Path, sums: Json) -> Json:
    """The sums of a plan beside what the machine has, and a warning for each that would not fit."""
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free, available = shutil.disk_usage(place).free, available_memory_bytes()
    warnings = []
    if sums["disk_bytes"] > free:
        warnings.append(f"disk: {sums['disk_bytes'] / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free at {place}")
    if sums["memory_bytes"] > available:
        warnings.append(
            f"memory: {sums['memory_bytes'] / 1e9:.1f} GB wanted, {available / 1e9:.1f} GB available; lower batch_size"
        )
    return {**sums, "free_disk_bytes": free, "available_memory_bytes": available, "warnings": warnings}


@dataclass(frozen=True)
class Images:
    """How many images each part of the work passes through."""

    train: int
    val: int
    report: int


def models_to_probe(recipe: Recipe) -> dict[str, tuple[ModelSettings, TrainingSettings | None]]:
    """The recipe's model and the students of its stages, by the stage that brings them in ("" is the recipe's own)."""
    stages = [stage for stage in recipe.stages if isinstance(stage, TrainingSettings)]
    own = next((stage for stage in stages if not (isinstance(stage, DistillStage) and stage.model)), None)
    found: dict[str, tuple[ModelSettings, TrainingSettings | None]] = {"": (recipe.model, own)}
    found |= {s.id: (s.model, s) for s in stages if isinstance(s, DistillStage) and s.model is not None}
    return found


def images_of(recipe: Recipe, data: ImageData) -> Images:
    """Sizes of the splits; the reported one as parity bounds it."""
    sizes = {name: len(split) for name, split in data.splits.items()}
    return Images(sizes["train"], sizes["val"], min(sizes[data.report_split], recipe.gates.max_samples))


def planned_steps(
    recipe: Recipe,
    targets: Sequence[str],
    images: Images,
    probes: Mapping[str, ModelProbe],
    *,
    profile_seconds: float | None,
    complete: Sequence[str] = (),
) -> list[Json]:
    """One row a stage, and with `profile_seconds` those of export, profile and report; `complete` take no time."""
    probe, share = probes[""], 1.0  # the model in hand, and what is left of its work
    trains = any(isinstance(stage, TrainingSettings) for stage in recipe.stages)
    decoded = images.train + images.val + images.report if trains else images.report
    steps = [
        _row(
            "data",
            f"decode {decoded:,} images" + (" once, and keep them in memory" if trains else ""),
            decoded * probe.decode_seconds,
            0,
            probe.memory_bytes + decoded * probe.image_bytes * trains,
        )
    ]
    held = decoded * probe.image_bytes * trains
    stages = [*recipe.stages, *(() if isinstance(recipe.stages[-1], QuantizeStage) else (recipe.quantize_stage,))]
    for stage in stages:
        probe, before = probes.get(stage.id, probe), share
        if stage.id in probes:
            before = share = 1.0
        share = before * _share_left(stage)
        seconds, memory = 0.0, probe.memory_bytes + held
        if isinstance(stage, TrainingSettings):
            seconds += _training_seconds(stage, images, probe, probes[""]) * before
            memory = probe.memory_of(stage.batch_size) + held
        if isinstance(stage, QuantizeStage):
            samples = min(stage.calibration.samples, images.train)
            passes = samples * _QUANTIZE_PASSES[stage.effort] + 2 * images.report
            seconds += _CAPTURE_SECONDS + passes * probe.forward_seconds * share
            seconds += _PLACEMENT_SECONDS if stage.placement == "auto" else 0.0
        seconds += images.report * probe.forward_seconds * share
        bytes_each = _INT8_BYTES if isinstance(stage, QuantizeStage) else _FLOAT
        disk = int(probe.params * share * bytes_each) + images.report * probe.classes * _FLOAT
        done = stage.id in complete
        steps.append(_row(stage.id, _what(stage), 0.0 if done else seconds, 0 if done else disk, memory, done=done))
    if profile_seconds is not None:
        weights = int(probe.params * share * _FLOAT)
        for target in targets:
            parity = _PARITY_PASSES * images.report * probe.forward_seconds * share
            files = weights + weights // 4 + probes[""].params * _FLOAT
            memory = probe.memory_bytes + 2 * weights
            steps.append(
                _row(f"export {target}", "fp32 and int8 ONNX, parity", _EXPORT_SECONDS + parity, files, memory)
            )
            seconds = profile_seconds + _PROFILE_SECONDS
            steps.append(_row(f"profile {target}", "measured where the target is at hand", seconds, 50_000, memory))
        steps.append(_row("report", "one page a target", _REPORT_SECONDS, _REPORT_BYTES * len(targets), 0))
    return steps


def totals(steps: Sequence[Json], probes: Mapping[str, ModelProbe]) -> Json:
    """Sum of time and disk, the state of a stage that trains included; peak of memory."""
    state = max(probe.params for probe in probes.values()) * _FLOAT * _STATE_COPIES
    return {
        "seconds": sum(step["seconds"] for step in steps),
        "disk_bytes": sum(step["disk_bytes"] for step in steps) + state,
        "memory_bytes": max(step["memory_bytes"] for step in steps),
    }


def _row(step: str, what: str, seconds: float, disk: int, memory: int, *, done: bool = False) -> Json:
    figures = {"seconds": seconds, "disk_bytes": int(disk), "memory_bytes": int(memory)}
    return {"step": step, "done": done, "what": "complete, kept" if done else what, **figures}


def _training_seconds(stage: TrainingSettings, images: Images, probe: ModelProbe, teacher: ModelProbe) -> float:
    epochs = _epochs(stage)
    an_epoch = images.train * probe.train_seconds + images.val * probe.forward_seconds
    taught = getattr(stage, "teacher", None) is not None or isinstance(stage, QatStage)
    return epochs * (an_epoch + images.train * teacher.forward_seconds * taught)


def _epochs(stage: TrainingSettings) -> int:
    steps, between = getattr(stage, "steps", 1), getattr(stage, "epochs_between", 0)
    return int(stage.epochs + (steps - 1) * between)


def _share_left(stage: object) -> float:
    """What a stage leaves of the model's work, at most: what is only known by measuring counts as nothing saved."""
    if not isinstance(stage, PruneStage):
        return 1.0
    if stage.channel_ratio is not None:
        return (1.0 - stage.channel_ratio) ** 2
    return 1.0 - (stage.macs_ratio or stage.params_ratio or 0.0)


def _what(stage: object) -> str:
    if isinstance(stage, QatStage):
        return f"int8 that learns: {stage.epochs} epochs"
    if isinstance(stage, QuantizeStage):
        return f"int8 from {stage.calibration.samples} images, effort {stage.effort}, placement {stage.placement}"
    assert isinstance(stage, TrainingSettings)
    taught = " with a teacher" if getattr(stage, "teacher", None) is not None else ""
    if isinstance(stage, PruneStage | FactorizeStage):
        return f"{stage.kind}, then finetune for {_epochs(stage)} epochs{taught}"
    return f"train for {stage.epochs} epochs{taught}"
