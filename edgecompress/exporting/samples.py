"""The few real images that a run keeps beside its exported files, so that measuring needs no data set.

What enters: the split that is reported on. What leaves: `samples.npy`, images prepared by PIL, and where the files read
pixels `samples_pixels.npy`, the same images as they come; and from either the array that a measuring process feeds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgecompress.data.images import PreparedSplit
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import RunError
from edgecompress.exporting.preprocessing_graph import PIXEL_FORM, InputForm
from edgecompress.run_directory import atomic_path, read_array

PREPARED_FILE = "samples.npy"
PIXELS_FILE = "samples_pixels.npy"
_IMAGES = 16
_MOST_BYTES = 16_000_000  # of pixels: a run directory should not be made of photographs


def save_samples(split: PreparedSplit, preprocessing: Preprocessing, folder: Path, form: InputForm) -> None:
    """Keep up to 16 images, spread over the split.

    `samples.npy` is uint8 [N, C, size, size]; `samples_pixels.npy` is uint8 [N, H, W, C] and holds those of them that
    have the commonest size, as one array has one size.
    """
    chosen = torch.linspace(0, len(split) - 1, min(_IMAGES, len(split))).long()
    images = torch.cat([batch for batch, _ in split.batches(_IMAGES, indices=chosen)])
    _save(folder / PREPARED_FILE, images.numpy())
    if form != PIXEL_FORM:
        (folder / PIXELS_FILE).unlink(missing_ok=True)
        return
    whole = [split.whole_image(int(index)) for index in chosen]
    (shape, _), *_ = Counter(image.shape for image in whole).most_common(1)
    alike = [image for image in whole if image.shape == shape]
    _save(folder / PIXELS_FILE, np.stack(alike[: max(1, _MOST_BYTES // alike[0].size)]))


def _save(path: Path, array: NDArray[np.uint8]) -> None:
    with atomic_path(path) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, array)


def read_prepared(folder: Path) -> NDArray[np.uint8]:
    """The images that the export kept, uint8 [N, C, H, W]. Raises RunError when they cannot be read."""
    stored = folder / PREPARED_FILE
    images: NDArray[np.uint8] = read_array(stored)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise RunError(f"{stored}: holds no images (uint8 [N, C, H, W]); export again")
    return images


def measuring_input(folder: Path, preprocessing: Preprocessing, form: InputForm, scratch: Path) -> Path | None:
    """The file of images that a model of this form is measured on, or None where the export left none.

    Raises RunError when the images cannot be read.
    """
    stored = folder / (PIXELS_FILE if form == PIXEL_FORM else PREPARED_FILE)
    if not stored.is_file():
        return None
    if form == PIXEL_FORM:
        return stored
    images = torch.from_numpy(read_prepared(folder))
    if images.shape[1] != preprocessing.channels:
        raise RunError(f"{stored}: holds {images.shape[1]} channels, the model reads {preprocessing.channels}")
    path = scratch / "input.npy"
    np.save(path, preprocessing.normalize(images).numpy())
    return path


def latency_note(folder: Path | None, form: InputForm) -> str | None:
    """What a measured latency includes beyond the model, in words; None where it is the model alone.

    `folder` is None where other images than those of the export were measured.
    """
    if form != PIXEL_FORM:
        return None
    stored = folder / PIXELS_FILE if folder is not None else None
    if stored is None or not stored.is_file():
        return "Preprocessing is inside the files, so latencies include it."
    height, width = read_array(stored).shape[1:3]
    return (
        f"Preprocessing is inside the files: latencies include resizing and normalizing images of {width} x {height} "
        "pixels; larger images take longer."
    )
