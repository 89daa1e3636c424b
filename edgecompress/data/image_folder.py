"""Images in folders: `root/<split>/<class>/<image>`, with an optional class index.

What enters: the data settings. What leaves: a `Source` of files, listed but not decoded. Without a class index the
classes are train's folders in sorted order; with one, a folder may hold a subset of a larger model's classes, and a
folder that the index does not list is refused, since a guessed number would be wrong in silence.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgecompress.data.images import DECODE_ERRORS, MAX_CLASSES, SPLIT_NAMES, FileItems, ImageSplit, Source
from edgecompress.errors import DataError
from edgecompress.settings.recipe import DataSettings

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
_PEEKED_HEADERS = 8


def read_image_folder(settings: DataSettings) -> Source:
    """`root/train`, `root/val` and `root/test`, each with one folder per class. Raises DataError."""
    if settings.root is None:
        raise DataError("data: image_folder needs data.root, the folder that holds train/ (and val/, test/)")
    root = settings.root.expanduser()
    if not (root / "train").is_dir():
        raise DataError(f"{root}: has no folder train/; expected train/<class>/<image>, and optionally val/ and test/")
    index = _read_class_index(settings.class_index.expanduser()) if settings.class_index is not None else None
    found = {name: _list_images(root, name) for name in SPLIT_NAMES if (root / name).is_dir()}
    folders = sorted({folder for classes in found.values() for folder in classes})
    if index is None:
        # A class that train lacks could not have been learned, and would shift the numbers of those after it.
        names: tuple[str, ...] = tuple(sorted(found["train"]))
        known = {folder: number for number, folder in enumerate(names)}
        where = f"{root / 'train'} has no such class folder; remove them, or give data.class_index"
    else:
        known = index
        by_number = {number: folder for folder, number in index.items() if folder in set(folders)}
        names = tuple(by_number.get(number, str(number)) for number in range(max(index.values()) + 1))
        where = f"{settings.class_index} does not list them; add them, or remove the folders"
    for name, classes in found.items():
        if unknown := sorted(classes.keys() - known.keys()):
            raise DataError(f"{root / name}: unknown class folders {_quoted(unknown)}: {where}")
        if name == "train" and (empty := sorted(folder for folder, files in classes.items() if not files)):
            raise DataError(f"{root / name}: class folders without an image: {_quoted(empty)}; fill or remove them")
    splits = {name: _folder_split(root, name, classes, known) for name, classes in found.items()}
    size, channels = _peek([root / file for files in found["train"].values() for file, _ in files])
    return Source(names, channels=channels, native_size=size, splits=splits, has_class_index=index is not None)


def _list_images(root: Path, split: str) -> dict[str, list[tuple[str, int]]]:
    """Class folder to its images, (path relative to root, bytes), both sorted. Raises DataError when there are none."""
    classes: dict[str, list[tuple[str, int]]] = {}
    try:
        for entry in sorted(os.scandir(root / split), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("."):
                classes[entry.name] = sorted(_walk_images(root, Path(entry.path)))
    except OSError as error:
        raise DataError(f"{root / split}: cannot be read ({error}); check its permissions") from error
    if not any(classes.values()):
        found = f"{len(classes)} class folders and no image in them" if classes else "no class folder"
        raise DataError(
            f"{root / split}: {found}; expected {split}/<class>/<image> with one of the endings "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return classes


def _walk_images(root: Path, folder: Path) -> Iterable[tuple[str, int]]:
    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield path.relative_to(root).as_posix(), path.stat().st_size


def _folder_split(
    root: Path, name: str, classes: dict[str, list[tuple[str, int]]], known: dict[str, int]
) -> ImageSplit:
    rows = [(file, size, known[folder]) for folder, files in classes.items() for file, size in files]
    items = FileItems(root, tuple(file for file, _, _ in rows), tuple(size for _, size, _ in rows))
    return ImageSplit(name, np.array([label for _, _, label in rows], dtype=np.int64), items)


def _read_class_index(path: Path) -> dict[str, int]:
    """A JSON object from folder name to class index. Raises DataError listing what is wrong."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        if repeated:
            raise DataError(f"{path}: folders listed twice: {_quoted(repeated)}; keep one of each")
        return dict(pairs)

    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: data.class_index cannot be read ({error}); give a JSON object") from error
    if not isinstance(index, dict) or not index:
        raise DataError(f'{path}: expected a JSON object from folder name to class index, {{"cat": 281, ...}}')
    for folder, number in index.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_CLASSES:
            raise DataError(f"{path}: '{folder}': {number!r} is no class index; give a whole number from 0 up")
    by_number: dict[int, str] = {}
    for folder, number in index.items():
        if number in by_number:
            raise DataError(f"{path}: '{by_number[number]}' and '{folder}' both have index {number}; give each its own")
        by_number[number] = folder
    return index


def _peek(files: list[Path]) -> tuple[int | None, int]:
    """Side (None unless all are square and alike) and channels, from a few files' headers."""
    chosen = np.unique(np.linspace(0, len(files) - 1, _PEEKED_HEADERS).round().astype(int))
    sizes: set[tuple[int, int]] = set()
    grey = True
    for index in chosen:
        try:
            with Image.open(files[index]) as image:
                sizes.add(image.size)
                grey = grey and (image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"))
        except DECODE_ERRORS:
            continue  # counted and named when the split is decoded
    sides = {side for size in sizes for side in size}
    return (sides.pop() if len(sides) == 1 else None), (1 if grey and sizes else 3)


def _quoted(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
