from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgecompress.data.preprocessing import Preprocessing, to_mode
from edgecompress.errors import ModelError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLING = {"nearest": "NEAREST", "bilinear": "BILINEAR", "bicubic": "BICUBIC"}


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rgb(size: int, interpolation: str, crop_fraction: float) -> Preprocessing:
    return Preprocessing(size, 3, IMAGENET_MEAN, IMAGENET_STD, interpolation, crop_fraction)


@pytest.fixture
def width_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL as it was before version 13, for whoever resizes: along the width first, whichever is cheaper."""
    resize = Image.Image.resize

    def in_two_passes(image: Image.Image, size: Sequence[int], *rest: Any, **more: Any) -> Image.Image:
        return resize(resize(image, (size[0], image.height), *rest, **more), tuple(size), *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", in_two_passes)


@pytest.mark.usefixtures("width_first")
@pytest.mark.parametrize("size", [(300, 200), (97, 131), (61, 250), (64, 64), (73, 73)])
@pytest.mark.parametrize(("interpolation", "resized"), [("nearest", 73), ("bilinear", 67), ("bicubic", 73)])
def test_same_numbers_as_torchvision(size: tuple[int, int], interpolation: str, resized: int) -> None:
    mode = torchvision.transforms.InterpolationMode[RESAMPLING[interpolation]]
    reference = torchvision.transforms._presets.ImageClassification(
        crop_size=64, resize_size=resized, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation=mode
    )
    image = random_image(*size)
    ours = rgb(64, interpolation, 64 / resized)
    result = ours.normalize(torch.from_numpy(ours.prepare(image))[None])[0]
    assert torch.allclose(result, reference(image), atol=1e-6)


@pytest.mark.usefixtures("width_first")
@pytest.mark.parametrize("size", [(300, 200), (97, 131), (64, 64)])
def test_same_numbers_as_timm(size: tuple[int, int]) -> None:
    reference = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=0.875, is_training=False
    )
    image = random_image(*size)
    ours = rgb(64, "bicubic", 0.875)
    result = ours.normalize(torch.from_numpy(ours.prepare(image))[None])[0]
    assert torch.allclose(result, reference(image), atol=1e-6)


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_whichever_way_pil_goes_first_the_pixels_are_near(interpolation: str, crop_fraction: float) -> None:
    for size in ((300, 200), (97, 131), (61, 250)):
        image = random_image(*size)
        ours = rgb(64, interpolation, crop_fraction)
        width, height = ours._resized(*size) if crop_fraction < 1 else (64, 64)
        left, top = round((width - 64) / 2), round((height - 64) / 2)
        resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
        wanted = np.asarray(resized.crop((left, top, left + 64, top + 64))).transpose(2, 0, 1)
        difference = np.abs(ours.prepare(image).astype(int) - wanted)
        assert difference.max() <= {"nearest": 0, "bilinear": 1, "bicubic": 8}[interpolation]
        assert np.mean(difference > 1) < 0.03  # in noise, cubic weights go beyond what 8 bits between the passes hold


def test_without_a_crop_the_whole_image_is_kept() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20] = 255
    prepared = rgb(40, "nearest", 1.0).prepare(Image.fromarray(pixels))
    assert prepared.shape == (3, 40, 40)
    assert (prepared[:, :, :10] == 255).all()
    assert (prepared[:, :, 10:] == 0).all()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257 * 7, 257 * 128, 65535]], dtype=np.uint16)
    assert np.asarray(to_mode(Image.fromarray(values), "L")).tolist() == [[0, 7, 128, 255]]
    assert np.asarray(to_mode(Image.fromarray(values.astype(np.int32)), "RGB"))[0, 2].tolist() == [128, 128, 128]
    with pytest.raises(ValueError, match="16 bits"):
        to_mode(Image.fromarray(np.array([[70000]], dtype=np.int32)), "L")


def test_floats_are_taken_from_zero_to_one() -> None:
    image = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    assert np.asarray(to_mode(image, "L")).tolist() == [[0, 255]]
    for value in (2.0, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            to_mode(Image.fromarray(np.array([[value]], dtype=np.float32)), "L")


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(to_mode(image, "RGB")).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert np.asarray(to_mode(image.convert("LA"), "L"))[0, 1] == 255


def test_palettes_keep_colours_and_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((1, 0), 1)
    assert np.asarray(to_mode(image, "RGB")).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    image.info["transparency"] = bytes([0, 255])
    assert np.asarray(to_mode(image, "RGB")).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_ends_as_uint8(mode: str, channels: int) -> None:
    preprocessing = Preprocessing(8, channels, (0.5,) * channels, (0.5,) * channels, "bilinear", 0.875)
    prepared = preprocessing.prepare(Image.new(mode, (20, 10)))
    assert prepared.shape == (channels, 8, 8)
    assert prepared.dtype == np.uint8
    assert prepared.flags["C_CONTIGUOUS"]


def test_an_extreme_shape_is_refused_before_memory_is_spent() -> None:
    with pytest.raises(Image.DecompressionBombError):
        rgb(512, "nearest", 0.5).prepare(Image.new("RGB", (200_000, 1)))


def test_normalize_against_numpy() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    expected = (batch / 255.0 - np.reshape(IMAGENET_MEAN, (1, 3, 1, 1))) / np.reshape(IMAGENET_STD, (1, 3, 1, 1))
    result = rgb(5, "bilinear", 1.0).normalize(torch.from_numpy(batch))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)


@given(
    size=st.integers(1, 4096),
    channels=st.sampled_from([1, 3]),
    mean=st.floats(0, 1),
    std=st.floats(0.01, 1),
    interpolation=st.sampled_from(sorted(RESAMPLING)),
    crop=st.floats(0.01, 1.0),
)
def test_a_description_survives_json(
    size: int, channels: int, mean: float, std: float, interpolation: str, crop: float
) -> None:
    preprocessing = Preprocessing(size, channels, (mean,) * channels, (std,) * channels, interpolation, crop)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_size": 0}, "input_size"),
        ({"input_size": True}, "input_size"),
        ({"channels": 2}, "channels"),
        ({"mean": [0.5]}, "mean has 1 values"),
        ({"mean": "grey"}, "mean must be"),
        ({"std": [0.5, 0.0, 0.5]}, "std must be above 0"),
        ({"std": [float("nan")] * 3}, "std must be"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"crop_fraction": 1.5}, "crop_fraction"),
        ({"sharpen": 1}, "'sharpen' is unknown"),
    ],
)
def test_senseless_descriptions_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        Preprocessing.from_dict({**rgb(32, "bilinear", 0.9).to_dict(), **change})


def test_an_incomplete_description_is_refused() -> None:
    with pytest.raises(ModelError, match="'std' is missing"):
        Preprocessing.from_dict({key: value for key, value in rgb(8, "nearest", 1.0).to_dict().items() if key != "std"})
    with pytest.raises(ModelError, match="mapping"):
        Preprocessing.from_dict([])
