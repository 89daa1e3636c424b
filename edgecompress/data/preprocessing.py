"""How an image becomes a model's input: one description, kept with the model all the way into its ONNX file.

What enters: a decoded image of any mode and size. What leaves: uint8 pixels [C, H, W], and from batches of them
the float tensor a model reads. Resizing and normalizing are apart so that decoded images can be cached as uint8
(a quarter of the memory) and so that an exported graph can do the arithmetic itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from edgecompress.errors import ModelError

if TYPE_CHECKING:  # a bundle ships this module to devices that have numpy and Pillow alone
    import torch

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_SIXTEEN_BITS = 65535.0


@dataclass(frozen=True)
class Preprocessing:
    """The fixed preparation of one image.

    `input_size` is the side of the square input in pixels; `mean` and `std` are per channel, for pixels in [0, 1];
    `crop_fraction` is the share of the resized image's shorter side that the centre crop keeps. Raises ModelError
    when a value makes no sense.
    """

    input_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        faults: list[str] = []
        if not _is_int(self.input_size) or not 1 <= self.input_size <= 4096:
            faults.append(f"input_size must be from 1 to 4096 px, not {self.input_size!r}")
        if not _is_int(self.channels) or self.channels not in (1, 3):
            faults.append(f"channels must be 1 or 3, not {self.channels!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(_is_finite(value) for value in values):
                faults.append(f"{name} must be a list of numbers, not {values!r}")
            elif len(values) != self.channels:
                faults.append(f"{name} has {len(values)} values, but the input has {self.channels} channels")
            elif name == "std" and min(values) <= 0:
                faults.append(f"std must be above 0, not {list(values)}")
        if self.interpolation not in _RESAMPLING:
            faults.append(f"interpolation must be one of {', '.join(_RESAMPLING)}, not {self.interpolation!r}")
        if not _is_finite(self.crop_fraction) or not 0.0 < self.crop_fraction <= 1.0:
            faults.append(f"crop_fraction must be above 0 and at most 1, not {self.crop_fraction!r}")
        if faults:
            raise ModelError(f"preprocessing: {'; '.join(faults)}; mend model.preprocessing in the recipe")

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Pixels of one image at the input size: uint8 [C, H, W].

        With `crop_fraction` below 1, the shorter side is resized to round(input_size / crop_fraction) and the centre
        is cut out: the same pixels as torchvision's and timm's evaluation transforms. With 1 nothing is cut off: the
        whole image is resized to the square, so an oblong one is squashed. Transparent pixels become white; 16-bit
        grey is scaled to 8 bits; EXIF rotation is not applied, as in torchvision and timm. Along the width first, then
        along the height, whatever PIL's version (see `_resize`).

        Raises ValueError for pixels that have no 8-bit meaning, and PIL's DecompressionBombError when the resized
        image would be larger than PIL allows.
        """
        image = to_mode(image, "L" if self.channels == 1 else "RGB")
        resampling = _RESAMPLING[self.interpolation]
        size = self.input_size
        if self.crop_fraction == 1.0:
            image = _resize(image, size, size, resampling)
        else:
            width, height = self._resized(image.width, image.height)
            left, top = round((width - size) / 2.0), round((height - size) / 2.0)
            image = _resize(image, width, height, resampling).crop((left, top, left + size, top + size))
        pixels = np.asarray(image, dtype=np.uint8)
        return np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), order="C")

    def keeps(self, *, width: int, height: int, channels: int) -> bool:
        """Whether `prepare` leaves 8-bit images of this size as they are."""
        same_size = (width, height) == (self.input_size, self.input_size)
        return same_size and channels == self.channels and self.crop_fraction == 1.0

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 [N, C, H, W] to float32 of the same shape: (x / 255 - mean) / std, on the batch's device."""
        import torch

        mean = torch.tensor(self.mean, dtype=torch.float32, device=batch.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=batch.device).view(1, -1, 1, 1)
        return (batch.to(torch.float32) / 255.0 - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `from_dict` reads it back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, document: Any) -> Preprocessing:
        """Read what `to_dict` wrote. Raises ModelError on missing, unknown or senseless values."""
        if not isinstance(document, dict):
            raise ModelError(f"preprocessing: expected a mapping, found {type(document).__name__}")
        names = {field.name for field in fields(cls)}
        wrong = [f"'{name}' is missing" for name in sorted(names - document.keys())]
        wrong += [f"'{name}' is unknown" for name in sorted(map(str, document.keys() - names))]
        if wrong:
            raise ModelError(f"preprocessing: {'; '.join(wrong)}; expected {', '.join(sorted(names))}")
        lists = {name: _as_tuple(document[name]) for name in ("mean", "std")}
        crop = document["crop_fraction"]
        return cls(**{**document, **lists, "crop_fraction": float(crop) if _is_int(crop) else crop})

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Size whose shorter side is round(input_size / crop_fraction); the longer one rounds down."""
        shorter = round(self.input_size / self.crop_fraction)
        longer = int(shorter * max(width, height) / min(width, height))
        if Image.MAX_IMAGE_PIXELS is not None and shorter * longer > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"a {width} x {height} image would be resized to {shorter} x {longer}")
        return (shorter, longer) if width <= height else (longer, shorter)


def _resize(image: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    """Resize along the width, then along the height, rounding to 8 bits in between.

    PIL did just that up to version 12; from 13 on it takes the height first where that is cheaper, which rounds other
    numbers: one grey level in one pixel of seven. A model must see the same pixels with whatever PIL the device has,
    and in a graph with its preprocessing inside, whose Resize goes along the width first as well.
    """
    return image.resize((width, image.height), resampling).resize((width, height), resampling)


def whole_image(image: Image.Image, channels: int) -> np.ndarray:
    """An image of any mode at its own size, uint8 [H, W, C]: what a file with preprocessing inside reads."""
    pixels = np.asarray(to_mode(image, "L" if channels == 1 else "RGB"), dtype=np.uint8)
    return np.array(pixels[..., None] if pixels.ndim == 2 else pixels, order="C")


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image of any PIL mode as 8-bit 'L' or 'RGB'. Raises ValueError when its values have no 8-bit meaning."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # PIL's own conversion clips at 255, which turns most of a 16-bit image white.
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > _SIXTEEN_BITS:
            raise ValueError(f"grey values from {values.min():g} to {values.max():g} do not fit 16 bits")
        image = Image.fromarray((values / 257.0).round().astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not (values.min() >= 0.0 and values.max() <= 1.0):
            raise ValueError("a floating-point image must hold values from 0 to 1")
        image = Image.fromarray((values * 255.0).round().astype(np.uint8))
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
