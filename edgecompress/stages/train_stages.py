"""The stages that train a whole model: train, distill, qat. Each is a function from a checkpoint to a new one.

What enters: the checkpoint of the stage before, the stage's settings, prepared data. What leaves: a
`StageOutcome`; for qat, which trains an int8 model, a `QatOutcome`. A stage never changes what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from edgecompress import console
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData, PreparedSplit
from edgecompress.errors import RunError
from edgecompress.exporting.significance import SIGNIFICANT, mcnemar, p_of_drop, p_of_mean
from edgecompress.int8.qat import TrainableInt8
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.models.checkpoint import Checkpoint, example_input, save_weights
from edgecompress.models.model_building import copy_of, create_model
from edgecompress.settings.recipe import DistillStage, QatStage, Recipe, TrainStage
from edgecompress.settings.target import Target
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.training.distill import TrainingLoss, label_loss
from edgecompress.training.evaluate import collect_logits
from edgecompress.training.teaching import describe_teaching, open_teachers, teaching_loss
from edgecompress.training.training_loop import EpochRecord, FitResult, fit
from edgecompress.training.training_state import Progress
from edgecompress.training.workers import agreed

Json = dict[str, Any]

# Quantization-aware training against the float model itself: its probabilities as they are, and no labels, which it
# has already learned from.
_ITSELF = TeacherSettings(stage="itself", temperature=1.0, alpha=1.0)


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


class Decide(Protocol):
    """Gives the value recorded under `what`, or makes and records it; `make` returns the value and why."""

    def __call__(self, what: str, make: Callable[[], tuple[Json, str]]) -> Json: ...


class Watch(Protocol):
    """Sees the model of stage `stage_id` after each epoch, in training mode; may raise to end the stage there."""

    def __call__(self, stage_id: str, record: EpochRecord, checkpoint: Checkpoint) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """What every stage may need beside its own settings."""

    recipe: Recipe
    data: ImageData
    splits: PreparedSplits
    channel_multiple: int
    target: Target
    earlier: Callable[[str], Checkpoint]
    decide: Decide
    """Keeps what is found by measuring, so that a run that goes on does not find something else."""
    on_epoch: Callable[[str, EpochRecord], None]
    """Called with the phase of the stage (a stage that cuts in steps fits several times) and each epoch's record."""
    watch: Watch | None = None
    """Called after `on_epoch` with the model itself."""
    progress: Progress | None = None
    """Where a fit saves how far it is; None saves nothing."""
    early_path: Path | None = None
    """Early weights that a prune stage goes back to, in the folder of the stage before it, which trained them."""
    early_epoch: int | None = None
    """The epoch of this stage whose weights are kept there; None keeps none."""

    def early_weights(self) -> dict[str, Tensor]:
        """The early weights of the stage before. Raises RunError where they are not there."""
        path = self.early_path
        assert path is not None
        try:
            return agreed(lambda: load_file(path))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: early weights cannot be read ({error}); start a new run") from error


@dataclass(frozen=True)
class StageOutcome:
    """The new checkpoint, epochs spent, and one sentence on what was done."""

    checkpoint: Checkpoint
    epochs: int
    summary: str


@dataclass(frozen=True)
class QatOutcome:
    """The trained int8 model where training helped, else the post-training one; and why, in words and in numbers."""

    model: QuantizedModel
    is_trained: bool
    summary: str
    facts: dict[str, float | bool | int]


