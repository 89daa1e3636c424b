"""Where labelled images come from: embedded digits, local copies of known sets, one's own code.

What enters: the data settings. What leaves: a `Source`, the splits that the source has of its own, validated but
not decoded. Known sets are read by readers of our own for their published binary layouts, since the usual ones
open pickles or want a framework's folder names.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
import torchvision

from edgecompress.data.image_folder import read_image_folder
from edgecompress.data.images import MAX_CLASSES, SPLIT_NAMES, ArrayItems, ImageSplit, Source
from edgecompress.errors import DataError
from edgecompress.settings.recipe import DataSettings
from edgecompress.settings.spelling import did_you_mean, nearest
from edgecompress.settings.user_code import call_function

CACHE_FOLDER = Path("~/.cache/edgecompress")

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Published by the data set's authors: https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32
_MAX_IDX_BYTES = 4_000_000_000


def read_digits(settings: DataSettings) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey; its 0..16 become 0..255. It has one split only."""
    bunch = sklearn.datasets.load_digits()
    pixels = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    split = ImageSplit("train", bunch.target.astype(np.int64), ArrayItems(pixels))
    names = tuple(str(digit) for digit in range(10))
    return Source(names, channels=1, native_size=8, splits={"train": split}, draws_test=True)


def read_fashion_mnist(settings: DataSettings) -> Source:
    """Fashion-MNIST from IDX files, gzipped or not. Raises DataError when there are none or they are damaged."""
    inside = ("", "FashionMNIST/raw", "fashion-mnist")
    places = _places(settings.root, inside, Path("/usr/share/datasets/fashion-mnist"))
    folder = next((place for place in places if _idx_file(place, "train-images-idx3-ubyte")), None)
    if folder is None:
        if not settings.download:
            raise DataError(
                f"data: fashion_mnist: no train-images-idx3-ubyte[.gz] in {_listed(places)}; set data.root to the "
                "folder that holds it, or data.download: true, or install Debian's dataset-fashion-mnist"
            )
        root = (settings.root or CACHE_FOLDER).expanduser()
        _download(settings.name, lambda: torchvision.datasets.FashionMNIST(str(root), download=True))
        folder = root / "FashionMNIST" / "raw"
    splits: dict[str, ImageSplit] = {}
    sides: set[int] = set()
    for name, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if len(pixels) != len(labels):
            raise DataError(f"{folder}: {name} has {len(pixels)} images and {len(labels)} labels; fetch the files anew")
        sides.update(pixels.shape[1:])
        splits[name] = ImageSplit(name, labels.astype(np.int64), ArrayItems(pixels))
    if len(sides) != 1:
        raise DataError(f"{folder}: images are not square and of one size ({sorted(sides)}); fetch the files anew")
    return Source(FASHION_MNIST_CLASSES, channels=1, native_size=sides.pop(), splits=splits)


