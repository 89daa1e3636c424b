"""Odd images through the command: what is an image is read, what is none is counted and named."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import CommandLine
from edgecompress.data.images import FileItems
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.device.infer import BundleError, read_image
from edgecompress.errors import DataError

GREY, COLOUR = (Preprocessing(8, channels, (0.5,) * channels, (0.5,) * channels) for channels in (1, 3))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 9, 3), dtype=np.uint8))


def large_png(path: Path, side: int) -> None:
    """A whole, valid PNG of one bit a pixel, written row by row: a few kilobytes for `side` x `side` pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def read(path: Path, preprocessing: Preprocessing = COLOUR) -> np.ndarray:
    return FileItems(path.parent, (path.name,), (path.stat().st_size,)).decode(0, preprocessing)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_picture_is_read(tmp_path: Path, suffix: str) -> None:
    still, moving = tmp_path / f"still.{suffix}", tmp_path / f"moving.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    first = picture().quantize(64).convert("RGB") if suffix == "gif" else picture()
    first.save(still, **lossless)
    first.save(moving, save_all=True, append_images=[picture(1), picture(2)], **lossless)
    with Image.open(moving) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert np.abs(read(moving).astype(int) - read(still)).max() <= 2


def test_cmyk_and_sixteen_bits_are_read_as_what_they_show(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 30, 90))
    flat.convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(read(tmp_path / "ink.jpg").astype(int) - np.array([200, 30, 90])[:, None, None]).max() <= 4
    levels = np.full((8, 8), 0x8080, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert set(read(tmp_path / "deep.png", GREY).ravel().tolist()) == {0x80}


def bad_images(folder: Path) -> dict[str, Path]:
    """One of each kind that cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    picture().resize((64, 64)).save(folder / "whole.jpg", quality=95)
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no image\n")
    large_png(folder / "large.png", 20_000)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["half.jpg", "empty.png", "text.jpg", "large.png"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = bad_images(tmp_path)[name]
    with pytest.raises(DataError, match=f"{name}: cannot be decoded"):
        read(path)
    with pytest.raises(BundleError, match=f"{name}: cannot be decoded"):
        read_image(path, 3)
    if name == "large.png":
        assert path.stat().st_size < 200_000
        with pytest.raises(DataError, match="400000000 pixels"):
            read(path)


RECIPE = """\
name: mine
data: {name: image_folder, root: pictures}
model: {name: resnet8, arguments: {width: 4}, preprocessing: {input_size: 8, mean: M, std: M}}
stages: [STAGE]
""".replace("M", "[0.5, 0.5, 0.5]")
TRAIN = "{id: dense, kind: train, epochs: 1, warmup_epochs: 0}"
INT8 = "{id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split, count in {"train": 210, "val": 4}.items():
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(number).save(tmp_path / "pictures" / split / name / f"{number}.png")
    return tmp_path / "pictures"


def test_a_small_share_is_left_out_and_named_and_more_is_an_error(
    command_line: CommandLine, tmp_path: Path, pictures: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("STAGE", TRAIN))
    bad_images(pictures / "train" / "cat")
    answer = command_line("apply", "mine.yaml", "--output", "few", "--no-gate")
    assert answer.exit_code == 0, answer.stderr
    assert "train: 4 of 424 images cannot be decoded and are left out:" in answer.stderr
    assert "train/cat/empty.png: cannot be decoded" in answer.stderr
    assert "and 1 more" in answer.stderr
    (pictures / "train" / "dog" / "one_more.png").write_bytes(b"")
    refused = command_line("apply", "mine.yaml", "--output", "many").refusal("train: 5 of 425 images cannot be decoded")
    assert "left out" not in refused
    assert not (tmp_path / "many").exists()


def test_where_images_are_not_kept_all_faults_are_counted_at_the_first(
    command_line: CommandLine, tmp_path: Path, pictures: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("STAGE", INT8))
    for number in range(4):
        (pictures / "val" / "cat" / f"{number}.png").write_bytes(b"no image")
    message = command_line("apply", "mine.yaml", "--output", "run").refusal("val: 4 of 8 images cannot be decoded:")
    assert "val/cat/0.png: cannot be decoded" in message
    assert "and 1 more" in message


def test_a_fault_found_after_work_was_done_leaves_the_run(
    command_line: CommandLine, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluated model and the calibration stay, with the error recorded; the same command goes on from there."""
    from edgecompress.steps import quantize_run

    def unreadable(*_: object) -> None:
        raise DataError("train/cat/0.png: cannot be decoded")

    (tmp_path / "mine.yaml").write_text(RECIPE.replace("STAGE", INT8))
    with monkeypatch.context() as patched:
        patched.setattr(quantize_run, "dead_channels", unreadable)
        answer = command_line("apply", "mine.yaml", "--output", "run", "--no-gate")
    answer.refusal("train/cat/0.png: cannot be decoded")
    assert "what was done is kept; once that is mended, go on with" in answer.stderr
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "train/cat/0.png: cannot be decoded")
    again = command_line("apply", "mine.yaml", "--output", "run", "--no-gate", "--resume")
    assert again.exit_code == 0, again.stderr
    assert "given model:" not in again.stderr, "evaluated before, and kept"
