"""Images of one split, from a file list or an array to batches of uint8 tensors.

What enters: items (files or an array), labels and a preprocessing. What leaves: batches in any order asked for.
Images are decoded by threads (PIL releases the interpreter lock while it decodes and resizes), either once into
one uint8 tensor or again in every pass, ahead of use; so no worker processes, whose start costs more than a
small epoch.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from edgecompress import console
from edgecompress.data.preprocessing import Preprocessing, whole_image
from edgecompress.errors import DataError
from edgecompress.threads import thread_pool

# What PIL's decoders are known to raise on damaged or hostile files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
SPLIT_NAMES = ("train", "val", "test")
MAX_CLASSES = 1_000_000
MAX_UNDECODABLE_FRACTION = 0.01
_NAMED_IN_MESSAGES = 3
_MAX_WORKERS = 8
_IDENTITY_CHUNK = 1024


@dataclass(frozen=True)
class FileItems:
    """Image files: paths relative to `root`, with `/` between folders, and their sizes in bytes."""

    root: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: np.ndarray) -> FileItems:
        """The items at `indices`, in that order."""
        chosen = [int(index) for index in indices]
        return FileItems(self.root, tuple(self.files[i] for i in chosen), tuple(self.sizes[i] for i in chosen))

    def decode(self, index: int, preprocessing: Preprocessing) -> np.ndarray:
        """Prepared pixels, uint8 [C, H, W]. Raises DataError naming the file."""
        return self._open(index, preprocessing.prepare)

    def decode_whole(self, index: int, channels: int) -> np.ndarray:
        """The image at its own size, uint8 [H, W, C]. Raises DataError naming the file."""
        return self._open(index, lambda image: whole_image(image, channels))

    def _open(self, index: int, read: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
        path = self.root / self.files[index]
        try:
            with Image.open(path) as image:
                if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                return read(image)
        except DECODE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path}: cannot be decoded ({reason}); replace the file or remove it") from error

    def in_memory(self, preprocessing: Preprocessing) -> torch.Tensor | None:
        """None: files are never in memory before they are decoded."""
        return None

    def identity(self) -> Iterator[bytes]:
        """What tells these images from others, cheaply: relative paths and sizes."""
        for name, size in zip(self.files, self.sizes, strict=True):
            yield f"{name}\0{size}\n".encode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class ArrayItems:
    """Images that are in memory already: uint8 [N, H, W] or [N, H, W, C]."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def channels(self) -> int:
        """Channels of each image."""
        return int(self.pixels.shape[3]) if self.pixels.ndim == 4 else 1

    def subset(self, indices: np.ndarray) -> ArrayItems:
        """The items at `indices`, in that order."""
        return ArrayItems(self.pixels[indices])

    def decode(self, index: int, preprocessing: Preprocessing) -> np.ndarray:
        """Prepared pixels, uint8 [C, H, W]."""
        return preprocessing.prepare(self._image(index))

    def decode_whole(self, index: int, channels: int) -> np.ndarray:
        """The image at its own size, uint8 [H, W, C]."""
        return whole_image(self._image(index), channels)

    def _image(self, index: int) -> Image.Image:
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)

    def in_memory(self, preprocessing: Preprocessing) -> torch.Tensor | None:
        """The whole split as [N, C, H, W] when the preprocessing leaves the pixels as they are."""
        height, width = self.pixels.shape[1:3]
        if not preprocessing.keeps(width=width, height=height, channels=self.channels):
            return None
        images = self.pixels.reshape(len(self), height, width, self.channels).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.array(images, order="C"))

    def identity(self) -> Iterator[bytes]:
        """What tells these images from others: shape and raw bytes."""
        yield repr(self.pixels.shape).encode()
        for start in range(0, len(self), _IDENTITY_CHUNK):
            yield self.pixels[start : start + _IDENTITY_CHUNK].tobytes()


Items = FileItems | ArrayItems


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """One split: items and their labels, int64 [N]."""

    name: str
    labels: np.ndarray
    items: Items

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray, *, name: str | None = None) -> ImageSplit:
        """The images at `indices`, in that order."""
        return ImageSplit(name or self.name, self.labels[indices], self.items.subset(indices))

    def prepare(self, preprocessing: Preprocessing, *, cache: bool) -> PreparedSplit:
        """Make the split ready to be read in batches.

        With `cache`, images are decoded once, if half of the available memory holds them. Undecodable images are
        then dropped with a warning. Raises DataError when they are more than 1 % of the split; without a cache, the
        first one met in a pass raises it.
        """
        labels = torch.from_numpy(self.labels.copy())
        images = self.items.in_memory(preprocessing)
        if images is not None or not cache:
            return PreparedSplit(self, preprocessing, labels, images)
        wanted = len(self) * preprocessing.channels * preprocessing.input_size**2
        available = available_memory_bytes()
        if wanted > available / 2:
            console.note(
                f"{self.name}: decoded images take {wanted / 1e9:.1f} GB, more than half of the {available / 1e9:.1f} "
                "GB of memory available; they are decoded again in every pass"
            )
            return PreparedSplit(self, preprocessing, labels, None)
        images, kept = _decode_once(self, preprocessing)
        return PreparedSplit(self, preprocessing, labels[kept], images)


@dataclass(frozen=True)
class Source:
    """What a source has of its own. `native_size` is the side of square images that all have one size."""

    class_names: tuple[str, ...]
    channels: int
    native_size: int | None
    splits: dict[str, ImageSplit]
    has_class_index: bool = False
    draws_test: bool = False
    notes: tuple[str, ...] = ()


