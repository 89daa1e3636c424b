"""What `--help` says: an example that parses for every command; and what follows a result: the next command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from conftest import CommandLine
from edgecompress import pipeline
from edgecompress.cli import app
from edgecompress.commands.next_steps import (
    after_bundle,
    after_comparison,
    after_diagnosis,
    after_examination,
    after_search,
    after_sensitivity,
    after_validation,
    after_verification,
    next_command,
)
from edgecompress.deploy.verify import Verification
from edgecompress.run_directory import RunDirectory, write_json
from test_schemas import commands

COMMANDS = commands(get_command(app))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_ends_the_help_and_parses(command_line: CommandLine, name: str) -> None:
    text = command_line(*name.split(), "--help").stdout
    line = text.rstrip().splitlines()[-1]
    assert text.rstrip().splitlines()[-2].strip() == "Example:"
    words = shlex.split(line.partition(" > ")[0])
    assert words[: 1 + len(name.split())] == ["edgecompress", *name.split()]
    command: Any = get_command(app)
    for part in name.split():
        command = command.commands[part]
    command.make_context(name, words[1 + len(name.split()) :])


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["aply", "prune_kd"], "Did you mean 'apply'?"),
        (["recipes", "lst"], "Did you mean 'list'?"),
        (["run", "prune_kd", "--target", "x86", "--outpt", "x"], "--output"),
        (["apply", "prune-kd"], "did you mean 'prune_kd'?"),
        (["apply", "prune_kd", "--set", "stages.prunned.epochs=1"], "did you mean 'pruned'?"),
        (["apply", "prune_kd", "--set", "stages.pruned.epoch=1"], "did you mean 'epochs'?"),
        (["targets", "show", "rpi"], "did you mean 'rpi"),
        (["schema", "show", "prfile"], "did you mean 'profile'?"),
    ],
)
def test_the_nearest_spelling_is_named(command_line: CommandLine, typed: list[str], hint: str) -> None:
    answer = command_line(*typed)
    assert answer.exit_code == 2
    assert hint in answer.stderr


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (
            ["search", "a", "--target", "x86", "--max-accuracy-drop", "0", "--trials", "0"],
            "'--trials': must be at least 1",
        ),
        (
            ["search", "a", "--target", "x86", "--max-accuracy-drop", "0", "--trials", "x"],
            "'--trials': must be a valid integer",
        ),
        (["sensitivity", "--macs-ratio", "50"], "'--macs-ratio': must be at most 0.99"),
        (["init", "--data", "digits", "--goal", "speed"], "'--goal': 'speed' is not one of 'int8', 'prune'."),
        (["init", "--data", "my_images"], "there is no such folder, and no data of that name"),
    ],
)
def test_refused_values_are_named_in_plain_words(command_line: CommandLine, typed: list[str], words: str) -> None:
    answer = command_line(*typed)
    assert answer.exit_code == 2
    assert words in answer.stderr
    again = command_line(*typed, "--json")
    assert (again.exit_code, words in again.stdout) == (2, True)


def test_the_next_command(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "my run")
    place = f"'{run.path}'"

    def after(manifest: dict[str, Any], verdict: str | None = None, **options: Any) -> str:
        profiles = {"rpi4": {"verdict": verdict, "measured": True}} if verdict else {}
        text = next_command(pipeline.Outcome(run, {"targets": ["rpi4"], **manifest}, [], profiles, **options))
        assert text.startswith("edgecompress ")
        return text.removeprefix("edgecompress ")

    both = {"exports": {"rpi4": {"int8": True}}}
    assert after({}) == f"export {place} --int8"
    assert after({"exports": {"rpi4": {"int8": False}}}).startswith(f"export {place} --int8")
    assert after(both, "hold") == f"debug-int8 {place}"
    assert after(both, "inconclusive") == f"profile {place} --target rpi4 --thorough"
    assert after(both, "ship") == f"report {place} --open"
    reports: Any = {"rpi4": object()}
    assert after(both, "ship", reports=reports) == f"bundle {place} --target rpi4"
    assert after(both) == f"profile {place} --target rpi4"


def test_the_next_command_is_about_the_targets_worked_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    manifest = {"targets": ["rpi4", "x86"], "exports": {"rpi4": {"int8": True}, "x86": {"int8": True}}}
    for name, verdict in (("rpi4", "hold"), ("x86", "ship")):
        write_json(run.profile_path(name), {"verdict": verdict, "measured": True})

    def after(*targets: str) -> str:
        return next_command(pipeline.Outcome(run, manifest, targets=targets))

    assert after("x86") == f"edgecompress bundle {run.path} --target x86"
    assert after("rpi4") == after("rpi4", "x86") == f"edgecompress debug-int8 {run.path}"
    assert after() == f"edgecompress debug-int8 {run.path}"  # the run's first target is on hold
    assert after("x86-avx2") == f"edgecompress profile {run.path} --target x86-avx2"
    write_json(run.profile_path("x86"), {"verdict": "ship", "measured": True, "files": {"model.onnx": "another"}})
    assert after("x86") == f"edgecompress profile {run.path} --target x86"


def _parses(text: str) -> str:
    """The command of a hint, which must be one that the command line takes."""
    words = shlex.split(text.partition("  # ")[0])
    assert words[0] == "edgecompress"
    command: Any = get_command(app)
    place = 1
    while hasattr(command, "commands"):
        command, place = command.commands[words[place]], place + 1
    if words[place:] != ["--help"]:
        command.make_context(words[1], words[place:])
    return shlex.join(words[1:])


def test_what_follows_the_commands_that_look(tmp_path: Path) -> None:
    command = "edgecompress run mine.yaml --target mine-target.yaml --set seed=2 --output runs/a --resume"
    outcome = pipeline.Outcome(RunDirectory(tmp_path / "my run"), {"command": command, "recipe_name": "mine"})
    again = "run mine.yaml --target mine-target.yaml --set seed=2"
    proposed: dict[str, Any] = {"channels": {"proposal": {"layer_ratios": {"stem": 0.5}}}}
    assert _parses(after_sensitivity(outcome, proposed, "both")) == again
    assert "layer_ratios" in after_sensitivity(outcome, proposed, "channels")
    assert _parses(after_sensitivity(outcome, proposed, "int8")) == f"debug-int8 '{outcome.run.path}'"
    assert _parses(after_sensitivity(outcome, {}, "both")) == f"debug-int8 '{outcome.run.path}'"
    found: dict[str, Any] = {"stage": "int8", "layers": [{"causes": [{}]}], "model": []}
    assert _parses(after_diagnosis(outcome, found)) == again
    assert after_diagnosis(outcome, found).endswith("# with a setting from above in stage int8")
    assert _parses(after_diagnosis(outcome, {"layers": [{"causes": []}]})).startswith("export ")
    searched = {"command": "edgecompress search a.yaml --trials 2", "recipe_source": "a.yaml", "overrides": ["seed=3"]}
    trial = pipeline.Outcome(outcome.run, {"targets": ["rpi4"], **searched})
    assert _parses(after_diagnosis(trial, found)) == "run a.yaml --target rpi4 --set seed=3"


def test_what_follows_the_commands_that_ship(tmp_path: Path) -> None:
    assert _parses(after_validation("recipe", "my recipe.yaml", ())).startswith("run 'my recipe.yaml' --target ")
    assert _parses(after_validation("recipe", "a.yaml", ["seed"])).startswith("search a.yaml --target ")
    assert _parses(after_validation("target", "t.yaml", ())) == "run prune_kd --target t.yaml"
    assert _parses(after_examination(True)).startswith("run prune_kd --target ")
    assert _parses(after_examination(False)) == "doctor"
    assert _parses(after_bundle(Path("a b.tar.gz"))) == "verify 'a b.tar.gz'"
    assert _parses(after_verification(Verification("runs/a", "run", 3)) or "") == "report runs/a --open"
    assert after_verification(Verification("runs/a", "run", 3, missing=["x"])) is None
    assert _parses(after_verification(Verification("a", "bundle", 3, changed=["x"])) or "") == "bundle RUN --target T"
    assert "infer.py --self-test" in (after_verification(Verification("a", "bundle", 3)) or "")
    assert (after_verification(Verification("a b.tgz", "archive", 3)) or "").startswith("tar xzf 'a b.tgz'")
    candidates = [{"verdict": "hold", "run": "a", "target": "x86"}, {"verdict": "ship", "run": "b", "target": "rpi4"}]
    assert _parses(after_comparison({"candidates": candidates})) == "bundle b --target rpi4"
    assert _parses(after_comparison({"candidates": candidates[:1]})) == "debug-int8 a"
    searched: dict[str, Any] = {
        "folder": "s",
        "target": "x86",
        "pick": 1,
        "front": [{"trial": 1, "run": "trials/0001"}],
    }
    assert _parses(after_search(searched)) == "bundle s/trials/0001 --target x86"
    nearest = {**searched, "pick": None, "nearest": [{"run": "trials/0000"}]}
    assert _parses(after_search(nearest)) == "report s/trials/0000 --open"
