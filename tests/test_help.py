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
from edgecompress.commands.cli_output import next_command
from edgecompress.run_directory import RunDirectory
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


def test_the_next_command(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "my run")
    (run.path / "profile").mkdir(parents=True)
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
    (run.path / "profile").rmdir()
    assert after(both) == f"profile {place} --target rpi4"
