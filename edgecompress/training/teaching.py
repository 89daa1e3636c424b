"""A stage's teacher: from the recipe's block to the loss that its training descends.

What enters: the settings of a stage that trains, its student and its teachers. What leaves: a `TrainingLoss`. All
stages that have a teacher get it here, so that it is the same thing in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgecompress import console
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData, PreparedSplit
from edgecompress.errors import ModelError
from edgecompress.models.checkpoint import Checkpoint, example_input
from edgecompress.models.model_building import CreatedModel, copy_of, create_model, resolve_architecture
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DistillStage, Recipe
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.training.distill import DistillationLoss, TrainingLoss
from edgecompress.training.layer_matching import LayerMatcher
from edgecompress.training.precision import make_accelerator, resolve_precision
from edgecompress.training.teacher import FrozenTeacher, TeacherView, require_same_channels


def open_teachers(settings: TeacherSettings, data: ImageData, earlier: Callable[[str], Checkpoint]) -> list[Checkpoint]:
    """The models that `settings` names; `earlier` gives a stage's checkpoint. Raises ModelError."""
    opened = []
    for source in settings.sources:
        if source.model is None:
            assert source.stage is not None
            opened.append(earlier(source.stage))
            continue
        created = _created_teacher(source.model, data)
        for text in created.notes:
            console.warn(f"teacher {source.model.name}: {text}")
        if created.weights == "random":
            console.warn(
                f"the teacher {source.model.name} has random weights and can teach nothing: give its checkpoint, or "
                "pretrained: true"
            )
        opened.append(Checkpoint(created.module.eval(), created.architecture))
    return opened


def require_loadable_teachers(recipe: Recipe, data: ImageData) -> None:
    """Raise ModelError where the checkpoint of a stage's teacher cannot be loaded; nothing is downloaded."""
    for stage in recipe.stages:
        teacher = getattr(stage, "teacher", None)
        for source in teacher.sources if isinstance(teacher, TeacherSettings) else ():
            if source.model is not None and source.model.checkpoint is not None:
                _created_teacher(source.model, data)


def _created_teacher(settings: ModelSettings, data: ImageData) -> CreatedModel:
    # With the class count said, a checkpoint of other classes is refused; else it would get a new, untrained head.
    classes = resolve_architecture(settings, data).num_classes
    return create_model(settings.model_copy(update={"num_classes": classes}), data)


def require_fitting_teachers(recipe: Recipe, data: ImageData) -> None:
    """Raise ModelError where a stage's teacher cannot read what its student does: before hours of training, not after.

    Nothing is built or downloaded.
    """
    current = resolve_architecture(recipe.model, data).preprocessing
    made: dict[str, Preprocessing] = {}
    for stage in recipe.stages:
        if isinstance(stage, DistillStage) and stage.model is not None:
            current = resolve_architecture(stage.model, data).preprocessing
        made[stage.id] = current
        teacher = getattr(stage, "teacher", None)
        for source in teacher.sources if isinstance(teacher, TeacherSettings) else ():
            if source.model is not None:
                own = resolve_architecture(source.model, data).preprocessing
            else:
                assert source.stage is not None
                own = made[source.stage]
            try:
                require_same_channels(current, own)
            except ModelError as error:
                raise ModelError(f"stage {stage.id}: {error}") from error


def teaching_loss(
    stage: TrainingSettings,
    settings: TeacherSettings,
    teachers: Sequence[Checkpoint],
    student: Checkpoint,
    *,
    train: PreparedSplit,
    precision: str,
    seed: int,
) -> TrainingLoss:
    """The loss of a stage that `teachers` teach; `train` is the split that the student trains on, at its size.

    Raises ModelError when a teacher has other classes or channels than the student.
    """
    seen = student.architecture.preprocessing
    for teacher in teachers:
        if teacher.architecture.num_classes != student.architecture.num_classes:
            raise ModelError(
                f"the teacher {teacher.architecture.name} has {teacher.architecture.num_classes} classes and the "
                f"student {student.architecture.num_classes}; choose a teacher that was trained on the same classes"
            )
    views = [
        TeacherView(copy_of(t.module), student=seen, teacher_preprocessing=t.architecture.preprocessing)
        for t in teachers
    ]
    frozen = FrozenTeacher(views, temperature=settings.temperature)
    matcher = None
    if settings.method == "feature":
        example = example_input(teachers[0].architecture)
        matcher = LayerMatcher(views[0].teacher, example=example, layers=settings.layers, seed=seed)
    elif settings.view == "clean" or (settings.view == "auto" and stage.augment.is_none):
        accelerator = make_accelerator(resolve_precision(precision, student.module))
        frozen.keep(train, seen, device=accelerator.device, autocast=accelerator.autocast())
    return DistillationLoss(frozen, settings, label_smoothing=stage.label_smoothing, matcher=matcher)


def describe_teaching(settings: TeacherSettings, loss: TrainingLoss, epochs: int) -> str:
    """The teacher and what it cost in `epochs` epochs, for a stage's summary."""
    assert isinstance(loss, DistillationLoss)
    matched = f"; layers {loss.matcher.describe()}" if loss.matcher is not None else ""
    return f"{settings.title}{matched}; {loss.teacher.describe_cost(epochs)}"
