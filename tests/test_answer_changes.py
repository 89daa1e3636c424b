"""What int8 changed in the answers: confidence against a plain reference, confusions, pictures of flipped images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgecompress.data.images import ArrayItems, ImageSplit, PreparedSplit
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.exporting.answer_changes import answer_changes, flipped_images
from edgecompress.training.confidence import calibration_of, softmax

NAMES = ("owl", "<b>hen</b>", "elk")


def test_the_calibration_error_is_that_of_the_paper() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(500, 5)).astype(np.float32) * 3
    labels = generator.integers(0, 5, size=500)
    probabilities = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    np.testing.assert_allclose(softmax(logits), probabilities, rtol=1e-12)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for k in range(15):
        chosen = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if chosen.any():
            expected += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    found = calibration_of(logits, labels)
    assert found["ece"] == pytest.approx(expected)
    assert sum(row["samples"] for row in found["bins"]) == 500


def test_a_model_as_sure_as_right_has_no_error_and_a_boaster_has() -> None:
    labels = np.zeros(100, dtype=np.int64)
    labels[:25] = 1
    logits = np.log(np.tile([[0.75, 0.25]], (100, 1)))
    assert calibration_of(logits, labels)["ece"] == pytest.approx(0.0)
    assert calibration_of(logits * 50, labels)["ece"] == pytest.approx(0.25)


def _one_hot(answers: list[int]) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[answers] * 4


def test_confusions_that_int8_changed_most_come_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    before, after = _one_hot([0, 0, 1, 1, 2, 2]), _one_hot([2, 2, 1, 1, 1, 2])
    confusions = answer_changes(before, after, labels, NAMES)["confusions"]
    assert confusions["changed"] == 2
    assert confusions["rows"] == [
        {"class": "owl", "answer": "elk", "fp32": 0, "int8": 2},
        {"class": "<b>hen</b>", "answer": "elk", "fp32": 1, "int8": 0},
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_flipped_images_are_named_and_pictured(tmp_path: Path, channels: int) -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    pixels = np.stack([np.full((8, 8, channels), 40 * k, dtype=np.uint8) for k in range(6)])
    pixels = pixels[..., 0] if channels == 1 else pixels
    preprocessing = Preprocessing(
        input_size=8,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation="bilinear",
        crop_fraction=1.0,
    )
    split = PreparedSplit(
        ImageSplit("test", labels, ArrayItems(pixels)), preprocessing, torch.from_numpy(labels), images=None
    )
    stale = tmp_path / "flipped" / "99.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    before, after = _one_hot([0, 0, 1, 1, 2, 2]), _one_hot([2, 0, 2, 1, 1, 2])
    before[0] *= 2
    rows = flipped_images(before, after, split, np.arange(6), NAMES, tmp_path)
    assert [(row["class"], row["image"], row["lost"], row["won"]) for row in rows] == [
        ("owl", 0, True, False),
        ("owl", 2, False, False),
        ("<b>hen</b>", 4, False, True),
    ]
    assert rows[0]["fp32"] == "owl"
    assert rows[0]["int8"] == "elk"
    assert rows[0]["fp32_confidence"] > rows[0]["int8_confidence"] > 0.9
    assert not stale.exists()
    for row in rows:
        with Image.open(tmp_path / row["picture"]) as picture:
            value = np.asarray(picture.convert("RGB"))
        assert value.shape == (8, 8, 3)
        assert np.abs(value.astype(int) - 40 * row["image"]).max() <= 2


def test_nothing_flipped_leaves_no_folder(tmp_path: Path) -> None:
    split = PreparedSplit(
        ImageSplit("test", np.zeros(2, dtype=np.int64), ArrayItems(np.zeros((2, 8, 8), dtype=np.uint8))),
        Preprocessing(input_size=8, channels=1, mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_fraction=1.0),
        torch.zeros(2, dtype=torch.int64),
        images=None,
    )
    logits = _one_hot([0, 0])
    assert flipped_images(logits, logits, split, np.arange(2), NAMES, tmp_path) == []
    assert not (tmp_path / "flipped").exists()
