"""The data of a run: which images train, which decide, which are reported, and a fingerprint of it all.

What enters: the data settings. What leaves: an `ImageData` with its splits drawn; nothing is decoded yet. Every
draw is stratified and depends on `split_seed` alone, so that runs with different training seeds are judged on the
same images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompress.data.data_sources import SOURCES, known_source, read_user_data
from edgecompress.data.images import SPLIT_NAMES, ImageSplit, PreparedSplit, Source
from edgecompress.errors import DataError
from edgecompress.settings.recipe import DataSettings
from edgecompress.settings.user_code import is_user_code

__all__ = ["ImageData", "ImageSplit", "PreparedSplit", "calibration_indices", "open_data"]

# One stream of random numbers per purpose: drawing one split never moves another.
_TEST_STREAM, _VAL_STREAM, _SUBSET_STREAM, _CALIBRATION_STREAM = range(4)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images in `splits`: train, val and, where there is one, test.

    `class_names` is the model's index space; under a class index (`has_class_index`) its length is a lower bound,
    since the data may hold a subset of the model's classes. `native_size` is the side in px of square images of one
    size, else None. `fingerprint` is a sha256 over membership, labels and cheap content identity of all splits.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    native_size: int | None
    splits: dict[str, ImageSplit]
    fingerprint: str
    has_class_index: bool
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, of which a split may lack some."""
        return len(self.class_names)

    @property
    def report_split(self) -> str:
        """The split that accuracies are reported on: test, or val where there is no test."""
        return "test" if "test" in self.splits else "val"

    def with_num_classes(self, count: int) -> ImageData:
        """The same data in a larger index space; added classes are named by their index. Raises DataError."""
        if count < self.num_classes:
            raise DataError(f"data: {self.name} has {self.num_classes} classes, which {count} cannot hold")
        added = tuple(str(number) for number in range(self.num_classes, count))
        return dataclasses.replace(self, class_names=self.class_names + added)

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for run.json."""
        return {
            "name": self.name,
            "splits": {name: len(split) for name, split in self.splits.items()},
            "report_split": self.report_split,
            "num_classes": self.num_classes,
            "channels": self.channels,
            "native_size": self.native_size,
            "fingerprint": self.fingerprint,
            "report_fingerprint": _fingerprint({self.report_split: self.splits[self.report_split]}),
            "notes": list(self.notes),
        }


_NAMED_CLASSES = 5


def open_data(settings: DataSettings) -> ImageData:
    """Find the data and draw the splits that the source has not; no image is decoded. Raises DataError."""
    if settings.class_index is not None and settings.name != "image_folder":
        raise DataError(f"data.class_index belongs to image_folder, not to {settings.name}; leave it out")
    if is_user_code(settings.name):
        source = read_user_data(settings)
    elif settings.name in SOURCES:
        source = SOURCES[settings.name](settings)
    else:
        raise DataError(f"data.name: unknown '{settings.name}'{known_source(settings.name)}")
    if len(source.class_names) < 2:
        raise DataError(f"data: {settings.name}: only the class '{source.class_names[0]}'; a classifier needs two")
    for split in source.splits.values():
        _check_labels(settings.name, split, len(source.class_names))
    splits, notes = _draw_splits(settings, source)
    return ImageData(
        name=settings.name,
        class_names=source.class_names,
        channels=source.channels,
        native_size=source.native_size,
        splits=splits,
        fingerprint=_fingerprint(splits),
        has_class_index=source.has_class_index,
        notes=(*source.notes, *notes),
    )


def calibration_indices(labels: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Positions of `samples` images, int64 [min(samples, N)], chosen without replacement and class-balanced.

    The order is mixed so that every prefix is balanced too. Fewer images than asked for: all are used.
    """
    return _balanced(labels, samples, _generator(seed, _CALIBRATION_STREAM))


def _check_labels(name: str, split: ImageSplit, classes: int) -> None:
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"data: {name}: {split.name}: {len(wrong)} labels are outside 0..{classes - 1}, the first at position "
            f"{first} ({int(split.labels[first])}); mend the labels or name every class"
        )