def run_stage(stage: TrainStage | DistillStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Run one stage that trains a whole model."""
    if isinstance(stage, TrainStage):
        return train_stage(stage, current, context)
    return distill_stage(stage, current, context)


def train_stage(stage: TrainStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Train on the labels."""
    module = copy_of(current.module)
    checkpoint = Checkpoint(module, current.architecture, current.history)
    result = fit_stage(stage, checkpoint, context, loss=label_loss(stage.label_smoothing))
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
    loss = stage_loss(stage, stage.teacher, checkpoint, context)
    result = fit_stage(stage, checkpoint, context, loss=loss)
    name = checkpoint.architecture.name
    return StageOutcome(
        checkpoint,
        stage.epochs,
        f"distilled {name} for {stage.epochs} epochs{_precision(result)} from "
        + describe_teaching(stage.teacher, loss, stage.epochs),
    )


def qat_stage(stage: QatStage, model: QuantizedModel, source: Checkpoint, context: StageContext) -> QatOutcome:
    """Train `model`, the int8 model that post-training quantization made of `source`; keep it where that helped.

    Whether it did, val says (`_compare`). Always in fp32: bf16's own rounding is as coarse as the one to learn.
    """
    preprocessing = source.architecture.preprocessing
    trainable = TrainableInt8(model)
    settings = stage.teacher or _ITSELF
    teachers = open_teachers(settings, context.data, context.earlier) if stage.teacher else [source]
    train = context.splits.get("train", preprocessing)
    loss = teaching_loss(stage, settings, teachers, source, train=train, precision="fp32", seed=context.recipe.seed)
    val = context.splits.get("val", preprocessing)
    with loss.watching(trainable, example_input(source.architecture)):
        fit(
            trainable,
            settings=stage,
            epochs=stage.epochs,
            loss=loss,
            train=train,
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
    teacher = describe_teaching(settings, loss, stage.epochs) if stage.teacher else "the float model as teacher"
    trained = trainable.quantized(f"trained for {stage.epochs} epochs with {teacher}")
    before, after = (
        collect_logits(each.simulation(), val, preprocessing, description=f"evaluating {name} int8")
        for each, name in ((model, "post-training"), (trained, "trained"))
    )
    # Where val has chosen the epoch as well, the best of several is compared.
    tries = stage.epochs if stage.keep == "best_val" else 1
    helped, summary, facts = _compare(before, after, val.labels, tries)
    return QatOutcome(trained if helped else model, helped, summary, facts | {"epochs": stage.epochs})


def _compare(
    before: Tensor, after: Tensor, labels: Tensor, tries: int = 1
) -> tuple[bool, str, dict[str, float | bool | int]]:
    """Whether training helped, said in words and in numbers, by the logits [N, classes] of both models on val.

    It did where no fewer images are right, and beyond chance either more are, or their Brier score (the squared error
    of the probabilities, 0 to 2; G. Brier, Monthly Weather Review 78, 1950) is lower. Right and wrong alone would
    refuse most true gains on a small split; without chance the better of two equals is kept, which a test split was
    seen to contradict. Each of the two tests has half of the 5 % at which both may err, shared among `tries`.
    """
    right_before, right_after = (logits.argmax(dim=1) == labels for logits in (before, after))
    change = mcnemar(right_before.numpy(), right_after.numpy())
    p_of_accuracy = p_of_drop(change.won, change.lost)
    score_before, score_after = (_brier_scores(logits, labels) for logits in (before, after))
    p_of_brier_score = p_of_mean((score_before - score_after).numpy())
    helped = change.won >= change.lost and min(p_of_accuracy, p_of_brier_score) < SIGNIFICANT / 2 / tries
    accuracy_before, accuracy_after = float(right_before.double().mean()), float(right_after.double().mean())
    verdict = "helped" if helped else "did not help beyond chance, so the post-training int8 model is kept"
    summary = (
        f"quantization-aware training {verdict}: val {accuracy_after:.2%} against {accuracy_before:.2%}, "
        f"{change.won} of {len(labels)} images won and {change.lost} lost (p = {p_of_accuracy:.2g}), "
        f"Brier score {float(score_after.mean()):.4f} against {float(score_before.mean()):.4f} "
        f"(p = {p_of_brier_score:.2g})"
    )
    facts = {
        "kept_trained": helped,
        "val_accuracy": accuracy_after,
        "val_accuracy_post_training": accuracy_before,
        "val_brier_score": float(score_after.mean()),
        "val_brier_score_post_training": float(score_before.mean()),
        "p_of_accuracy": p_of_accuracy,
        "p_of_brier_score": p_of_brier_score,
    }
    return helped, summary, facts


def _brier_scores(logits: Tensor, labels: Tensor) -> Tensor:
    probabilities = logits.double().softmax(dim=1)
    return (probabilities - functional.one_hot(labels, logits.shape[1])).square().sum(dim=1)


def fit_stage(
    stage: TrainingSettings,
    checkpoint: Checkpoint,
    context: StageContext,
    *,
    loss: TrainingLoss,
    epochs: int | None = None,
    seed_offset: int = 0,
    step: str = "",
    after: Callable[[], None] = lambda: None,
) -> FitResult:
    """Train a stage's module in place, with what the recipe and the run say; `after` follows every optimizer step."""
    preprocessing = checkpoint.architecture.preprocessing
    identifier = str(getattr(stage, "id", "train"))
    description = f"{identifier} {step}".strip()

    def on_epoch(record: EpochRecord) -> None:
        path = context.early_path
        # A fit that goes on tells of its earlier epochs again, with the weights of a later one.
        if path is not None and record.epoch == context.early_epoch and not path.is_file():
            save_weights(checkpoint.module, path)
        context.on_epoch(step, record)
        if context.watch is not None:
            context.watch(identifier, record, checkpoint)

    with loss.watching(checkpoint.module, example_input(checkpoint.architecture)):
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
            on_epoch=on_epoch,
            after_step=after,
            state=context.progress.phase(description) if context.progress else None,
        )


def stage_loss(
    stage: TrainingSettings,
    teacher: TeacherSettings | None,
    student: Checkpoint,
    context: StageContext,
) -> TrainingLoss:
    """What a stage descends: the labels' loss, or the teacher's beside it."""
    if teacher is None:
        return label_loss(stage.label_smoothing)
    return teaching_loss(
        stage,
        teacher,
        open_teachers(teacher, context.data, context.earlier),
        student,
        train=context.splits.get("train", student.architecture.preprocessing),
        precision=context.recipe.precision,
        seed=context.recipe.seed,
    )


def _precision(result: FitResult) -> str:
    return "" if result.mixed_precision == "no" else f" in {result.mixed_precision}"
