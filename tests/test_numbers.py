"""Numbers that are none, channels that are dead, answers that never change: each is found, named, and not passed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from conftest import CommandLine
from edgecompress.errors import ParityError
from edgecompress.exporting.parity import compare_float
from edgecompress.settings.recipe import Gates

NETS = """\
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, classes)
        self.preprocessing = {"input_size": 8, "channels": 1}

    def forward(self, images):
        found = self.act(self.point(self.act(self.stem(images))))
        return self.head(found.mean((2, 3)))


class Logarithm(nn.Module):
    def forward(self, values):
        return torch.log(values.amax((2, 3)) - 2.5)  # no number where no pixel is bright enough


class Odd(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.odd = Logarithm()

    def forward(self, images):
        return super().forward(images) + 0 * self.odd(images)


def good(num_classes):
    torch.manual_seed(0)
    return Net(num_classes)


def weights(num_classes):
    net = good(num_classes)
    net.point.weight.data[2, 3] = float("inf")
    return net


def odd(num_classes):
    torch.manual_seed(0)
    return Odd(num_classes)


def dead(num_classes):
    net = good(num_classes)
    net.stem.bias.data[[1, 4, 6]] = -100.0
    return net


def silent(num_classes):
    net = good(num_classes)
    net.point.bias.data[:] = -1000.0
    return net


def black():
    generator = np.random.default_rng(0)
    labels = np.arange(64) % 4
    images = generator.integers(0, 256, (64, 8, 8), dtype=np.uint8)
    return {"train": (np.zeros_like(images), labels), "val": (images, labels)}


class Colours(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1, bias=False)
        self.stem.weight.data = torch.eye(3).reshape(3, 3, 1, 1)
        self.head = nn.Linear(3, classes)
        self.preprocessing = {"input_size": 8, "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}

    def forward(self, images):
        return self.head(torch.relu(self.stem(images)).mean((2, 3)))


def colours(num_classes):
    return Colours(num_classes)


def one_colour_a_class():
    labels = np.repeat(np.arange(3), 80)  # as folders of images are read: class after class
    images = np.random.default_rng(0).integers(0, 256, (240, 8, 8, 3), dtype=np.uint8)
    images[np.arange(3) != labels[:, None, None, None].repeat(8, 1).repeat(8, 2)] = 0
    return {"train": (images, labels), "val": (images, labels)}
"""
INT8 = "stages: [{id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 32}}]"


def recipe(folder: Path, *, model: str, data: str = "name: digits, max_train_samples: 128", stages: str = INT8) -> str:
    (folder / "nets.py").write_text(NETS)
    (folder / "mine.yaml").write_text(f"name: mine\ndata: {{{data}}}\nmodel: {{{model}}}\n{stages}\n")
    return "mine.yaml"


def manifest(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    return document


def good_weights() -> dict[str, torch.Tensor]:
    names: dict[str, Any] = {}
    exec(compile(NETS, "nets.py", "exec"), names)
    return dict(names["good"](10).state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_of_a_checkpoint(command_line: CommandLine, tmp_path: Path, value: float) -> None:
    weights = good_weights()
    weights["point.weight"][3, 1] = value
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    source = recipe(tmp_path, model="name: 'nets.py:good', checkpoint: w.safetensors")
    command_line("apply", source).refusal("w.safetensors: 'point.weight' holds values that are not finite")


def test_weights_of_a_model_of_ones_own(command_line: CommandLine, tmp_path: Path) -> None:
    source = recipe(tmp_path, model="name: 'nets.py:weights'")
    command_line("apply", source).refusal("model nets.py:weights: 'point.weight' holds NaN or infinity")


def test_activations_and_logits(command_line: CommandLine, tmp_path: Path) -> None:
    source = recipe(tmp_path, model="name: 'nets.py:odd'")
    answer = command_line("apply", source, "--output", "run")
    assert answer.exit_code == 1
    assert "evaluating initial: the logits are NaN or infinite on " in answer.stderr
    assert "of test (the first is image " in answer.stderr
    assert "first in layer 'odd'" in answer.stderr


@pytest.mark.parametrize(
    ("batch", "words"),
    [(16, "the loss is not finite in epoch 1, and '"), (128, "after epoch 1: evaluating: the logits are NaN")],
    ids=["loss", "logits after the last step"],
)
def test_a_loss(command_line: CommandLine, tmp_path: Path, batch: int, words: str) -> None:
    settings = f"epochs: 2, warmup_epochs: 0, optimizer: sgd, batch_size: {batch}, learning_rate: 1.0e+30"
    stages = f"stages: [{{id: dense, kind: train, {settings}}}]"
    source = recipe(tmp_path, model="name: 'nets.py:good'", stages=stages)
    answer = command_line("apply", source, "--output", "run")
    assert answer.exit_code == 1
    assert words in answer.stderr
    assert "lower learning_rate (1e+30)" in answer.stderr
    assert manifest(tmp_path)["status"] == "failed"


@pytest.fixture
def finished(command_line: CommandLine, tmp_path: Path) -> Path:
    """A complete run of the net with random weights."""
    source = recipe(tmp_path, model="name: 'nets.py:good'")
    assert command_line("apply", source, "--output", "run", "--no-gate").exit_code == 0
    return tmp_path / "run"


def test_weights_of_a_stage(command_line: CommandLine, finished: Path) -> None:
    path = finished / "stages" / "initial" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["stem.bias"][2] = float("nan")
    safetensors.torch.save_file(tensors, path)
    command_line("export", finished).refusal("model.safetensors: 'stem.bias' holds NaN or infinity; run the stage")


def test_numbers_of_an_int8_stage(command_line: CommandLine, finished: Path) -> None:
    path = finished / "stages" / "int8" / "model.safetensors"
    sound = safetensors.torch.load_file(path)
    floats = [name for name, value in sound.items() if value.is_floating_point()]
    assert floats
    for name in floats:
        damaged = {key: value.clone() for key, value in sound.items()}
        damaged[name].view(-1)[0] = float("nan")
        safetensors.torch.save_file(damaged, path)
        answer = command_line("export", finished, "--int8")
        answer.refusal("stages/int8: ")
        assert f"'{name}' holds NaN or infinity" in answer.stderr or "that mean nothing" in answer.stderr


@pytest.mark.parametrize("who", ["PyTorch", "the fp32 ONNX file"])
def test_logits_of_an_exported_file(who: str) -> None:
    sound = np.eye(4, dtype=np.float32)
    wrong = sound.copy()
    wrong[2, 1] = np.nan
    pair = (wrong, sound) if who == "PyTorch" else (sound, wrong)
    with pytest.raises(ParityError, match=f"{who} gives NaN or infinity on 1 images"):
        compare_float(*pair, Gates())


def test_dead_channels(command_line: CommandLine, tmp_path: Path) -> None:
    source = recipe(tmp_path, model="name: 'nets.py:dead'")
    answer = command_line("apply", source, "--output", "run", "--no-gate")
    assert answer.exit_code == 0, answer.stderr
    found = manifest(tmp_path)
    (stage,) = found["stages"]
    assert stage["dead_channels"]["stem"] == {"dead": 3, "channels": 8}
    (note,) = [note for note in found["notes"] if "one value whatever the image shows" in note]
    assert "stem (3 of 8)" in note
    assert note in answer.stderr


def test_channels_of_other_classes_are_not_dead(command_line: CommandLine, tmp_path: Path) -> None:
    """Each channel has a value on the images of one class, and the classes come one after the other."""
    source = recipe(tmp_path, model="name: 'nets.py:colours'", data="name: 'nets.py:one_colour_a_class'")
    answer = command_line("apply", source, "--output", "run", "--no-gate")
    assert answer.exit_code == 0, answer.stderr
    (stage,) = manifest(tmp_path)["stages"]
    assert stage["dead_channels"] == {}


def test_a_sound_net_has_no_dead_stem(finished: Path) -> None:
    (stage,) = json.loads((finished / "run.json").read_text())["stages"]
    assert "stem" not in stage["dead_channels"]
    assert stage["only_zeros"] == []


@pytest.mark.parametrize("zero", [False, True], ids=["one class", "all zero"])
def test_a_constant_model(command_line: CommandLine, tmp_path: Path, zero: bool) -> None:
    weights = good_weights()
    weights["head.weight"].zero_()
    weights["head.bias"].zero_()
    if not zero:
        weights["head.bias"][7] = 3.0
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    source = recipe(tmp_path, model="name: 'nets.py:good', checkpoint: w.safetensors")
    answer = command_line("apply", source, "--output", "run", "--no-gate")
    assert answer.exit_code == 0, answer.stderr
    label = "0" if zero else "7"
    assert f"stage initial: the model takes every image for '{label}'" in " ".join(answer.stderr.split())
    assert any(f"takes every image for '{label}'" in note for note in manifest(tmp_path)["notes"])
    exported = command_line("export", "run", "--int8")
    assert exported.exit_code == 3, exported.stderr
    assert f"gives every image the same answer, '{label}', so parity proves nothing" in exported.stdout
    parity = json.loads((tmp_path / "run" / "export" / "parity.json").read_text())
    assert (parity["constant_predictions"], parity["constant_class"]) == (True, label)
    assert parity["onnx_int8"]["sqnr_db"] is None  # of no logits, or of logits that int8 gives exactly


def test_classes_without_an_image(command_line: CommandLine, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, classes in {"train": "cat dog emu", "val": "cat emu", "test": "dog emu"}.items():
        for name in classes.split():
            for number in range(12):
                path = tmp_path / "pictures" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    source = recipe(tmp_path, model="name: 'nets.py:good'", data="name: image_folder, root: pictures")
    answer = command_line("apply", source, "--output", "run", "--no-gate")
    assert answer.exit_code == 0, answer.stderr
    notes = manifest(tmp_path)["notes"]
    assert "val: holds 2 of 3 classes; no image of 'dog'" in notes
    assert "test: holds 2 of 3 classes; no image of 'cat'" in notes
    assert "note: test: holds 2 of 3 classes; no image of 'cat'" in answer.stderr
    (tmp_path / "index.json").write_text('{"cat": 4, "dog": 2, "emu": 0}')
    data = "name: image_folder, root: pictures, class_index: index.json"
    source = recipe(tmp_path, model="name: 'nets.py:good'", data=data)
    assert command_line("apply", source, "--output", "other", "--no-gate").exit_code == 0
    notes = json.loads((tmp_path / "other" / "run.json").read_text())["notes"]
    assert "val: holds 2 of 3 classes; no image of 'dog'" in notes


def test_calibration_on_black_images(command_line: CommandLine, tmp_path: Path) -> None:
    source = recipe(tmp_path, model="name: 'nets.py:good'", data="name: 'nets.py:black'")
    answer = command_line("apply", source, "--output", "run", "--no-gate")
    assert answer.exit_code == 1
    assert "the calibration images are all of one value (-1 once normalized)" in answer.stderr


def test_calibration_that_saw_only_zeros_in_a_layer(command_line: CommandLine, tmp_path: Path) -> None:
    source = recipe(tmp_path, model="name: 'nets.py:silent'")
    answer = command_line("apply", source, "--output", "run", "--no-gate")
    assert answer.exit_code == 0, answer.stderr
    (stage,) = manifest(tmp_path)["stages"]
    assert "point" in stage["only_zeros"]
    assert "calibration saw nothing but zeros in" in answer.stderr
    assert "(point" in answer.stderr