def _draw_splits(settings: DataSettings, source: Source) -> tuple[dict[str, ImageSplit], list[str]]:
    splits, notes = dict(source.splits), []
    missing: list[tuple[str, float, int]] = []
    if source.draws_test and "test" not in splits:
        missing.append(("test", settings.test_fraction, _TEST_STREAM))
    if "val" not in splits:
        missing.append(("val", settings.val_fraction, _VAL_STREAM))
    for name, fraction, stream in missing:
        train = splits["train"]
        drawn = _stratified(train.labels, fraction, _generator(settings.split_seed, stream))
        rest = np.setdiff1d(np.arange(len(train)), drawn)
        if not len(drawn) or not len(rest):
            raise DataError(
                f"data: {settings.name}: {name} would be a {fraction:g} share of {len(train)} images, which leaves "
                f"{name} or train empty; change data.{name}_fraction or add images"
            )
        splits[name], splits["train"] = train.subset(drawn, name=name), train.subset(rest)
        notes.append(f"{name}: {fraction:g} of train, stratified, drawn with split_seed {settings.split_seed}")
    wanted, train = settings.max_train_samples, splits["train"]
    if wanted is not None:
        if wanted < len(train):
            chosen = _balanced(train.labels, wanted, _generator(settings.split_seed, _SUBSET_STREAM))
            splits["train"] = train.subset(np.sort(chosen))
            notes.append(f"train: a class-balanced subset of {wanted} of {len(train)} images")
        else:
            notes.append(f"train: max_train_samples is {wanted}, and all {len(train)} images are used")
    notes += _classes_without_an_image(splits, source)
    return {name: splits[name] for name in SPLIT_NAMES if name in splits}, notes


def _classes_without_an_image(splits: Mapping[str, ImageSplit], source: Source) -> list[str]:
    """What each split cannot say anything about, by name.

    A class index may list more classes than a folder holds; then those count that another split holds.
    """
    present = {name: set(np.unique(split.labels).tolist()) for name, split in splits.items()}
    expected = set().union(*present.values()) if source.has_class_index else set(range(len(source.class_names)))
    notes = []
    for name, classes in present.items():
        absent = sorted(expected - classes)
        if absent:
            named = ", ".join(f"'{source.class_names[label]}'" for label in absent[:_NAMED_CLASSES])
            more = f" and {len(absent) - _NAMED_CLASSES} more" if len(absent) > _NAMED_CLASSES else ""
            notes.append(f"{name}: holds {len(classes)} of {len(expected)} classes; no image of {named}{more}")
    return notes


def _generator(seed: int, stream: int) -> np.random.Generator:
    # A seed sequence takes no negative numbers; 64 bits hold every seed that YAML users write.
    return np.random.Generator(np.random.PCG64([seed & 0xFFFF_FFFF_FFFF_FFFF, stream]))


def _stratified(labels: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """Sorted positions of round(fraction * N) images, each class giving its share to within one image.

    Shares are rounded by largest remainder, with ties broken at random; no class gives its last image.
    """
    counts = np.unique(labels, return_counts=True)[1]
    shares = counts * fraction
    taken = np.floor(shares).astype(np.int64)
    order = generator.permutation(len(counts))
    order = order[np.argsort(-(shares - taken)[order], kind="stable")]
    order = order[taken[order] < counts[order] - 1]
    extra = max(0, round(len(labels) * fraction) - int(taken.sum()))
    taken[order[:extra]] += 1
    groups = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    drawn = [generator.permutation(group)[:count] for group, count in zip(groups, taken, strict=True)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _balanced(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions in rounds: each round takes one image of every class that has one left, in a random order."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    round_of = np.concatenate([np.arange(size) for size in counts])
    order = np.lexsort((generator.random(len(labels)), round_of))
    return by_class[order][:count].astype(np.int64)


def _fingerprint(splits: dict[str, ImageSplit]) -> str:
    digest = hashlib.sha256()
    for name in sorted(splits):
        split = splits[name]
        digest.update(f"{name}\0{len(split)}\n".encode())
        digest.update(np.ascontiguousarray(split.labels, dtype="<i8").tobytes())
        for part in split.items.identity():
            digest.update(part)
    return digest.hexdigest()
