"""The recipe's words for a teacher: which models teach, by which method, and how much they count.

What enters: the `teacher` block of any stage that trains. What leaves: `TeacherSettings`, frozen, in which every field
belongs to the method that was chosen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgecompress.settings.configuration import ClosedFraction, FrozenSettings
from edgecompress.settings.model_settings import Identifier, ModelSettings

DistillationMethod = Literal["kd", "dkd", "feature", "relation"]

_FIELDS_OF: dict[str, tuple[str, ...]] = {
    "dkd": ("target_weight", "nontarget_weight"),
    "feature": ("layers", "feature_weight"),
    "relation": ("between_classes_weight", "within_classes_weight"),
}


class TeacherSource(FrozenSettings):
    """One teacher: an earlier stage of the recipe, or a model with weights of its own."""

    stage: Identifier | None = None
    model: ModelSettings | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSource:
        if (self.stage is None) == (self.model is None):
            raise ValueError("give either stage (an earlier stage's id) or model (name and checkpoint)")
        return self

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"stage {self.stage}" if self.model is None else self.model.name


class TeacherSettings(FrozenSettings):
    """Who teaches a stage, and how. The same block serves distill, prune and qat."""

    stage: Identifier | None = None
    model: ModelSettings | None = None
    ensemble: Annotated[tuple[TeacherSource, ...], Field(max_length=16)] = Field(
        default=(), description="several teachers: the mean of their probabilities at the temperature"
    )
    method: DistillationMethod = Field(
        default="kd",
        description="kd: Hinton et al., 2015; dkd: Zhao et al., 2022; feature: kd and layers matched; relation: "
        "Huang et al., 2022",
    )
    temperature: Annotated[float, Field(gt=0)] = 4.0
    alpha: ClosedFraction = Field(default=0.7, description="weight of the teacher's term; 1 - alpha is the labels'")
    view: Literal["auto", "clean", "augmented"] = Field(
        default="auto",
        description="clean: the teacher sees each image once, as it is, and its logits are kept; augmented: it sees "
        "every batch as the student does; auto: clean where nothing is augmented, else augmented",
    )
    target_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="dkd: weight of target against non-target"
    )
    nontarget_weight: Annotated[float, Field(ge=0)] = Field(
        default=8.0, description="dkd: weight of the distribution among the other classes"
    )
    layers: dict[str, str] = Field(
        default_factory=dict, description="feature: student module to teacher module; left out, paired by size"
    )
    feature_weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="feature: weight of the layers' term, beside the labels' and the logits'"
    )
    between_classes_weight: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="relation: weight of how an image's classes relate"
    )
    within_classes_weight: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="relation: weight of how a class's images relate"
    )

    @model_validator(mode="after")
    def _one_teacher(self) -> TeacherSettings:
        if sum((self.stage is not None, self.model is not None, bool(self.ensemble))) != 1:
            raise ValueError(
                "give one of stage (an earlier stage's id), model (name and checkpoint) and ensemble (a list of these)"
            )
        if len(self.ensemble) == 1:
            raise ValueError("ensemble: one teacher is no ensemble; give its stage or model in its place")
        return self

    @model_validator(mode="after")
    def _fields_of_the_method(self) -> TeacherSettings:
        for method, names in _FIELDS_OF.items():
            # By value: the recipe that a run keeps names every field.
            strangers = [name for name in names if getattr(self, name) != _default(name)]
            if strangers and method != self.method:
                raise ValueError(
                    f"{', '.join(strangers)}: for method {method}, and method is {self.method}; "
                    f"set method: {method} or leave it out"
                )
        if self.method == "feature" and self.ensemble:
            raise ValueError("method feature reads the layers of one teacher; give stage or model in place of ensemble")
        if self.method == "feature" and self.view == "clean":
            raise ValueError("method feature needs the teacher's layers for every batch; leave view out")
        weights = [getattr(self, name) for name in _FIELDS_OF.get(self.method, ())]
        if self.method != "feature" and weights and not any(weights):
            raise ValueError(f"{' and '.join(_FIELDS_OF[self.method])} are both 0: the teacher would teach nothing")
        return self

    @property
    def sources(self) -> tuple[TeacherSource, ...]:
        """The teachers, one or several."""
        return self.ensemble or (TeacherSource(stage=self.stage, model=self.model),)

    @property
    def title(self) -> str:
        """The teacher and the numbers that matter most, for a stage's summary."""
        names = " and ".join(source.title for source in self.sources)
        how = f"{self.method}, temperature {self.temperature:g}, alpha {self.alpha:g}"
        return f"teacher{'s' if self.ensemble else ''} {names} ({how})"


def _default(name: str) -> object:
    return TeacherSettings.model_fields[name].get_default(call_default_factory=True)
