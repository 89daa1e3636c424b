"""Settings of a factorize stage: how much of each layer's energy stays, or which share of the MACs goes.

What enters: one stage of a recipe. What leaves: a frozen `FactorizeStage`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgecompress.settings.configuration import Fraction
from edgecompress.settings.model_settings import Identifier
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.settings.training_settings import TrainingSettings


class FactorizeStage(TrainingSettings):
    """Replace convolutions and linear layers by two of low rank (truncated SVD), then finetune."""

    kind: Literal["factorize"]
    id: Identifier
    energy: Fraction | None = Field(
        default=None, description="share of each layer's squared singular values that stays; 0.9 is a start"
    )
    macs_ratio: Fraction | None = Field(
        default=None, description="in place of energy: share of all MACs to remove; one energy for all layers is found"
    )
    measured: bool = Field(
        default=True, description="factorize a layer only where two are faster than one, measured on the target"
    )
    exclude: tuple[str, ...] = Field(default=(), description="module names, as globs, that stay whole")
    teacher: TeacherSettings | None = None

    @model_validator(mode="after")
    def _one_goal(self) -> FactorizeStage:
        if (self.energy is None) == (self.macs_ratio is None):
            raise ValueError(
                "give either energy (the share of each layer's energy to keep) or macs_ratio (the share of the MACs to "
                "remove)"
            )
        return self
