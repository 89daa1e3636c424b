"""The recipe: what to do to which model, on which data, and what must hold at the end.

What enters: a YAML file, or the name of a shipped recipe, and overrides. What leaves: one frozen
`Recipe`. Everything a run depends on is here, so a run directory that holds the resolved recipe can be
made again. Fields carry their units; ratios are fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from edgecompress.settings.configuration import ClosedFraction, Fraction, FrozenSettings, apply_overrides, validate
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.model_settings import Identifier, ModelSettings
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.search_space import refuse_search
from edgecompress.settings.spelling import did_you_mean
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.settings.yaml_files import find_settings, read_yaml_mapping

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]

INITIAL_ID = "initial"  # the folder of the model as the recipe gives it
DEFAULT_QUANTIZE_ID = "int8"  # the quantize stage of a recipe that names none


class DataSettings(FrozenSettings):
    """Which images. Splits are drawn with `split_seed` and never depend on the training seed."""

    name: Annotated[str, Field(min_length=1)]
    root: Path | None = None
    download: bool = False
    class_index: Path | None = None
    val_fraction: Fraction = 0.15
    test_fraction: Fraction = Field(default=0.2, description="only for sources without a test split of their own")
    split_seed: Seed = 0
    max_train_samples: PositiveInt | None = Field(default=None, description="a seeded, class-balanced subset")


class TrainStage(TrainingSettings):
    """Train the recipe's model on the labels."""

    kind: Literal["train"]
    id: Identifier


class DistillStage(TrainingSettings):
    """Train a student, `model`, with a teacher. `method` may stand here or, as in every other stage, in `teacher`."""

    kind: Literal["distill"]
    id: Identifier
    model: ModelSettings | None = Field(default=None, description="the student; left out, the current model")
    teacher: TeacherSettings

    @model_validator(mode="before")
    @classmethod
    def _method_belongs_to_the_teacher(cls, document: Any) -> Any:
        if not isinstance(document, dict) or not isinstance(document.get("teacher"), dict) or "method" not in document:
            return document
        teacher, rest = document["teacher"], {key: value for key, value in document.items() if key != "method"}
        if teacher.get("method", document["method"]) != document["method"]:
            raise ValueError(f"method is {document['method']} and teacher.method is {teacher['method']}; keep one")
        return {**rest, "teacher": {**teacher, "method": document["method"]}}


class CalibrationSettings(FrozenSettings):
    """How activation ranges are found. Images come from train, never from what is reported."""

    method: Literal["minmax", "percentile", "entropy", "mse", "histogram"] = Field(
        default="mse", description="mse: least squared error; histogram is an old name of it"
    )
    samples: PositiveInt = 256
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.999
    batch_size: PositiveInt = 32


class SchemeSettings(FrozenSettings):
    """Overrides of the target's int8 scheme."""

    activations: Literal["uint8", "int8"] | None = None
    weight_bits: Literal[7, 8] | None = None


class QuantizeStage(FrozenSettings):
    """Static int8 post-training quantization, laid out for ONNX Runtime's integer kernels."""

    kind: Literal["quantize"]
    id: Identifier
    calibration: CalibrationSettings = CalibrationSettings()
    effort: Literal["fast", "balanced", "best"] = Field(
        default="balanced",
        description="fast: round to nearest; balanced: error-compensated rounding and bias correction; best: the same, "
        "then all weights and scales tuned together towards the float logits (minutes)",
    )
    placement: Literal["auto", "full"] = Field(
        default="auto",
        description="full: all that can be int8; auto: the same if it is accurate and faster than fp32, else a search",
    )
    optimize: Literal["latency", "size"] = Field(
        default="latency", description="what placement looks for among placements that are accurate enough"
    )
    placement_trials: Annotated[int, Field(ge=1, le=200)] = Field(
        default=8, description="placements that the search exports and measures at most"
    )
    placement_seconds: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="time after which the search begins no further trial"
    )
    scheme: SchemeSettings = SchemeSettings()
    exclude: tuple[str, ...] = Field(default=(), description="module names, as globs, that stay in float")


class QatStage(TrainingSettings, QuantizeStage):
    """Quantization-aware training: a quantize stage whose weights and scales then learn, with the roundings in place.

    It is the recipe's int8 stage, wherever one is asked for. Left out, the teacher is the float model itself.
    """

    kind: Literal["qat"]  # type: ignore[assignment]  # the discriminator; all else of a quantize stage holds
    epochs: Annotated[int, Field(ge=1)] = 3
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=2e-4, description="weights are trained as a share of their channel's int8 range, so it fits any model"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.2
    teacher: TeacherSettings | None = None


Stage = Annotated[
    TrainStage | DistillStage | PruneStage | FactorizeStage | QuantizeStage | QatStage, Field(discriminator="kind")
]


