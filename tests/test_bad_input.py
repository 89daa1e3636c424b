"""Bad input, through the command line: one clear message, exit code 2, no traceback, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import CommandLine
from edgecompress.errors import DataError
from edgecompress.run_directory import RunDirectory
from edgecompress.settings.recipe import Recipe, load_recipe

RECIPE = """\
name: mine
data: {name: digits}
model: {name: resnet8}
stages:
  - {id: dense, kind: train, epochs: 2}
  - {id: pruned, kind: prune, channel_ratio: 0.4, epochs: 2, teacher: {stage: dense}}
  - {id: int8, kind: quantize}
"""
EVALUATED_ONLY = """\
name: mine
data: {name: digits}
model: {name: resnet8}
stages:
  - {id: int8, kind: quantize}
"""


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(command_line: CommandLine, folder: Path, arguments: Sequence[str | Path], *needles: str) -> str:
    """Give the command twice, for people and with --json: the same message both times, and the folder as before."""
    before = files_in(folder), sorted(folder.iterdir())
    message = command_line(*arguments).refusal(*needles)
    assert command_line(*arguments, "--json").json_refusal() == message
    assert (files_in(folder), sorted(folder.iterdir())) == before
    return message


def swapped(old: str, new: str) -> str:
    assert old in RECIPE
    return RECIPE.replace(old, new)


# ---- recipes, targets and overrides: refused before torch is loaded


FAULTY_RECIPES = {
    "unknown key": (swapped("epochs: 2}", "epoch: 2}"), ["mine.yaml: stages.dense.epoch: unknown key", "'epochs'?"]),
    "unknown key at the top": (RECIPE + "modell: 1\n", ["mine.yaml: modell: unknown key; did you mean 'model'?"]),
    "percent": (swapped("0.4", "40"), ["stages.pruned.channel_ratio: 40 is not a fraction", "did you mean 0.4?"]),
    "teacher stage": (
        swapped("{stage: dense}", "{stage: dens}"),
        ["mine.yaml: stages.pruned.teacher.stage: 'dens' is no earlier stage; did you mean 'dense'?"],
    ),
    "no teacher": (
        swapped("{stage: dense}", "{temperature: 2}"),
        ["stages.pruned.teacher: give one of stage (an earlier stage's id), model"],
    ),
    "two teachers": (
        swapped("{stage: dense}", "{stage: dense, model: {name: resnet8}}"),
        ["stages.pruned.teacher: give one of stage"],
    ),
    "quantize not last": (
        RECIPE + "  - {id: more, kind: train}\n",
        ["mine.yaml: stages.int8: quantize must be the last stage; move it to the end"],
    ),
    "one id twice": (swapped("id: pruned", "id: dense"), ["mine.yaml: stages.dense: two stages have this id"]),
    "reserved id": (swapped("id: pruned", "id: initial"), ["stages.initial: this id is kept for the model"]),
    "unknown kind": (swapped("kind: prune", "kind: prun"), ["stages.pruned.kind: unknown kind 'prun'", "'prune'?"]),
    "no kind": (swapped(", kind: train", ""), ["stages.dense.kind: required, but not given (train, distill,"]),
    "no stages": (
        RECIPE.split("stages:")[0] + "stages: []\n",
        ["mine.yaml: stages: Tuple should have at least 1 item"],
    ),
    "no model": (swapped("model: {name: resnet8}\n", ""), ["mine.yaml: model: required, but not given"]),
    "warmup": (swapped("epochs: 2}", "epochs: 1}"), ["stages.dense: warmup_epochs (1) must be below epochs (1)"]),
    "wrong type": (swapped("epochs: 2}", "epochs: many}"), ["stages.dense.epochs:", "valid integer", "'many'"]),
    "not allowed": (
        swapped("epochs: 2}", "epochs: 2, optimizer: adam}"),
        ["stages.dense.optimizer: 'adam' is not allowed; did you mean 'adamw'?"],
    ),
    "other method's ratio": (
        swapped("channel_ratio: 0.4", "method: unstructured, channel_ratio: 0.4"),
        ["stages.pruned: method unstructured needs sparsity"],
    ),
    "not yaml": ("a: [1\nb: 2\n", ["mine.yaml: not valid YAML: line 2, column 2: ", "expected ',' or ']'"]),
    "a list": ("- a\n- b\n", ["mine.yaml: expected a mapping", "found a list"]),
    "plain text": ("hello\n", ["mine.yaml: expected a mapping", "found a str"]),
    "empty": ("# nothing yet\n", ["mine.yaml: expected a mapping", "found nothing"]),
    "duplicate key": (RECIPE + "stages: []\n", ["mine.yaml: not valid YAML: line 8: the key 'stages' stands twice"]),
    "alias": ("a: &x [1]\nb: *x\n", ["mine.yaml: not valid YAML: line 2: YAML aliases are not supported"]),
    "billion laughs": (
        "a: &a [x, x]\n"
        + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)),
        ["aliases are not supported"],
    ),
    "python tag": (
        "name: !!python/object/apply:os.system ['touch payload-ran']\n",
        ["mine.yaml: not valid YAML: line 1, column 7: could not determine a constructor", "os.system"],
    ),
    "large": ("# " + "x" * 1_000_000 + "\n", ["mine.yaml: larger than 1000000 bytes"]),
}


@pytest.mark.parametrize(("text", "needles"), FAULTY_RECIPES.values(), ids=FAULTY_RECIPES.keys())
def test_faulty_recipe(command_line: CommandLine, tmp_path: Path, text: str, needles: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    message = refused(command_line, tmp_path, ["run", "mine.yaml", "--target", "x86"], *needles)
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "payload-ran").exists()
    assert command_line("recipes", "validate", "mine.yaml").refusal() == message


def test_many_faults_at_once_each_with_its_place(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        swapped("0.4", "40").replace("epochs: 2}", "epoch: 2}") + "gates: {max_accuracy_drop: 3, max_sample: 1}\n"
    )
    arguments = ["run", "mine.yaml", "--target", "x87", "--target", "rpi55"]
    message = refused(command_line, tmp_path, arguments)
    assert sorted(line.partition(";")[0] for line in message.splitlines()) == [
        "mine.yaml: gates.max_accuracy_drop: 3 is not a fraction from 0 to 1",
        "mine.yaml: gates.max_sample: unknown key",
        "mine.yaml: stages.dense.epoch: unknown key",
        "mine.yaml: stages.pruned.channel_ratio: 40 is not a fraction between 0 and 1",
        "target 'rpi55': no file and no shipped target of that name",
        "target 'x87': no file and no shipped target of that name",
    ]


def test_faults_between_stages_are_told_together(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        swapped("{stage: dense}", "{stage: dens}") + "  - {id: dense, kind: train}\n  - {id: int8, kind: train}\n"
    )
    message = refused(command_line, tmp_path, ["apply", "mine.yaml"])
    assert [line.removeprefix("mine.yaml: stages.").partition(":")[0] for line in message.splitlines()] == [
        "pruned.teacher.stage",
        "int8",  # not last
        "dense",  # twice
        "int8",  # twice
        "int8",  # kept for the quantize stage
    ]


REFUSED_ARGUMENTS = {
    "missing recipe file": (
        ["run", "recipes/nope.yaml", "--target", "x86"],
        ["recipe 'recipes/nope.yaml': no such file; known: chain, distill"],
    ),
    "misspelled recipe": (["run", "prune_kdd", "--target", "x86"], ["recipe 'prune_kdd'", "did you mean 'prune_kd'?"]),
    "endless name": (["run", "a" * 5_000, "--target", "x86"], ["no file and no shipped recipe"]),
    "recipe is a folder": (["run", ".", "--target", "x86"], ["recipe '.'"]),
    "missing target": (["run", "prune_kd", "--target", "rpi6"], ["target 'rpi6'", "did you mean 'rpi5'?"]),
    "missing target file": (["apply", "prune_kd", "--target", "a/b.yaml"], ["target 'a/b.yaml': no such file"]),
    "set without =": (["apply", "prune_kd", "--set", "seed"], ["--set seed: expected path=value"]),
    "set without a path": (["apply", "prune_kd", "--set", "=1"], ["--set =1: expected path=value"]),
    "set with an empty name": (["apply", "prune_kd", "--set", "a..b=1"], ["--set a..b: a name between the dots"]),
    "set a missing stage": (
        ["apply", "prune_kd", "--set", "stages.prunde.epochs=3"],
        ["--set stages.prunde.epochs: the list has no element 'prunde'; did you mean 'pruned'?"],
    ),
    "set beyond the list": (["apply", "prune_kd", "--set", "stages.7.epochs=3"], ["the list has no element '7'"]),
    "set inside a plain value": (
        ["apply", "prune_kd", "--set", "seed.deeper=1"],
        ["--set seed.deeper: 'deeper' is inside a plain value (0), which has no keys"],
    ),
    "set what is no yaml": (
        ["apply", "prune_kd", "--set", "seed=[1"],
        ["--set seed: not valid YAML: line ", "expected ',' or ']'"],
    ),
    "set an unknown key": (
        ["apply", "prune_kd", "--set", "model.checkpont=x.pt"],
        ["prune_kd: model.checkpont: unknown key; did you mean 'checkpoint'?"],
    ),
    "set bytes that are no text": (
        ["apply", "prune_kd", "--set", "\udcff=1"],
        ["should be a valid string", r"'\udcff'"],
    ),
    "resume what": (["apply", "prune_kd", "--resume"], ["--resume needs --output DIR"]),
    "export without a run": (["export"], ["no run yet under runs/; start one with: edgecompress run"]),
    "profile without a run": (["profile", "--target", "x86"], ["no run yet under runs/"]),
    "report without a run": (["report"], ["no run yet under runs/"]),
    "run is a missing folder": (["export", "nope"], ["nope: not a run directory (it holds no run.json)"]),
    "endless folder name": (["report", "a" * 5_000], ["cannot be read: File name too long"]),
    "two presets": (["run", "prune_kd", "--target", "x86", "--quick", "--thorough"], ["give one of them"]),
    "endless time": (["run", "prune_kd", "--target", "x86", "--seconds", "inf"], ["--seconds: inf"]),
}


@pytest.mark.parametrize(("arguments", "needles"), REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS.keys())
def test_refused_arguments(command_line: CommandLine, tmp_path: Path, arguments: list[str], needles: list[str]) -> None:
    message = refused(command_line, tmp_path, arguments, *needles)
    assert len(message.splitlines()) == 1


def test_every_override_without_a_place_is_listed(command_line: CommandLine, tmp_path: Path) -> None:
    overrides = ["seed", "stages.prunde.epochs=3", "seed=[1", "name.x=1"]
    arguments = [word for override in overrides for word in ("--set", override)]
    message = refused(command_line, tmp_path, ["apply", "prune_kd", *arguments])
    assert [line.partition(":")[0] for line in message.splitlines()] == [
        "--set seed",
        "--set stages.prunde.epochs",
        "--set seed",
        "--set name.x",
    ]


def test_target_file_with_unknown_keys(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "board.yaml").write_text("architecture: aarch64\nthread: 2\nbudgets: {latency_p90: 5}\n")
    message = refused(command_line, tmp_path, ["run", "prune_kd", "--target", "board.yaml"])
    assert message.splitlines() == [
        "board.yaml: budgets.latency_p90: unknown key; did you mean 'latency_ms_p90'?",
        "board.yaml: thread: unknown key; did you mean 'threads'?",
    ]
    assert command_line("targets", "validate", "board.yaml").refusal() == message


def test_two_targets_of_one_name(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: x86\narchitecture: x86_64\nthreads: 2\n")
    arguments = ["run", "prune_kd", "--target", "x86", "--target", "mine.yaml"]
    refused(command_line, tmp_path, arguments, "--target mine.yaml: another target is called 'x86' too")


def test_recipe_that_is_no_text(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\x80\x02\xff\xfe")
    refused(command_line, tmp_path, ["apply", "weights.yaml"], "weights.yaml: is not text (UTF-8)")


# ---- run directories


def start_run(folder: Path, recipe: Path, **changes: object) -> Path:
    """A run of `recipe` that was started and has done nothing yet."""
    manifest = {
        "schema_version": 1,
        "recipe": load_recipe(str(recipe)).model_dump(mode="json"),
        "status": "running",
        "started_at": "2026-01-01T00:00:00+00:00",
        "stages": [],
        "targets": ["x86"],
    }
    RunDirectory(folder).write_manifest(manifest | changes)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("command", [["export"], ["profile", "--target", "x86"], ["report"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (None, "run: not a run directory"),
        ("{", "run.json: cannot be read"),
        ("[]", "run.json: expected a JSON object"),
        ("{}", "run.json: has no schema_version; it is damaged"),
        (
            '{"schema_version": 2}',
            "run.json: schema_version 2, this edgecompress reads 1; use the version that wrote it",
        ),
        ('{"schema_version": 1, "status": "running"}', "run.json: has no recipe, stages, targets; it is damaged"),
        ("[" * 100_000, "run.json: cannot be read"),
    ],
    ids=["foreign folder", "half a file", "a list", "no version", "a later version", "damaged", "deep"],
)
def test_run_that_is_no_run_directory(
    command_line: CommandLine, tmp_path: Path, command: list[str], content: str | None, needle: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("mine")
    if content is not None:
        (tmp_path / "run" / "run.json").write_text(content)
    refused(command_line, tmp_path, [command[0], "run", *command[1:]], needle)


def test_target_of_a_run_that_is_not_there(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    run = start_run(tmp_path / "run", recipe)
    refused(command_line, tmp_path, ["profile", run, "--target", "x87"], "target 'x87'", "did you mean 'x86'?")


def test_run_made_for_a_target_file_wants_it_again(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    run = start_run(tmp_path / "run", recipe, targets=["board"])
    refused(command_line, tmp_path, ["export", run], "was made for 'board', which is no shipped target", "--target")


def test_commands_out_of_order(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    run = start_run(tmp_path / "run", recipe, targets=[])
    refused(command_line, tmp_path, ["report", run], "no target yet; first: edgecompress profile")
    refused(command_line, tmp_path, ["profile", run, "--target", "x86"], "nothing exported for target x86; first: ")


def test_output_with_a_run_is_never_overwritten(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    run = start_run(tmp_path / "run", recipe)
    for command in (["apply", recipe, "--output", run], ["run", recipe, "--target", "x86", "--output", run]):
        refused(command_line, tmp_path, command, "run: a run is already there; go on with --resume, or choose another")


def test_output_that_is_a_file_or_holds_other_files(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    for command in (["apply", recipe], ["apply", recipe, "--resume"], ["run", recipe, "--target", "x86"]):
        refused(command_line, tmp_path, [*command, "--output", recipe], "mine.yaml: exists and is no run directory")
        refused(command_line, tmp_path, [*command, "--output", tmp_path], "exists and is no run directory; choose")
        refused(command_line, tmp_path, [*command, "--output", recipe / "run"], "cannot be written: Not a directory")


def test_resume_with_a_changed_recipe_names_the_change(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    run = start_run(tmp_path / "run", recipe)
    arguments = ["apply", recipe, "--output", run, "--resume", "--set", "stages.pruned.epochs=3", "--set", "seed=5"]
    message = refused(command_line, tmp_path, arguments, "run: was made with another recipe (")
    assert "seed: 0 there, 5 now" in message
    assert "stages.1.epochs: 2 there, 3 now" in message


# ---- models and data: these load torch, and say so only once a run directory was made, which is removed again


@pytest.mark.parametrize("output", [[], ["--output", "new/run"], ["--output", "empty"]], ids=["runs", "new", "empty"])
def test_unknown_model_leaves_nothing_behind(
    command_line: CommandLine, tmp_path: Path, recipe: Path, output: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    arguments = ["apply", recipe, *output, "--set", "model.name=resnet88"]
    refused(command_line, tmp_path, arguments, "resnet88", "did you mean 'resnet8'?")


def test_other_runs_stay_when_one_is_refused(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    start_run(tmp_path / "runs" / "other", recipe)
    refused(command_line, tmp_path, ["apply", recipe, "--set", "model.name=nope"], "nope")


def test_resumed_run_is_kept_when_its_data_is_gone(command_line: CommandLine, tmp_path: Path) -> None:
    data = "image_folder, root: pictures"
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("digits", data))
    recipe = tmp_path / "mine.yaml"
    run = start_run(tmp_path / "run", recipe)
    answer = command_line("apply", recipe, "--output", run, "--resume")
    answer.refusal("pictures: has no folder train/")
    manifest = RunDirectory(run).read_manifest()
    assert manifest["status"] == "failed"
    assert "pictures" in manifest["error"]


def test_run_with_a_stage_done_is_kept_and_says_how_to_go_on(
    command_line: CommandLine, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgecompress import pipeline

    def one_stage_and_no_more(recipe: Recipe, run: RunDirectory, target: object, **_: object) -> None:
        run.update_manifest(lambda m: m["stages"][0].update(status="complete"))
        raise DataError("pictures: gone")

    monkeypatch.setattr(pipeline, "apply_recipe", one_stage_and_no_more)
    answer = command_line("apply", recipe, "--output", "run")
    answer.refusal("pictures: gone")
    assert (
        "what was done is kept; once that is mended, go on with the same command and: --output run --resume"
        in answer.stderr
    )
    manifest = RunDirectory(tmp_path / "run").read_manifest()
    assert (manifest["status"], manifest["error"]) == ("failed", "pictures: gone")


def test_unknown_data(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    arguments = ["apply", recipe, "--set", "data.name=digit"]
    refused(command_line, tmp_path, arguments, "data.name: unknown 'digit'; did you mean 'digits'?")


def write_image(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 128).save(path)


def image_folder(*more: str) -> list[str]:
    words = ["data.name=image_folder", "data.root=pictures", *more]
    return [part for word in words for part in ("--set", word)]


def test_image_folder_without_images(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "pictures" / "train" / "cat").mkdir(parents=True)
    needles = "pictures/train: 1 class folders and no image in them; expected train/<class>/<image>"
    refused(command_line, tmp_path, ["apply", recipe, *image_folder()], needles)


def test_class_folder_that_the_index_lacks(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    for name in ("cat", "dog", "emu"):
        write_image(tmp_path / "pictures" / "train" / name / "a.png")
    (tmp_path / "index.json").write_text('{"cat": 0, "dog": 5}')
    arguments = ["apply", recipe, *image_folder("data.class_index=index.json")]
    refused(command_line, tmp_path, arguments, "train: unknown class folders 'emu': index.json does not list them; add")
    arguments[-1] = "data.class_index=nope.json"
    refused(command_line, tmp_path, arguments, "nope.json: data.class_index cannot be read")


def test_missing_checkpoint(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    arguments = ["run", recipe, "--target", "x86", "--set", "model.checkpoint=weights/best.pt"]
    refused(
        command_line, tmp_path, arguments, "model.checkpoint: there is no file weights/best.pt; give a .safetensors"
    )


def test_checkpoint_of_another_model(command_line: CommandLine, tmp_path: Path, recipe: Path) -> None:
    import torch

    torch.save({"backbone.weight": torch.zeros(3)}, tmp_path / "other.pt")
    arguments = ["apply", recipe, "--set", "model.checkpoint=other.pt"]
    message = refused(command_line, tmp_path, arguments, "other.pt: does not fit the model:", "check model.name")
    assert "unexpected: backbone.weight" in message
    assert "missing: " in message


def head_of(classes: int, path: Path) -> None:
    import torch

    from edgecompress.models.nets import SMALL_NETS

    torch.save(SMALL_NETS["resnet8"](num_classes=classes, in_channels=1, input_size=8).state_dict(), path)


@pytest.mark.parametrize("command", [["apply"], ["run", "--target", "x86"], ["run", "--target", "x86", "--dry-run"]])
def test_a_new_head_that_no_stage_trains(command_line: CommandLine, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(EVALUATED_ONLY)
    head_of(12, tmp_path / "twelve.pt")
    name, *options = command
    arguments = [name, "mine.yaml", *options, "--set", "model.checkpoint=twelve.pt"]
    needles = ["the checkpoint has 12 classes, the model 10, so the head would be new and no stage trains it"]
    needles += ["add a train stage (`edgecompress init` writes one)", "give data.class_index"]
    refused(command_line, tmp_path, arguments, *needles)


def test_a_dry_run_says_so_where_published_weights_know_other_classes(
    command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(EVALUATED_ONLY)
    model = ["--set", "model={name: torchvision/squeezenet1_1, pretrained: true, preprocessing: {input_size: 32}}"]
    refused(command_line, tmp_path, ["apply", "mine.yaml", "--dry-run", *model], "have 1000 classes, the model 10, so")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    assert command_line("apply", "mine.yaml", "--dry-run", *model).exit_code == 0


@pytest.mark.parametrize(
    "value", ["model.checkpoint=FILE", "stages.pruned.teacher={model: {name: resnet8, checkpoint: FILE}}"]
)
def test_a_dry_run_loads_the_checkpoints(command_line: CommandLine, tmp_path: Path, recipe: Path, value: str) -> None:
    head_of(10, tmp_path / "ten.pt")
    dry = ["apply", recipe, "--dry-run", "--set"]
    refused(command_line, tmp_path, [*dry, value.replace("FILE", "nowhere.pt")], "there is no file nowhere.pt")
    assert command_line(*dry, value.replace("FILE", "ten.pt")).exit_code == 0


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("container", ["pickle", "torch.save", "torch.save in a state dict"])
def test_checkpoint_with_code_in_it_is_not_run(
    command_line: CommandLine, tmp_path: Path, recipe: Path, suffix: str, container: str
) -> None:
    import torch

    marker, checkpoint = tmp_path / "payload-ran", tmp_path / f"weights{suffix}"
    payload = Payload(f"touch '{marker}'")
    if container == "pickle":
        checkpoint.write_bytes(pickle.dumps(payload))
        pickle.loads(checkpoint.read_bytes())
    else:
        stored = {"conv1.weight": torch.zeros(1), "evil": payload} if container.endswith("state dict") else payload
        torch.save(stored, checkpoint)
        torch.load(io.BytesIO(checkpoint.read_bytes()), weights_only=False)
    assert marker.exists(), "the payload must work, or this proves nothing"
    marker.unlink()
    expected = "not a whole safetensors file" if suffix == ".safetensors" else "contains code (pickle) and is refused"
    arguments = ["apply", recipe, "--set", f"model.checkpoint=weights{suffix}"]
    refused(command_line, tmp_path, arguments, f"weights{suffix}: ", expected)
    assert not marker.exists()


def test_exclude_that_matches_nothing(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        EVALUATED_ONLY.replace("kind: quantize", "kind: prune, channel_ratio: 0.3").replace("int8", "pruned")
    )
    arguments = ["apply", "mine.yaml", "--set", "stages.pruned.exclude=['blocks.2.conv9*']"]
    refused(
        command_line, tmp_path, arguments, "exclude: 'blocks.2.conv9*' matches no layer; did you mean 'blocks.2.conv"
    )


# ---- the same as real processes


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["run", "prune_kdd", "--target", "x86"], "did you mean 'prune_kd'?"),
        (["run", "prune_kd", "--target", "x86", "--set", "stages.pruned.channel_ratio=40"], "did you mean 0.4?"),
        (["export"], "no run yet under runs/"),
        (["recipes", "validate", "mine.yaml"], "mine.yaml: nam: unknown key; did you mean 'name'?"),
    ],
    ids=["misspelled recipe", "percent", "no run yet", "unknown key"],
)
def test_as_a_process(tmp_path: Path, arguments: list[str], needle: str) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("name: mine", "nam: mine"))

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgecompress", *arguments, *more]
        package = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": package}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    plain = run()
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("error: ")
    assert needle in plain.stderr
    assert "Traceback" not in plain.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    if arguments == ["export"]:  # --json once: each process takes half a second
        as_json = run("--json")
        assert (as_json.returncode, as_json.stderr) == (2, "")
        document = json.loads(as_json.stdout)
        assert document == {"error": plain.stderr.removeprefix("error: ").rstrip("\n"), "exit_code": 2}