def read_cifar10(settings: DataSettings) -> Source:
    """CIFAR-10 from its binary version. Raises DataError when it is missing or damaged."""
    places = _places(settings.root, ("", "cifar-10-batches-bin"))
    folder = next((place for place in places if (place / "data_batch_1.bin").is_file()), None)
    if folder is None:
        if not settings.download:
            pickled = next((p for p in _places(settings.root, ("", "cifar-10-batches-py")) if _is_pickled(p)), None)
            hint = f" ({pickled} holds the Python version, a pickle, which is never opened)" if pickled else ""
            raise DataError(
                f"data: cifar10: no data_batch_1.bin in {_listed(places)}{hint}; set data.root to the folder of the "
                "binary version (cifar-10-batches-bin), or data.download: true"
            )
        root = (settings.root or CACHE_FOLDER).expanduser()
        fetch = torchvision.datasets.utils.download_and_extract_archive
        _download(settings.name, lambda: fetch(CIFAR10_URL, str(root), md5=CIFAR10_MD5))
        folder = root / "cifar-10-batches-bin"
    train = [_read_cifar10_file(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    test = [_read_cifar10_file(folder / "test_batch.bin")]
    splits: dict[str, ImageSplit] = {}
    for name, parts in (("train", train), ("test", test)):
        pixels = np.concatenate([pixels for pixels, _ in parts])
        splits[name] = ImageSplit(name, np.concatenate([labels for _, labels in parts]), ArrayItems(pixels))
    return Source(CIFAR10_CLASSES, channels=3, native_size=32, splits=splits)


def read_user_data(settings: DataSettings) -> Source:
    """Arrays that a function of the user's own returns.

    The function takes no arguments and returns a dict: "train" and optionally "val" and "test", each a pair
    (images uint8 [N, H, W] or [N, H, W, C], labels int [N]), and optionally "class_names". Raises DataError.
    """
    where = settings.name
    returned = call_function(where, fault=DataError)
    if not isinstance(returned, dict):
        raise DataError(f"{where}: returned {type(returned).__name__}; expected a dict of splits, at least 'train'")
    for key in returned:
        if key not in (*SPLIT_NAMES, "class_names"):
            hint = did_you_mean(str(key), (*SPLIT_NAMES, "class_names"))
            raise DataError(f"{where}: returned an unknown key {key!r}{hint}")
    if "train" not in returned:
        raise DataError(f"{where}: returned no 'train' split")
    arrays = {name: _user_arrays(where, name, returned[name]) for name in SPLIT_NAMES if name in returned}
    shapes = {name: images.shape[1:] for name, (images, _) in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise DataError(f"{where}: the splits' images differ in height, width or channels: {shapes}; make them alike")
    height, width = shapes["train"][:2]
    names = returned.get("class_names")
    if names is None:
        largest = int(arrays["train"][1].max())
        if not 0 <= largest < MAX_CLASSES:
            raise DataError(f"{where}: 'train' labels go up to {largest}; number the classes from 0 up")
        names = [str(number) for number in range(largest + 1)]
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: 'class_names' must be a list of names, not {names!r}")
    splits = {name: ImageSplit(name, labels, ArrayItems(images)) for name, (images, labels) in arrays.items()}
    channels = (*shapes["train"], 1)[2]
    return Source(tuple(names), channels=channels, native_size=height if height == width else None, splits=splits)


SOURCES: dict[str, Callable[[DataSettings], Source]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "image_folder": read_image_folder,
}


# ---- places and downloads


def _places(root: Path | None, inside: Iterable[str], *more: Path) -> list[Path]:
    """Folders to look in: below `root`, or below the standard places when there is none."""
    roots = [root.expanduser()] if root is not None else [Path("data"), CACHE_FOLDER.expanduser(), *more]
    return [place / folder for place in roots for folder in inside]


def _download(name: str, fetch: Callable[[], Any]) -> None:
    try:
        fetch()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"data: {name}: the download failed ({' '.join(str(error).split())}); try again, or fetch the files "
            "elsewhere and set data.root"
        ) from error


# ---- binary layouts


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, *, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist, "file formats")."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder}: {name}[.gz] is missing beside the other files; fetch it too")
    header_bytes = 4 + 4 * dimensions
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(header_bytes)
            # Two zero bytes, 0x08 for unsigned bytes, then the number of dimensions; sizes are big-endian.
            if len(header) < header_bytes or header[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{path}: not an IDX file of bytes with {dimensions} dimensions; fetch it anew")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            expected = math.prod(shape)
            if not 0 < expected <= _MAX_IDX_BYTES:
                raise DataError(f"{path}: its header claims the shape {shape}; fetch it anew")
            # One byte more than expected tells a longer file, and a bomb of zeros is never unpacked.
            content = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it anew") from error
    if len(content) != expected:
        problem = "more" if len(content) > expected else f"only {len(content)}"
        raise DataError(f"{path}: its header claims {expected} bytes, but it holds {problem}; fetch it anew")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _is_pickled(folder: Path) -> bool:
    return (folder / "data_batch_1").is_file()


def _read_cifar10_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3 x 32 x 32 pixel bytes: images [N, 32, 32, 3] and labels int64 [N]."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); unpack cifar-10-binary.tar.gz anew") from error
    if len(content) == 0 or len(content) % _CIFAR10_RECORD_BYTES:
        raise DataError(
            f"{path}: {len(content)} bytes are not whole records of {_CIFAR10_RECORD_BYTES}; "
            "unpack cifar-10-binary.tar.gz anew"
        )
    records = content.reshape(-1, _CIFAR10_RECORD_BYTES)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)


# ---- the user's own arrays


def _user_arrays(where: str, name: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checked images uint8 and labels int64 [N] of one split."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise DataError(f"{where}: '{name}' must be a pair (images, labels), not {type(value).__name__}")
    images, labels = value
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = f"{images.dtype} array" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{where}: '{name}' images: {found}; give a numpy array of uint8 from 0 to 255")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape:
        hint = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            hint = "; for [N, C, H, W] use .transpose(0, 2, 3, 1)"
        raise DataError(
            f"{where}: '{name}' images have the shape {images.shape}; expected [N, H, W] or [N, H, W, C] with 1 or 3 "
            f"channels{hint}"
        )
    try:
        numbers = np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: '{name}' labels are no array of whole numbers ({error})") from error
    if numbers.shape != (len(images),) or numbers.dtype.kind not in "iu":
        raise DataError(
            f"{where}: '{name}' labels: {numbers.dtype} of shape {numbers.shape}; expected one whole number per image, "
            f"shape ({len(images)},)"
        )
    return np.ascontiguousarray(images), numbers.astype(np.int64)


# ---- words for messages


def _listed(places: list[Path]) -> str:
    return ", ".join(str(place) for place in places)


def known_source(name: str) -> str:
    """The suffix of a message about an unknown source: the nearest name, or all of them."""
    if nearest(name, SOURCES) is not None:
        return did_you_mean(name, SOURCES)
    return f"; known: {', '.join(sorted(SOURCES))}, or file.py:function"
