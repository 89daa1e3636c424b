"""The stages that prune: cutting channels, or zeroing weights. Each is a function from a checkpoint to a new one.

What enters: the checkpoint of the stage before, the stage's settings, prepared data. What leaves: a `StageOutcome`
whose checkpoint is smaller or sparser, finetuned between the steps and after them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgecompress.checkpoint import Checkpoint, example_input
from edgecompress.complexity import Complexity, measure_complexity
from edgecompress.data import PreparedSplit
from edgecompress.errors import PruningError
from edgecompress.preprocessing import Preprocessing
from edgecompress.prune import ChannelPruner, WeightMasks, copy_of, reestimate_batch_norm
from edgecompress.recipe import PruneStage
from edgecompress.stages import StageContext, StageOutcome, fit_stage, stage_loss
from edgecompress.teaching import describe_teaching

# Batches of training images that score channels (taylor) and re-estimate batch norm. Enough for a mean to settle.
_STATISTICS_BATCHES = 16


def prune_stage(stage: PruneStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Run one prune stage, by its method."""
    if stage.method == "structured":
        return prune_channels_stage(stage, current, context)
    return prune_weights_stage(stage, current, context)


def prune_channels_stage(stage: PruneStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Cut channels in steps, re-estimating batch norm and finetuning after each."""
    module = copy_of(current.module)
    architecture = current.architecture
    example = example_input(architecture)
    before = measure_complexity(module, example)
    multiple = stage.channel_multiple or context.channel_multiple
    train = context.splits.get("train", architecture.preprocessing)
    pruner = ChannelPruner(
        module,
        stage=stage,
        channel_multiple=multiple,
        example=example,
        scoring_batches=list(_statistics_batches(train, stage, architecture.preprocessing, context.recipe.seed)),
    )
    pristine = Checkpoint(module, architecture, current.history)
    loss = stage_loss(stage, stage.teacher, pristine, context)
    spent = 0
    for step in range(1, stage.steps + 1):
        pruner.step()
        batches = _statistics_batches(train, stage, architecture.preprocessing, context.recipe.seed)
        reestimate_batch_norm(module, (images for images, _ in batches))
        epochs = stage.epochs if step == stage.steps else stage.epochs_between
        if epochs:
            fit_stage(
                stage, pristine, context, loss=loss, epochs=epochs, seed_offset=step, step=f"{step}/{stage.steps}"
            )
        spent += epochs
    after = measure_complexity(module, example)
    _require_removal(stage, before, after, multiple)
    history = current.history + pruner.history
    summary = (
        f"removed {1 - after.macs / before.macs:.1%} of the MACs and {1 - after.params / before.params:.1%} of the "
        f"parameters in {stage.steps} step(s), channels rounded to {multiple}; finetuned {spent} epochs"
        f"{' with ' + describe_teaching(stage.teacher, loss, spent) if stage.teacher else ''}"
    )
    return StageOutcome(Checkpoint(module, architecture, history), spent, summary)


def prune_weights_stage(stage: PruneStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Zero the smallest weights in steps, finetuning with the zeros held after each."""
    checkpoint = Checkpoint(copy_of(current.module), current.architecture, current.history)
    masks = WeightMasks(checkpoint.module, stage=stage)
    loss = stage_loss(stage, stage.teacher, checkpoint, context)
    spent = 0
    for step in range(1, stage.steps + 1):
        masks.step(step)
        epochs = stage.epochs if step == stage.steps else stage.epochs_between
        if epochs:
            label = f"{step}/{stage.steps}"
            fit_stage(
                stage, checkpoint, context, loss=loss, epochs=epochs, seed_offset=step, step=label, after=masks.apply
            )
        spent += epochs
    summary = (
        f"zeroed {masks.sparsity:.1%} of the weights ({stage.scope} L1 magnitude, {stage.steps} step(s)), "
        f"finetuned {spent} epochs{' with ' + describe_teaching(stage.teacher, loss, spent) if stage.teacher else ''}; "
        "ONNX Runtime's CPU kernels gain no speed from it, compressed files shrink"
    )
    return StageOutcome(checkpoint, spent, summary)


def _statistics_batches(
    train: PreparedSplit, stage: PruneStage, preprocessing: Preprocessing, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(train), generator=generator)[: stage.batch_size * _STATISTICS_BATCHES]
    for images, labels in train.batches(stage.batch_size, indices=indices):
        yield preprocessing.normalize(images), labels


def _require_removal(stage: PruneStage, before: Complexity, after: Complexity, multiple: int) -> None:
    if after.params < before.params:
        return
    raise PruningError(
        f"stage {stage.id}: nothing was pruned: no layer lost a channel at channel_ratio {stage.channel_ratio}. "
        f"Channels are rounded to multiples of {multiple} (channel_multiple); raise channel_ratio, lower "
        "channel_multiple, or check exclude"
    )
