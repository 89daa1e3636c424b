"""The recipe's words for a model: which architecture, with which weights, and what the images are made into.

What enters: a mapping of the recipe. What leaves: `ModelSettings`, frozen. On its own because models and teachers are
both named this way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from edgecompress.settings.configuration import FrozenSettings

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=16)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]


class PreprocessingSettings(FrozenSettings):
    """Overrides of what the model's own configuration says; anything left out comes from the model."""

    input_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    channels: Literal[1, 3] | None = Field(default=None, description="1 reads images as grey, 3 as RGB")
    mean: Channels | None = None
    std: Channels | None = None
    interpolation: Interpolation | None = None
    crop_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the resized image that the centre crop keeps; 1 means no crop"
    )


class ModelSettings(FrozenSettings):
    """Which architecture, with which weights."""

    name: Annotated[str, Field(min_length=1)]
    arguments: dict[str, Any] = Field(default_factory=dict, description="passed to the model's constructor")
    checkpoint: Path | None = None
    pretrained: bool = False
    num_classes: PositiveInt | None = None
    preprocessing: PreprocessingSettings = PreprocessingSettings()

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> ModelSettings:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained are both given; keep one")
        return self
