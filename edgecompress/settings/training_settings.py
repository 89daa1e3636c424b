"""Settings of every stage that trains: how long, how fast, and what is done to the images.

What enters: a part of a stage in a recipe. What leaves: frozen settings, which the training loop reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from edgecompress.settings.configuration import ClosedFraction, FrozenSettings


class AugmentSettings(FrozenSettings):
    """Random changes to training images, made on whole batches."""

    horizontal_flip: bool = False
    shift_pixels: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="random shift by up to this many pixels in each direction"
    )
    crop_min_area: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="random square crops of between this share of the image and all of it"
    )
    randaugment_operations: Annotated[int, Field(ge=1, le=8)] = Field(
        default=2, description="operations of one RandAugment draw"
    )
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] | None = Field(
        default=None, description="strength of RandAugment; left out, there is none"
    )
    erase_probability: ClosedFraction = Field(default=0.0, description="share of images that lose a random square")
    mixup_alpha: Annotated[float, Field(ge=0)] = Field(default=0.0, description="mixup of image pairs; 0 for none")
    cutmix_alpha: Annotated[float, Field(ge=0)] = Field(default=0.0, description="CutMix of image pairs; 0 for none")

    @property
    def is_none(self) -> bool:
        """Whether every epoch sees every image as it is."""
        return self == AugmentSettings(randaugment_operations=self.randaugment_operations)

    @property
    def mixes(self) -> bool:
        """Whether images, and their labels with them, are mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class TrainingSettings(FrozenSettings):
    """Settings of every stage that trains. One cosine schedule with a linear warm-up runs over `epochs`."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: PositiveInt = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: ClosedFraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: ClosedFraction = 0.0
    gradient_clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="an exponential moving average of the weights is judged and handed on in their place",
    )
    keep: Literal["last", "best_val"] = Field(
        default="last", description="which epoch's weights leave the stage; never chosen on test"
    )
    early_stop_epochs: PositiveInt | None = Field(
        default=None, description="stop after this many epochs without a better val accuracy; needs keep: best_val"
    )
    augment: AugmentSettings = AugmentSettings()

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingSettings:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs:g}) must be below epochs ({self.epochs}); set warmup_epochs: 0"
            )
        if self.early_stop_epochs is not None and self.keep != "best_val":
            raise ValueError(
                "early_stop_epochs needs keep: best_val, or the weights of a worse epoch would leave the stage"
            )
        return self
