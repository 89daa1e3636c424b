"""`init`: what it finds in data and model, and that what it writes loads, runs and replaces nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import CommandLine
from edgecompress.commands.cli_schemas import read_schema
from edgecompress.models.nets import SMALL_NETS
from edgecompress.settings.recipe import load_recipe
from edgecompress.settings.target import load_target

HOSTILE = "b # name: x"


def image_folder(root: Path, counts: dict[str, int]) -> Path:
    """Colour photographs of several sizes, each class of a colour of its own."""
    generator = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(count):
            height, width = 40 + 4 * (number % 3), 52
            pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
            pixels[..., label % 3] += 150
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def initialised(command_line: CommandLine, *words: str | Path) -> dict[str, Any]:
    answer = command_line("init", *words, "--json")
    assert answer.exit_code == 0, answer.stdout
    document: dict[str, Any] = json.loads(answer.stdout)
    jsonschema.Draft202012Validator(read_schema("init")).validate(document)
    return document


def test_an_image_folder(command_line: CommandLine, tmp_path: Path) -> None:
    image_folder(tmp_path / "my images", {"a": 40, HOSTILE: 8, "c": 20})
    document = initialised(command_line, "--data", "my images", "--goal", "prune")
    assert (document["recipe"], document["target"]) == ("my-images.yaml", "my-images-target.yaml")
    assert document["next"] == "edgecompress run my-images.yaml --target my-images-target.yaml"
    assert document["data"]["num_classes"] == 3
    assert (document["data"]["channels"], document["data"]["native_size"]) == (3, None)
    assert document["data"]["largest_class"] == {"name": "a", "images": 34}
    assert document["data"]["smallest_class"]["name"] == HOSTILE
    recipe = load_recipe("my-images.yaml")
    assert [stage.kind for stage in recipe.stages] == ["train", "prune", "quantize"]
    assert recipe.model.name == "resnet20"
    assert recipe.model.preprocessing.input_size == 32, "at most the median of the shorter sides, 44"
    assert recipe.stages[0].label_smoothing == 0.1  # type: ignore[union-attr]  # a train stage; classes are uneven
    assert load_target("my-images-target.yaml").name == "my-images-target"
    text = (tmp_path / "my-images.yaml").read_text()
    assert "edgecompress run my-images.yaml --target my-images-target.yaml" in text
    assert "40 to 48 px" in text


def test_under_a_class_index_the_folders_are_counted(command_line: CommandLine, tmp_path: Path) -> None:
    image_folder(tmp_path / "images", {"a": 10, "b": 10})
    (tmp_path / "index.json").write_text('{"a": 3, "b": 701}')
    initialised(command_line, "--data", "images", "--class-index", "index.json")
    assert "# Found: 2 of the model's classes (class_index goes up to 701);" in (tmp_path / "images.yaml").read_text()


@pytest.mark.parametrize(("classes", "kinds"), [(10, ["quantize"]), (7, ["train", "quantize"])])
def test_a_checkpoint(command_line: CommandLine, tmp_path: Path, classes: int, kinds: list[str]) -> None:
    """Weights that know the classes go straight to int8; others get a stage that trains their new head."""
    torch.manual_seed(0)
    module = SMALL_NETS["resnet8"](num_classes=classes, in_channels=1, input_size=16)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    words = ["mine.yaml", "--data", "digits", "--model", "resnet8", "--checkpoint", "w.safetensors"]
    document = initialised(command_line, *words, "--target", "rpi4")
    assert document["target"] is None
    assert document["model"]["weights"] == "checkpoint"
    assert document["next"].endswith("--target rpi4")
    assert [stage.kind for stage in load_recipe("mine.yaml").stages] == kinds
    assert any("head re-initialised" in note for note in document["notes"]) == (classes == 7)


def test_published_weights_are_looked_up_and_not_downloaded(command_line: CommandLine, tmp_path: Path) -> None:
    image_folder(tmp_path / "images", {"a": 10, "b": 10})
    words = [
        "--data",
        "images",
        "--model",
        "torchvision/resnet18",
        "--pretrained",
        "--goal",
        "prune",
        "--target",
        "x86",
    ]
    document = initialised(command_line, *words)
    recipe = load_recipe(document["recipe"])
    assert recipe.model.pretrained
    assert [stage.kind for stage in recipe.stages] == ["train", "prune", "quantize"]
    assert "the published weights have 1000 classes, the data 2" in document["notes"]


def test_nothing_is_replaced_and_nothing_is_left_behind(command_line: CommandLine, tmp_path: Path) -> None:
    initialised(command_line, "--data", "digits")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command_line("init", "--data", "digits").refusal("digits.yaml: is already there")
    (tmp_path / "digits.yaml").unlink()
    command_line("init", "--data", "digits").refusal("digits-target.yaml: is already there")
    (tmp_path / "digits-target.yaml").unlink()
    for words, message in (
        (["--data", "digit"], "did you mean 'digits'?"),
        (["--data", "nowhere/images"], "nowhere/images"),
        (["--data", "digits", "--model", "resnet9"], "did you mean 'resnet"),
        (["--data", "digits", "--target", "rpi9"], "target 'rpi9'"),
        (["--data", "digits", "--checkpoint", "w.pt"], "without --model"),
        (["no/such/r.yaml", "--data", "digits"], "its folder is not there"),
        (["r.txt", "--data", "digits"], "name it r.yaml"),
        ([], "--data: required where there is no terminal"),
    ):
        command_line("init", *words).refusal(message)
        assert list(tmp_path.iterdir()) == [], words
    assert before.keys() == {"digits.yaml", "digits-target.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("data", ["images", "digits"])
def test_what_is_written_runs(command_line: CommandLine, tmp_path: Path, data: str) -> None:
    image_folder(tmp_path / "images", {"a": 30, HOSTILE: 12, "c": 30})
    initialised(command_line, "--data", data, "--goal", "prune")
    quick = ["data.max_train_samples=60", "model.arguments={width: 8}", "stages.trained.epochs=2"]
    quick += ["stages.pruned.epochs=2", "stages.pruned.steps=1", "stages.int8.effort=fast"]
    settings = [word for override in quick for word in ("--set", override)]
    words = ["apply", f"{data}.yaml", "--target", f"{data}-target.yaml", "--output", "run", "--no-gate", *settings]
    answer = command_line(*words)
    assert answer.exit_code == 0, answer.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"
