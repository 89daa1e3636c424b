"""`init`, the first half: what the user's data and model are, as far as a recipe depends on it.

What enters: settings of data and model as a recipe would have them. What leaves: facts, found by listing all images,
reading the headers of a few, and loading the weights; nothing is trained and nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from edgecompress.data.images import DECODE_ERRORS, FileItems
from edgecompress.data.run_data import ImageData, open_data
from edgecompress.models.model_building import create_model, resolve_architecture
from edgecompress.models.zoo import published_classes
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DataSettings

_HEADERS = 64
_SIDES = (16, 32, 48, 64, 96, 128, 160, 192, 224)  # inputs that small nets take well
_UNBALANCED = 3.0  # largest class over smallest, from which on it is said


@dataclass(frozen=True)
class DataFacts:
    """The images: how many, of how many classes, how even, how large. Sides are [smallest, median, largest] in px."""

    splits: dict[str, int]
    num_classes: int
    has_class_index: bool
    classes_in_train: int
    channels: int
    native_size: int | None
    smallest_class: tuple[str, int]
    largest_class: tuple[str, int]
    sides_px: tuple[int, int, int]
    notes: tuple[str, ...]

    @property
    def is_unbalanced(self) -> bool:
        """Whether the largest class has several times the images of the smallest."""
        return self.largest_class[1] > _UNBALANCED * self.smallest_class[1]

    @property
    def input_size(self) -> int:
        """An input for a net that takes any: the side of square images, else at most their median shorter side."""
        if self.native_size is not None and self.native_size >= _SIDES[0]:
            return min(self.native_size, _SIDES[-1])
        return max((side for side in _SIDES if side <= self.sides_px[1]), default=_SIDES[0])


@dataclass(frozen=True)
class ModelFacts:
    """The model: where its weights are from, and whether its classes are those of the data."""

    weights: Literal["checkpoint", "pretrained", "random"]
    knows_the_classes: bool
    input_size: int
    notes: list[str] = field(default_factory=list)


def look_at_data(settings: DataSettings) -> tuple[ImageData, DataFacts]:
    """List the images and read a few headers. Raises DataError."""
    data = open_data(settings)
    counts = np.bincount(data.splits["train"].labels, minlength=data.num_classes)
    present = np.flatnonzero(counts)  # under a class index the folder may hold some of the classes
    least, most = (int(present[choose(counts[present])]) for choose in (np.argmin, np.argmax))
    facts = DataFacts(
        splits={name: len(split) for name, split in data.splits.items()},
        num_classes=data.num_classes,
        has_class_index=data.has_class_index,
        classes_in_train=len(present),
        channels=data.channels,
        native_size=data.native_size,
        smallest_class=(data.class_names[least], int(counts[least])),
        largest_class=(data.class_names[most], int(counts[most])),
        sides_px=_sides(data),
        notes=data.notes,
    )
    return data, facts


def _sides(data: ImageData) -> tuple[int, int, int]:
    """Shorter sides of some of train's images: the smallest, the median and the largest."""
    items = data.splits["train"].items
    if not isinstance(items, FileItems):
        side = data.native_size or _SIDES[-1]
        return side, side, side
    found: list[int] = []
    for index in np.unique(np.linspace(0, len(items) - 1, _HEADERS).round().astype(int)):
        try:
            with Image.open(items.root / items.files[index]) as image:
                found.append(min(image.size))
        except DECODE_ERRORS:
            continue  # named when the split is decoded
    sides = sorted(found) or [_SIDES[-1]]
    return sides[0], sides[len(sides) // 2], sides[-1]


def look_at_model(settings: ModelSettings, data: ImageData) -> ModelFacts:
    """Build the model and load its checkpoint, or look its published weights up. Raises ModelError."""
    if settings.pretrained:
        own = published_classes(settings.name)
        architecture = resolve_architecture(settings, data)
        knows = own == architecture.num_classes
        notes = [] if knows else [f"the published weights have {own} classes, the data {data.num_classes}"]
        return ModelFacts("pretrained", knows, architecture.preprocessing.input_size, notes)
    created = create_model(settings, data)
    knows = created.weights == "checkpoint" and created.new_head is None
    return ModelFacts(created.weights, knows, created.architecture.preprocessing.input_size, created.notes)
