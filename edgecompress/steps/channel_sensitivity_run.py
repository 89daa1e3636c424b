"""The channels' part of `sensitivity`: what each coupled group of a run's model is worth, and ratios to prune by.

What enters: a run. What leaves: one document, and the figure beside it. The model is the one before the recipe's first
structured prune stage, or the last float one where there is none.
"""

from __future__ import annotations

import contextlib

import torch

from edgecompress import console
from edgecompress.data.run_data import calibration_indices, open_data
from edgecompress.data.statistics_batches import statistics_batches
from edgecompress.errors import PruningError, RunError
from edgecompress.measure.latency_trial import latency_trials
from edgecompress.measure.profiling import not_at_hand
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint
from edgecompress.models.model_building import copy_of
from edgecompress.pruning.channel_sensitivity import RATIOS, ChannelSensitivity, GroupSensitivity
from edgecompress.reporting.sensitivity_figure import sensitivity_svg
from edgecompress.run_directory import Json, RunDirectory, atomic_path
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import INITIAL_ID, Recipe
from edgecompress.settings.target import Target
from edgecompress.stages.train_stages import PreparedSplits
from edgecompress.steps.run_state import last_float_id, recipe_of, require_same_data

FIGURE = "sensitivity.svg"
_SETTLING_BATCH, _SETTLING_BATCHES = 64, 4


def channel_sensitivity_run(run: RunDirectory, target: Target, *, images: int, macs_ratio: float, timed: bool) -> Json:
    """Cut each group alone by a quarter, a half and three quarters, and judge it on up to `images` images of val.

    `timed` False leaves latency out. Raises RunError where the model to ask is not there, PruningError where it cannot
    be traced.
    """
    manifest = run.read_manifest()
    recipe = recipe_of(manifest)
    stage_id, stage = _subject(recipe)
    source = _load(run, stage_id)
    data = open_data(recipe.data).with_num_classes(source.architecture.num_classes)
    require_same_data(manifest, data)
    splits = PreparedSplits(data, cache=False)
    preprocessing = source.architecture.preprocessing
    val, train = splits.get("val", preprocessing), splits.get("train", preprocessing)
    chosen = torch.from_numpy(calibration_indices(val.labels.numpy(), images, recipe.seed))
    batches = statistics_batches(train, preprocessing, _SETTLING_BATCH, recipe.seed)
    measured = ChannelSensitivity(
        source.module,
        stage=stage,
        channel_multiple=stage.channel_multiple or target.channel_multiple,
        example=example_input(source.architecture),
        settle=[batch for batch, _ in zip(batches, range(_SETTLING_BATCHES), strict=False)],
        images=torch.cat([preprocessing.normalize(batch) for batch, _ in val.batches(64, indices=chosen)]),
        labels=val.labels[chosen],
    )
    reasons = not_at_hand(target) if timed else ["--no-latency was given"]
    with contextlib.ExitStack() as stack:
        latency_of = None
        if not reasons:
            trials = latency_trials(copy_of(source.module), preprocessing, target, what="sensitivity")
            latency_of = stack.enter_context(trials)
        advance = stack.enter_context(console.progress("cutting groups", len(RATIOS) * len(measured.pruner.initial)))
        rows = measured.measure(latency_of=latency_of, on_point=advance)
    document: Json = {
        "stage": stage_id,
        "split": "val",
        "images": len(chosen),
        "importance": stage.importance,
        "channel_multiple": measured.multiple,
        "target": target.name,
        "not_timed_because": reasons,
        "accuracy": measured.accuracy,
        "loss": measured.loss,
        "groups": [row.to_dict() for row in rows],
        "proposal": _proposal(measured, rows, macs_ratio),
    }
    figure = run.stage(recipe.quantize_stage.id) / FIGURE
    with run.replacing(figure), atomic_path(figure) as temporary:
        temporary.write_text(sensitivity_svg(document), encoding="utf-8")
    return document


def _proposal(measured: ChannelSensitivity, rows: list[GroupSensitivity], macs_ratio: float) -> Json:
    try:
        ratios, removed = measured.propose(rows, macs_ratio)
    except PruningError as error:
        return {"macs_ratio": macs_ratio, "layer_ratios": None, "removed_macs": None, "reason": str(error)}
    return {"macs_ratio": macs_ratio, "layer_ratios": ratios, "removed_macs": removed, "reason": None}


def _subject(recipe: Recipe) -> tuple[str, PruneStage]:
    """The stage whose model is asked, and the settings that channels are ranked and rounded by."""
    before = INITIAL_ID
    for stage in recipe.stages:
        if isinstance(stage, PruneStage) and stage.method == "structured":
            return before, stage
        before = stage.id
    ranking = PruneStage.model_validate({"kind": "prune", "id": "sensitivity", "channel_ratio": 0.5, "scope": "layer"})
    return last_float_id(recipe), ranking


def _load(run: RunDirectory, stage_id: str) -> Checkpoint:
    if not (run.stage(stage_id) / "model.json").is_file():
        raise RunError(f"{run.path}: stage {stage_id} is not complete; go on with: edgecompress apply --resume")
    return load_checkpoint(run.stage(stage_id))