class PreparedSplit:
    """Images of a split under one preprocessing, read in batches; `labels` is int64 [N]."""

    def __init__(
        self, split: ImageSplit, preprocessing: Preprocessing, labels: torch.Tensor, images: torch.Tensor | None
    ) -> None:
        self.name = split.name
        self.labels = labels
        self._items = split.items
        self._preprocessing = preprocessing
        self._images = images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def cached(self) -> bool:
        """Whether the images are in memory."""
        return self._images is not None

    def file_name(self, index: int) -> str | None:
        """Where one image comes from, relative to the data's folder; None where it is no file."""
        if not isinstance(self._items, FileItems) or len(self._items) != len(self.labels):
            return None
        return self._items.files[index]

    def whole_image(self, index: int) -> np.ndarray:
        """One image as it comes, before any resizing: uint8 [H, W, C]. Raises DataError."""
        if len(self._items) != len(self.labels):  # a cached split leaves out what cannot be decoded
            raise DataError(f"{self.name}: some images were left out, so their numbers do not fit; read it uncached")
        return self._items.decode_whole(index, self._preprocessing.channels)

    def batches(
        self, batch_size: int, *, indices: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images uint8 [B, C, H, W], labels int64 [B]) in the order of `indices`; left out, all in order.

        The last batch may be smaller. The tensors are the caller's own. Raises DataError, naming the file, for an
        image that cannot be decoded.
        """
        order = torch.arange(len(self)) if indices is None else indices.to("cpu", torch.int64)
        yield from self.batches_of(torch.split(order, batch_size) if len(order) else ())

    def batches_of(self, chosen: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images, labels) of each of the given int64 index tensors, as `batches` does."""
        if self._images is not None:
            for positions in chosen:
                yield self._images[positions], self.labels[positions]
            return
        order = [index for positions in chosen for index in positions.tolist()]
        # Two batches ahead: one is being put together while the next is decoded.
        ahead = 2 * max((len(positions) for positions in chosen), default=0)
        decoded = _decode_ahead(self._items, self._preprocessing, order, ahead=ahead)
        try:
            for positions in chosen:
                pixels = [next(decoded) for _ in range(len(positions))]
                sound = [result for result in pixels if not isinstance(result, DataError)]
                if len(sound) < len(pixels):
                    raise self._undecodable()
                yield torch.from_numpy(np.stack(sound)), self.labels[positions]
        finally:
            decoded.close()

    def _undecodable(self) -> DataError:
        """What to raise where an image cannot be decoded: all that cannot, so that they are removed in one go."""
        order = range(len(self._items))
        with console.progress(f"looking for more undecodable images in {self.name}", len(order)) as advance:
            faults = []
            for result in _decode_ahead(self._items, self._preprocessing, order, ahead=256):
                faults += [result] if isinstance(result, DataError) else []
                advance(1)
        return DataError(f"{_undecodable_summary(self.name, faults, len(order))}:\n{_named_faults(faults)}")


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be used, in bytes, with a container's limit respected."""
    candidates = [int(psutil.virtual_memory().available)]
    for folder, limit_name, used_name, reclaimable in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read_number(root / folder / limit_name), _read_number(root / folder / used_name)
        if limit is not None and used is not None:
            # Cached file pages count as used, but the kernel gives them back.
            cached = _read_table(root / folder / "memory.stat").get(reclaimable, 0)
            candidates.append(max(0, limit - max(0, used - cached)))
    return min(candidates)


def _read_table(path: Path) -> dict[str, int]:
    """The `name number` lines of a kernel file."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_WORKERS, usable)


def _decode_ahead(
    items: Items, preprocessing: Preprocessing, indices: Sequence[int], *, ahead: int
) -> Generator[np.ndarray | DataError, None, None]:
    """Decode in threads, at most `ahead` images before they are asked for, and yield in order."""

    def decode(index: int) -> np.ndarray | DataError:
        try:
            return items.decode(index, preprocessing)
        except DataError as error:
            return error

    pending: deque[Future[np.ndarray | DataError]] = deque()
    pool = thread_pool(_workers(), "decode")
    try:
        for index in indices:
            pending.append(pool.submit(decode, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _undecodable_summary(name: str, faults: Sequence[DataError], total: int) -> str:
    return f"{name}: {len(faults)} of {total} images cannot be decoded"


def _named_faults(faults: Sequence[DataError]) -> str:
    """The first few, a line each, and how many more there are."""
    named = "\n".join(f"  {fault}" for fault in faults[:_NAMED_IN_MESSAGES])
    return named + (f"\n  and {len(faults) - _NAMED_IN_MESSAGES} more" if len(faults) > _NAMED_IN_MESSAGES else "")


def _decode_once(split: ImageSplit, preprocessing: Preprocessing) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a whole split: images uint8 [K, C, H, W] and the positions int64 [K] that could be decoded."""
    size = preprocessing.input_size
    images = torch.empty((len(split), preprocessing.channels, size, size), dtype=torch.uint8)
    pixels = images.numpy()
    kept: list[int] = []
    faults: list[DataError] = []
    with console.progress(f"decoding {split.name}", len(split)) as advance:
        for index, result in enumerate(_decode_ahead(split.items, preprocessing, range(len(split)), ahead=256)):
            if isinstance(result, DataError):
                faults.append(result)
            else:
                pixels[len(kept)] = result
                kept.append(index)
            advance(1)
    if faults:
        summary, named = _undecodable_summary(split.name, faults, len(split)), _named_faults(faults)
        if len(faults) > MAX_UNDECODABLE_FRACTION * len(split):
            raise DataError(f"{summary}:\n{named}")
        console.warn(f"{summary} and are left out:\n{named}")
    return images[: len(kept)], torch.tensor(kept, dtype=torch.int64)
