"""What a stage needs to train in a run: its data, its earlier stages, where to log, and what was decided before.

What enters: a recipe, a run directory and a target. What leaves: a `StageContext` that writes into the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from edgecompress import console
from edgecompress.data.run_data import ImageData
from edgecompress.models.checkpoint import Checkpoint, load_checkpoint
from edgecompress.run_directory import Json, RunDirectory
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import Recipe
from edgecompress.settings.target import Target, own_target
from edgecompress.stages.train_stages import PreparedSplits, StageContext, Watch
from edgecompress.steps.run_state import decision_of, record_decision
from edgecompress.training.training_loop import EpochRecord
from edgecompress.training.training_state import Progress
from edgecompress.training.workers import agreed

EARLY = "early.safetensors"  # in the folder of a stage whose early weights a later one goes back to


def training_context(
    recipe: Recipe,
    run: RunDirectory,
    data: ImageData,
    splits: PreparedSplits,
    target: Target | None,
    labels: Json,
    *,
    earlier: Callable[[str], Checkpoint] | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> StageContext:
    """What a stage needs to train in this run; `labels` go into each of its lines in metrics.jsonl.

    Left out, `earlier` reads an earlier stage from its folder. With `progress`, training goes on where it stopped.
    """

    def key(line: Json) -> tuple[object, ...]:
        return tuple(line.get(name) for name in ("stage", "phase", "epoch"))

    written = {key(line) for line in run.read_metrics()} if progress else set()

    def log(phase: str, record: EpochRecord) -> None:
        line = {**labels, "phase": phase, **record.__dict__}
        if key(line) not in written:  # a fit that goes on tells of its earlier epochs again
            run.append_metrics(line)

    def decide(what: str, make: Callable[[], tuple[Json, str]]) -> Json:
        def once() -> tuple[Json, str]:
            known = decision_of(run.read_manifest(), what)
            if known is None:
                return make()
            console.note(f"{what}: as recorded ({known['why']})")
            return known["value"], known["why"]

        value, why = agreed(once)
        run.update_manifest(lambda m: record_decision(m, what, value, why, stage=str(labels["stage"])))
        return value

    resolved = target or own_target()
    early_id, early_epoch = early_weights_of(recipe, str(labels["stage"]))
    return StageContext(
        recipe=recipe,
        data=data,
        splits=splits,
        channel_multiple=resolved.channel_multiple,
        target=resolved,
        decide=decide,
        earlier=earlier or (lambda stage_id: load_checkpoint(run.stage(stage_id))),
        on_epoch=log,
        watch=watch,
        progress=progress,
        early_path=None if early_id is None else run.stage(early_id) / EARLY,
        early_epoch=early_epoch,
    )


def early_weights_of(recipe: Recipe, stage_id: str) -> tuple[str | None, int | None]:
    """The stage that keeps early weights which this one needs or makes, and the epoch where it makes them."""
    for before, stage in itertools.pairwise(recipe.stages):
        if isinstance(stage, PruneStage) and stage.rewind_epoch is not None:
            if before.id == stage_id:
                return before.id, stage.rewind_epoch
            if stage.id == stage_id:
                return before.id, None
    return None, None


def stage_progress(run: RunDirectory, stage_id: str) -> Progress:
    """Where a stage's fits save how far they are."""
    return Progress(run.stage(stage_id) / "progress")