class Gates(FrozenSettings):
    """What must hold for the exported files; a miss ends the command with exit code 3."""

    max_accuracy_drop: ClosedFraction = Field(
        default=0.02, description="last float stage and int8, each against the recipe's first model"
    )
    fp32_max_relative_diff: Annotated[float, Field(gt=0)] = Field(
        default=1e-3, description="largest logit difference PyTorch - ONNX, over the largest logit"
    )
    fp32_min_top1_agreement: ClosedFraction = 0.995
    int8_min_top1_agreement: ClosedFraction = Field(default=0.95, description="int8 ONNX against fp32 ONNX")
    torch_int8_min_top1_agreement: ClosedFraction = Field(default=0.995, description="int8 ONNX against int8 PyTorch")
    preprocessing_min_top1_agreement: ClosedFraction = Field(
        default=0.995,
        description="preprocessing inside against PIL: fp32's answers; for int8, how often it agrees with fp32",
    )
    max_class_accuracy_drop: ClosedFraction = Field(
        default=0.1, description="worst class, int8 against fp32; fails only where the drop is more than chance"
    )
    max_samples: PositiveInt = Field(default=10_000, description="images compared at most, a seeded choice")
    variant_samples: PositiveInt = Field(
        default=256, description="images for other batches, threads, formats and for preprocessing, a seeded choice"
    )


class Recipe(FrozenSettings):
    """A whole recipe, resolved."""

    name: Identifier
    description: str = ""
    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    data: DataSettings
    model: ModelSettings
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Recipe:
        seen: list[str] = []
        faults: list[str] = []
        for index, stage in enumerate(self.stages):
            if stage.id in seen:
                faults.append(f"stages.{stage.id}: two stages have this id; give each its own")
            if stage.id == INITIAL_ID:
                faults.append(f"stages.{stage.id}: this id is kept for the model as it was given; choose another")
            if stage.id == DEFAULT_QUANTIZE_ID and not isinstance(stage, QuantizeStage):
                faults.append(f"stages.{stage.id}: this id is kept for the quantize stage; choose another")
            teacher = getattr(stage, "teacher", None)
            if isinstance(stage, TrainingSettings) and teacher is not None:
                faults += [f"stages.{stage.id}.teacher{fault}" for fault in _teacher_faults(stage, teacher, seen)]
            if isinstance(stage, PruneStage) and stage.rewind_epoch is not None:
                before = self.stages[index - 1] if index else None
                if not isinstance(before, TrainStage | DistillStage):
                    faults.append(
                        f"stages.{stage.id}.rewind_epoch: the stage before it must be train or distill, whose early "
                        "weights are kept; leave rewind_epoch out"
                    )
                elif stage.rewind_epoch > before.epochs:
                    faults.append(
                        f"stages.{stage.id}.rewind_epoch: stage {before.id} has {before.epochs} epochs; "
                        f"give one of 1 to {before.epochs}"
                    )
            if isinstance(stage, QuantizeStage) and index != len(self.stages) - 1:
                faults.append(f"stages.{stage.id}: {stage.kind} must be the last stage; move it to the end")
            seen.append(stage.id)
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def quantize_stage(self) -> QuantizeStage:
        """The recipe's quantize stage, or the default one."""
        last = self.stages[-1]
        return last if isinstance(last, QuantizeStage) else QuantizeStage(kind="quantize", id=DEFAULT_QUANTIZE_ID)

    @property
    def has_trained_weights(self) -> bool:
        """Whether the weights that are exported come from a checkpoint, a hub or training here."""
        return self.model.checkpoint is not None or self.model.pretrained or self.trains

    @property
    def trains(self) -> bool:
        """Whether a stage trains float weights; `qat` only adapts what it is given to int8."""
        float_stages = (stage for stage in self.stages if not isinstance(stage, QuantizeStage))
        return any(isinstance(stage, TrainingSettings) for stage in float_stages)


def _teacher_faults(stage: TrainingSettings, teacher: TeacherSettings, earlier: Sequence[str]) -> list[str]:
    """What is wrong with a stage's teacher, each as `.field: what and how to mend it`."""
    faults = []
    for index, source in enumerate(teacher.sources):
        if source.stage is not None and source.stage not in earlier:
            place = f".ensemble.{index}.stage" if teacher.ensemble else ".stage"
            hint = did_you_mean(source.stage, earlier) if earlier else "; there is no earlier stage"
            faults.append(f"{place}: '{source.stage}' is no earlier stage{hint}")
    if isinstance(stage, QatStage) and teacher.method == "feature":
        faults.append(".method: an int8 graph has lost the modules that feature reads; use kd, dkd or relation")
    if stage.augment.mixes and teacher.view == "clean":
        faults.append(".view: mixed images have no clean view of their own; use view: augmented, or do not mix")
    return faults


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a file or a shipped name. Relative paths in it stay relative to the working directory.

    Raises ConfigurationError with every fault, or naming the shipped recipe spelled most alike.
    """
    document = read_recipe(source, overrides)
    refuse_search(document, source=source)
    return validate(Recipe, document, source=source)


def read_recipe(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's document as parsed, overrides applied, not yet validated: fields may hold what a search chooses.

    Raises ConfigurationError.
    """
    path = find_recipe(source)
    document = read_yaml_mapping(path)
    document.setdefault("name", path.stem)
    return apply_overrides(document, overrides)


def find_recipe(source: str) -> Path:
    """The file of a recipe given by path or by shipped name. Raises ConfigurationError."""
    return find_settings(source, kind="recipe")
