"""The published schemas: what every command prints with --json is one document that its schema describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.main import get_command

from bundle_runs import small_run
from conftest import CommandLine
from edgecompress.cli import app
from edgecompress.commands.cli_schemas import FOLDER, read_schema, schema_names

TINY = (
    *("stages.dense.epochs=1", "stages.dense.warmup_epochs=0", "stages.pruned.epochs=1", "stages.pruned.steps=1"),
    *("stages.pruned.epochs_between=1", "stages.pruned.warmup_epochs=0", "data.max_train_samples=128"),
    *("stages.int8.effort=fast", "stages.int8.calibration.samples=32", "model.arguments.width=8"),
)


def faults(document: Any, name: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(read_schema(name))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def commands(group: Any, prefix: str = "") -> list[str]:
    found = []
    for name, command in group.commands.items():
        found += commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else [prefix + name]
    return found


def options_of(group: Any) -> dict[str, list[str]]:
    found = {}
    for name in commands(group):
        command = group
        for word in name.split():
            command = command.commands[word]
        found[name] = [option for parameter in command.params for option in parameter.opts]
    return found


@pytest.mark.parametrize("name", schema_names())
def test_every_schema_is_one_and_has_a_version(name: str) -> None:
    schema = read_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:edgecompress:schema:{name}:{schema['x-version']}"
    assert schema["title"]


def test_every_command_has_a_schema_and_no_schema_names_another() -> None:
    described = {command for name in schema_names() for command in read_schema(name)["x-commands"]}
    assert described == set(commands(get_command(app)))


def test_every_command_is_run_below() -> None:
    """A new command, or an old one that learns --dry-run, is not forgotten here."""
    ran = [words.split() for _, words in (*QUICK, *SMALL)] + [words for _, words in LINE]
    names = commands(get_command(app))
    assert [name for name in names if not any(words[: len(name.split())] == name.split() for words in ran)] == []
    dry = {words[0] for words in ran if "--dry-run" in words}
    assert dry == {name for name, options in options_of(get_command(app)).items() if "--dry-run" in options}
    assert [name for name, options in options_of(get_command(app)).items() if "--json" not in options] == []


QUICK = [
    ("recipes", "recipes list"),
    ("targets", "targets list"),
    ("settings-file", "recipes show prune_kd"),
    ("settings-file", "targets show rpi4"),
    ("validation", "recipes validate qat"),
    ("validation", "targets validate x86"),
    ("detected-target", "targets detect"),
    ("json-schema", "targets schema"),
    ("json-schema", "schema show recipe"),
    ("json-schema", "schema show run"),
    ("schemas", "schema list"),
    ("trust", "trust"),
    ("doctor", "doctor --no-gate"),
    ("init", "init first.yaml --data digits"),
    ("runs", "runs list"),
    ("trust", "trust"),
]


@pytest.mark.parametrize(("name", "words"), QUICK, ids=[words for _, words in QUICK])
def test_documents_of_quick_commands(command_line: CommandLine, name: str, words: str) -> None:
    answer = command_line(*words.split(), "--json")
    assert answer.exit_code == 0, answer
    assert faults(json.loads(answer.stdout), name) == []


FAILING = ["apply nope", "apply", "schema show rum", "verify nowhere", "report", "targets show nope", "profile"]


@pytest.mark.parametrize("words", FAILING)
def test_documents_of_failures(command_line: CommandLine, words: str) -> None:
    answer = command_line(*words.split(), "--json")
    assert answer.exit_code == 2
    assert faults(json.loads(answer.stdout), "error") == []


def test_a_schema_refuses_what_it_should(command_line: CommandLine) -> None:
    """A schema that took anything would prove nothing."""
    document = json.loads(command_line("schema", "list", "--json").stdout)
    del document["schemas"][0]["version"]
    assert faults(document, "schemas") != []
    assert faults({"error": "", "exit_code": 3}, "error") != []
    shipped = {path.stem for path in FOLDER.glob("*.json")}
    assert [name for name in shipped - {"settings-file", "report"} if not faults({"x": 1}, name)] == ["sensitivity"]


SMALL = [("verify", "verify run"), ("runs", "runs list --root ."), ("removal", "runs rm run --yes")]


def test_documents_about_a_small_run(command_line: CommandLine, tmp_path: Path) -> None:
    small_run(tmp_path / "run")
    for name, words in SMALL:
        answer = command_line(*words.split(), "--json")
        assert answer.exit_code == 0, answer
        assert faults(json.loads(answer.stdout), name) == [], words
    assert not (tmp_path / "run").exists()


SETTINGS = [word for override in TINY for word in ("--set", override)]
SEARCH = [
    *("search", "prune_kd", "--target", "rpi4", "--max-accuracy-drop", "1", "--trials", "1", "--output", "found"),
    *SETTINGS,
    *("--set", "stages.pruned.channel_ratio={search: [0.2, 0.7]}"),
]
FILES = ["run/export/model.onnx", "run/export/model.int8.onnx"]
RUN = ["run", "prune_kd", "--target", "x86", "--target", "rpi4", "--output", "run", "--seconds", "1", *SETTINGS]
APPLY = ["apply", "prune_kd", "--output", "run", "--resume", *SETTINGS]
LINE: list[tuple[str, list[str]]] = [
    ("plan", [*RUN, "--dry-run"]),
    ("run", RUN),
    ("plan", [*APPLY, "--dry-run"]),
    ("run", APPLY),
    ("run", ["export", "run", "--int8", "--with-preprocessing", "--softmax", "--top-k", "3", "--target", "x86"]),
    ("profile", ["profile", "run", "--target", "x86", "--seconds", "1"]),
    ("profile", ["profile", "run", "--target", "rpi4"]),
    (
        "files-profile",
        ["profile", *FILES, "--target", "x86", "--seconds", "1", "--sweep", "none"],
    ),
    ("report", ["report", "run"]),
    ("comparison", ["compare", "run", "--output", "compared"]),
    ("bundle", ["bundle", "run", "--target", "x86"]),
    ("verify", ["verify", "run/bundle/prune_kd-x86"]),
    ("sensitivity", ["sensitivity", "run", "--images", "32", "--no-latency"]),
    ("debug-int8", ["debug-int8", "run", "--images", "16", "--worst", "1"]),
    ("plan", [*SEARCH, "--dry-run"]),
    ("search", SEARCH),
    ("plan", [*SEARCH, "--dry-run", "--resume"]),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half of work, and a machine may be busy
def test_documents_of_a_run_of_all_that_looks_at_it_and_of_a_search(command_line: CommandLine, tmp_path: Path) -> None:
    for name, words in LINE:
        answer = command_line(*words, "--no-gate", "--json")
        assert answer.exit_code == 0, (words, answer.stderr)
        assert faults(json.loads(answer.stdout), name) == [], words
    assert faults(json.loads((tmp_path / "run" / "profile" / "rpi4.json").read_text()), "profile") == []
    parity = json.loads((tmp_path / "run" / "export" / "parity.json").read_text())
    assert (parity["answers"]["passed"], parity["answers"]["top_k"]) == (True, 3)
    assert parity["answers"]["outputs"] == ["probabilities", "top_k_probabilities", "top_k_indices"]
    command_line("export", "run", "--target", "x86", "--top-k", "11").refusal("--top-k 11: the model has 10 classes")
