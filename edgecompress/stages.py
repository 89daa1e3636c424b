"""The stages that train: train, distill, prune, qat. Each is a function from a checkpoint to a new one.

What enters: the checkpoint of the stage before, the stage's settings, prepared data. What leaves: a
`StageOutcome`; for qat, which trains an int8 model, a `QatOutcome`. A stage never changes what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from edgecompress import console
from edgecompress.checkpoint import Checkpoint, example_input
from edgecompress.complexity import Complexity, measure_complexity
from edgecompress.data import ImageData, PreparedSplit
from edgecompress.distill import LossFunction, TeacherView, distillation_loss, label_loss
from edgecompress.errors import PruningError
from edgecompress.evaluate import accuracy, collect_logits
from edgecompress.int8.qat import TrainableInt8
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.models import create_model
from edgecompress.preprocessing import Preprocessing
from edgecompress.prune import ChannelPruner, WeightMasks, copy_of, reestimate_batch_norm
from edgecompress.recipe import (
    DistillStage,
    PruneStage,
    QatStage,
    Recipe,
    TeacherSettings,
    TrainingSettings,
    TrainStage,
)
from edgecompress.training import EpochRecord, FitResult, fit
from edgecompress.training_state import Progress

# Quantization-aware training against the float model itself: its probabilities as they are, and no labels, which it
# has already learned from.
_SELF_TEMPERATURE, _SELF_ALPHA = 1.0, 1.0

# Batches of training images that score channels (taylor) and re-estimate batch norm. Enough for a mean to settle.
_STATISTICS_BATCHES = 16


class PreparedSplits:
    """Decoded splits, one per (split, preprocessing), made when first asked for."""

    def __init__(self, data: ImageData, *, cache: bool) -> None:
        self._data = data
        self._cache = cache
        self._prepared: dict[tuple[str, Preprocessing], PreparedSplit] = {}

    def get(self, name: str, preprocessing: Preprocessing) -> PreparedSplit:
        """The split called `name`, at the size that `preprocessing` makes."""
        key = (name, preprocessing)
        if key not in self._prepared:
            self._prepared[key] = self._data.splits[name].prepare(preprocessing, cache=self._cache)
        return self._prepared[key]


@dataclass(frozen=True)
class StageContext:
    """What every stage may need beside its own settings."""

    recipe: Recipe
    data: ImageData
    splits: PreparedSplits
    channel_multiple: int
    earlier: Callable[[str], Checkpoint]
    on_epoch: Callable[[str, EpochRecord], None]
    """Called with the phase of the stage (a stage that cuts in steps fits several times) and each epoch's record."""
    progress: Progress | None = None
    """Where a fit saves how far it is; None saves nothing."""


@dataclass(frozen=True)
class StageOutcome:
    """The new checkpoint, epochs spent, and one sentence on what was done."""

    checkpoint: Checkpoint
    epochs: int
    summary: str


@dataclass(frozen=True)
class QatOutcome:
    """The better of the trained and the post-training int8 model, whether it is the trained one, and why, in words."""

    model: QuantizedModel
    is_trained: bool
    summary: str
    facts: dict[str, float | bool | int]


def run_stage(
    stage: TrainStage | DistillStage | PruneStage, current: Checkpoint, context: StageContext
) -> StageOutcome:
    """Run one stage that trains."""
    if isinstance(stage, TrainStage):
        return train_stage(stage, current, context)
    if isinstance(stage, DistillStage):
        return distill_stage(stage, current, context)
    if stage.method == "structured":
        return prune_channels_stage(stage, current, context)
    return prune_weights_stage(stage, current, context)


