"""The stages that prune: cutting channels, or zeroing weights. Each is a function from a checkpoint to a new one.

What enters: the checkpoint of the stage before, the stage's settings, prepared data. What leaves: a `StageOutcome`
whose checkpoint is smaller or sparser, finetuned between the steps and after them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edgecompress import console
from edgecompress.data.statistics_batches import statistics_batches
from edgecompress.errors import PruningError
from edgecompress.measure.latency_trial import latency_trials
from edgecompress.models.checkpoint import Checkpoint, example_input
from edgecompress.models.complexity import Complexity, measure_complexity
from edgecompress.models.model_building import copy_of
from edgecompress.pruning.prune import ChannelPruner, Widths, reestimate_batch_norm
from edgecompress.pruning.ratio_search import EXPECTED_COUNTS, Plan, RatioSearch
from edgecompress.pruning.weight_masks import WeightMasks
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.stages.train_stages import Json, StageContext, StageOutcome, fit_stage, stage_loss
from edgecompress.training.teaching import describe_teaching

# A plan that removes this much more than was asked for is worth a word: the channel multiple is coarse for so few.
_OVERSHOOT = 0.03


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
        scoring_batches=list(
            statistics_batches(train, architecture.preprocessing, stage.batch_size, context.recipe.seed)
        ),
    )
    widths_at = _widths_by_step(stage, pruner, current, context)
    pristine = Checkpoint(module, architecture, current.history)
    loss = stage_loss(stage, stage.teacher, pristine, context)
    spent = 0
    for step in range(1, stage.steps + 1):
        scored = pruner.score()
        pruner.cut_to(widths_at(step / stage.steps, scored), scored)
        batches = statistics_batches(train, architecture.preprocessing, stage.batch_size, context.recipe.seed)
        reestimate_batch_norm(module, (images for images, _ in batches))
        epochs = stage.epochs if step == stage.steps else stage.epochs_between
        if epochs:
            label = f"{step}/{stage.steps}"
            fit_stage(stage, pristine, context, loss=loss, epochs=epochs, seed_offset=step, step=label)
        spent += epochs
    after = measure_complexity(module, example)
    _require_removal(stage, before, after, multiple)
    history = current.history + pruner.history
    unscored = f", {len(pruner.unscored)} groups without batch norm left whole" if pruner.unscored else ""
    summary = (
        f"removed {1 - after.macs / before.macs:.1%} of the MACs and {1 - after.params / before.params:.1%} of the "
        f"parameters in {stage.steps} step(s) ({stage.scope} {stage.importance}), channels rounded to {multiple}"
        f"{unscored}; finetuned {spent} epochs"
        f"{' with ' + describe_teaching(stage.teacher, loss, spent) if stage.teacher else ''}"
    )
    return StageOutcome(Checkpoint(module, architecture, history), spent, summary)


WidthsAt = Callable[[float, dict[str, Tensor]], Widths]
"""(share of the way, scores now) -> the channels that each group keeps."""


def _widths_by_step(stage: PruneStage, pruner: ChannelPruner, current: Checkpoint, context: StageContext) -> WidthsAt:
    """A channel ratio ranks anew at every step; other targets are planned once, before the first cut, and recorded."""
    what, share = stage.target
    if what == "channel":
        return lambda progress, scored: pruner.plan(share, scored, progress=progress)
    decided = context.decide(f"channels:{stage.id}", lambda: _planned(stage, pruner, current, context))
    final: Widths = {name: int(count) for name, count in decided["widths"].items()}
    if final.keys() != pruner.initial.keys():
        raise PruningError(
            f"stage {stage.id}: the channels recorded in run.json are those of another network; start a new run"
        )
    return lambda progress, scored: pruner.part_of(final, progress)


def _planned(stage: PruneStage, pruner: ChannelPruner, current: Checkpoint, context: StageContext) -> tuple[Json, str]:
    """The plan that reaches the stage's target, as a decision."""
    what, share = stage.target
    scored = pruner.score()
    if what == "latency":
        preprocessing = current.architecture.preprocessing
        setting = f"stage {stage.id}: latency_ratio"
        with latency_trials(current.module, preprocessing, context.target, what=setting) as latency_of:
            plan = RatioSearch(pruner, scored).reaching_latency(share, latency_of)
    else:
        with console.progress(f"{stage.id}: planning {what}_ratio {share:g}", EXPECTED_COUNTS) as advance:
            plan = RatioSearch(pruner, scored, on_count=advance).reaching(what, share)
    why = f"{what}_ratio {share:g}: {_plan_words(plan)}"
    console.note(f"stage {stage.id}: {why}")
    if plan.removed(what) - share > _OVERSHOOT:
        console.warn(
            f"stage {stage.id}: {what}_ratio {share:g} asks for less than the {plan.removed(what):.1%} that go: "
            f"channels go in multiples of {pruner.multiple}; a lower channel_multiple, or scope: global, comes closer"
        )
    target = {"what": what, "share": share, "target": context.target.name}
    return {**plan.to_dict(), **target}, why


def _plan_words(plan: Plan) -> str:
    words = f"removes {plan.removed_macs:.1%} of the MACs, {plan.removed_params:.1%} of the parameters"
    if plan.latency is None:
        return words
    low, high = 1 - plan.latency.high, 1 - plan.latency.low
    return (
        f"{words} and {plan.removed('latency'):.1%} of the float latency (95 % interval {low:.1%} to {high:.1%}, "
        f"{len(plan.trials)} plans measured)"
    )


def prune_weights_stage(stage: PruneStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Zero the smallest weights in steps, finetuning with the zeros held after each."""
    checkpoint = Checkpoint(copy_of(current.module), current.architecture, current.history)
    masks = WeightMasks(checkpoint.module, stage=stage)
    if masks.skipped:
        console.warn(f"stage {stage.id}: pattern {stage.pattern} does not fit the inputs of {', '.join(masks.skipped)}")
    early = context.early_weights() if stage.rewind_epoch is not None else None
    taught = stage_loss(stage, stage.teacher, checkpoint, context)
    loss = masks.penalized(taught)
    spent = 0
    for step in range(1, stage.steps + 1):
        masks.step(step)
        if early is not None:
            masks.rewind(early)
        epochs = stage.epochs if step == stage.steps else stage.epochs_between
        if epochs:
            label = f"{step}/{stage.steps}"
            fit_stage(
                stage, checkpoint, context, loss=loss, epochs=epochs, seed_offset=step, step=label, after=masks.apply
            )
        spent += epochs
    how = f"pattern {stage.pattern}" if stage.pattern else f"{stage.scope} L1 magnitude"
    rewound = f", rewound to epoch {stage.rewind_epoch}" if early is not None else ""
    penalty = f" with an {stage.regularization.upper()} penalty" if stage.regularization else ""
    summary = (
        f"zeroed {masks.sparsity:.1%} of the weights ({how}, {stage.steps} step(s){rewound}), finetuned {spent} epochs"
        f"{penalty}{' with ' + describe_teaching(stage.teacher, taught, spent) if stage.teacher else ''}; "
        "ONNX Runtime's CPU kernels gain no speed from it, compressed files shrink"
    )
    return StageOutcome(checkpoint, spent, summary)


def _require_removal(stage: PruneStage, before: Complexity, after: Complexity, multiple: int) -> None:
    if after.params < before.params:
        return
    what, share = stage.target
    raise PruningError(
        f"stage {stage.id}: nothing was pruned: no layer lost a channel at {what}_ratio {share:g}. Channel counts are "
        f"rounded to the nearest multiple of {multiple} (channel_multiple); raise the ratio, lower channel_multiple, "
        "or check exclude"
    )