def train_stage(stage: TrainStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Train on the labels."""
    module = copy_of(current.module)
    checkpoint = Checkpoint(module, current.architecture, current.history)
    result = _fit(stage, checkpoint, context, loss=label_loss(stage.label_smoothing))
    return StageOutcome(checkpoint, stage.epochs, f"trained on labels for {stage.epochs} epochs{_precision(result)}")


def distill_stage(stage: DistillStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Train a student (a new model, or the current one) with a teacher's soft targets."""
    if stage.model is not None:
        torch.manual_seed(context.recipe.seed)
        created = create_model(stage.model, context.data)
        for text in created.notes:
            console.warn(f"stage {stage.id}: {text}")
        checkpoint = Checkpoint(created.module, created.architecture)
    else:
        checkpoint = Checkpoint(copy_of(current.module), current.architecture, current.history)
    loss = _teacher_loss(stage.teacher, stage.label_smoothing, checkpoint, context)
    result = _fit(stage, checkpoint, context, loss=loss)
    name = checkpoint.architecture.name
    return StageOutcome(
        checkpoint,
        stage.epochs,
        f"distilled {name} for {stage.epochs} epochs from {_teacher_name(stage.teacher)}{_precision(result)}",
    )


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
    loss = _finetuning_loss(stage, pristine, context)
    spent = 0
    for step in range(1, stage.steps + 1):
        pruner.step()
        batches = _statistics_batches(train, stage, architecture.preprocessing, context.recipe.seed)
        reestimate_batch_norm(module, (images for images, _ in batches))
        epochs = stage.epochs if step == stage.steps else stage.epochs_between
        if epochs:
            _fit(stage, pristine, context, loss=loss, epochs=epochs, seed_offset=step, step=f"{step}/{stage.steps}")
        spent += epochs
    after = measure_complexity(module, example)
    _require_removal(stage, before, after, multiple)
    history = current.history + pruner.history
    summary = (
        f"removed {1 - after.macs / before.macs:.1%} of the MACs and {1 - after.params / before.params:.1%} of the "
        f"parameters in {stage.steps} step(s), channels rounded to {multiple}; finetuned {spent} epochs"
        f"{' with ' + _teacher_name(stage.teacher) if stage.teacher else ''}"
    )
    return StageOutcome(Checkpoint(module, architecture, history), spent, summary)


def prune_weights_stage(stage: PruneStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Zero the smallest weights in steps, finetuning with the zeros held after each."""
    checkpoint = Checkpoint(copy_of(current.module), current.architecture, current.history)
    masks = WeightMasks(checkpoint.module, stage=stage)
    loss = _finetuning_loss(stage, checkpoint, context)
    spent = 0
    for step in range(1, stage.steps + 1):
        masks.step(step)
        epochs = stage.epochs if step == stage.steps else stage.epochs_between
        if epochs:
            label = f"{step}/{stage.steps}"
            _fit(stage, checkpoint, context, loss=loss, epochs=epochs, seed_offset=step, step=label, after=masks.apply)
        spent += epochs
    summary = (
        f"zeroed {masks.sparsity:.1%} of the weights ({stage.scope} L1 magnitude, {stage.steps} step(s)), "
        f"finetuned {spent} epochs; ONNX Runtime's CPU kernels gain no speed from it, compressed files shrink"
    )
    return StageOutcome(checkpoint, spent, summary)


def qat_stage(stage: QatStage, model: QuantizedModel, source: Checkpoint, context: StageContext) -> QatOutcome:
    """Train `model`, the int8 model that post-training quantization made of `source`, and keep the better of the two.

    Better is the higher val accuracy; at a tie, the lower cross-entropy on val. Always in fp32: bf16's own rounding
    is as coarse as the one to learn.
    """
    preprocessing = source.architecture.preprocessing
    trainable = TrainableInt8(model)
    if stage.teacher is not None:
        loss = _teacher_loss(stage.teacher, stage.label_smoothing, source, context)
        teacher = _teacher_name(stage.teacher)
    else:
        loss = distillation_loss(copy_of(source.module), temperature=_SELF_TEMPERATURE, alpha=_SELF_ALPHA)
        teacher = "the float model as teacher"
    val = context.splits.get("val", preprocessing)
    fit(
        trainable,
        settings=stage,
        epochs=stage.epochs,
        loss=loss,
        train=context.splits.get("train", preprocessing),
        val=val,
        preprocessing=preprocessing,
        precision="fp32",
        seed=context.recipe.seed * 1009,
        description=stage.id,
        on_epoch=partial(context.on_epoch, ""),
        layout_of=source.module,
        state=context.progress.phase(stage.id) if context.progress else None,
        shared=False,  # what it starts from was calibrated, and placed by measuring, in this process alone
    )
    trained = trainable.quantized(f"trained for {stage.epochs} epochs with {teacher}")
    scores: list[tuple[float, float]] = []
    for candidate, name in ((model, "post-training"), (trained, "trained")):
        logits = collect_logits(candidate.simulation(), val, preprocessing, description=f"evaluating {name} int8")
        scores.append((accuracy(logits, val.labels), -float(functional.cross_entropy(logits, val.labels))))
    before, after = scores
    is_better = after > before
    compared = f"val {after[0]:.2%} against {before[0]:.2%} (cross-entropy {-after[1]:.4f} against {-before[1]:.4f})"
    summary = (
        f"quantization-aware training helped: {compared}"
        if is_better
        else f"quantization-aware training did not help, so the post-training int8 model is kept: {compared}"
    )
    facts: dict[str, float | bool | int] = {
        "kept_trained": is_better,
        "val_accuracy": after[0],
        "val_accuracy_post_training": before[0],
        "epochs": stage.epochs,
    }
    return QatOutcome(trained if is_better else model, is_better, summary, facts)


def _fit(
    stage: TrainingSettings,
    checkpoint: Checkpoint,
    context: StageContext,
    *,
    loss: LossFunction,
    epochs: int | None = None,
    seed_offset: int = 0,
    step: str = "",
    after: Callable[[], None] = lambda: None,
) -> FitResult:
    preprocessing = checkpoint.architecture.preprocessing
    identifier = str(getattr(stage, "id", "train"))
    description = f"{identifier} {step}".strip()
    return fit(
        checkpoint.module,
        settings=stage,
        epochs=stage.epochs if epochs is None else epochs,
        loss=loss,
        train=context.splits.get("train", preprocessing),
        val=context.splits.get("val", preprocessing),
        preprocessing=preprocessing,
        precision=context.recipe.precision,
        seed=context.recipe.seed * 1009 + seed_offset,
        description=description,
        on_epoch=partial(context.on_epoch, step),
        after_step=after,
        state=context.progress.phase(description) if context.progress else None,
    )


def _finetuning_loss(stage: PruneStage, student: Checkpoint, context: StageContext) -> LossFunction:
    if stage.teacher is None:
        return label_loss(stage.label_smoothing)
    return _teacher_loss(stage.teacher, stage.label_smoothing, student, context)


def _teacher_loss(
    settings: TeacherSettings, label_smoothing: float, student: Checkpoint, context: StageContext
) -> LossFunction:
    if settings.stage is not None:
        teacher = context.earlier(settings.stage)
    else:
        assert settings.model is not None
        created = create_model(settings.model, context.data)
        teacher = Checkpoint(created.module, created.architecture)
        if created.weights == "random":
            console.warn("the teacher has random weights: give teacher.model.checkpoint or pretrained: true")
    view = TeacherView(
        copy_of(teacher.module),
        student=student.architecture.preprocessing,
        teacher_preprocessing=teacher.architecture.preprocessing,
    )
    return distillation_loss(
        view, temperature=settings.temperature, alpha=settings.alpha, label_smoothing=label_smoothing
    )


def _teacher_name(settings: TeacherSettings) -> str:
    name = f"stage {settings.stage}" if settings.stage else settings.model.name if settings.model else ""
    return f"teacher {name} (temperature {settings.temperature:g}, alpha {settings.alpha:g})"


def _precision(result: FitResult) -> str:
    return "" if result.mixed_precision == "no" else f" in {result.mixed_precision}"


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
