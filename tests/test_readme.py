"""The README's promises that a test can hold: its tree, its commands, its recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from edgecompress.cli import app
from edgecompress.settings.configuration import validate
from edgecompress.settings.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_tree_names_every_module_and_no_other() -> None:
    (tree,) = [block for block in _blocks("text") if "edgecompress/" in block and "errors.py" in block]
    rooms, listed = [""], set()
    for indent, name in re.findall(r"^( *)([\w/]+\.py|\w+/) ", tree.partition("\nrecipes/")[0], flags=re.MULTILINE):
        rooms = rooms[: len(indent) // 2]
        if name.endswith("/"):
            rooms.append(name)
        else:
            listed.add("".join(rooms[1:]) + name)
    package = ROOT / "edgecompress"
    present = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.stem.startswith("__")}
    assert listed == present


def test_every_edgecompress_command_parses() -> None:
    script = "\n".join(_blocks("bash")).replace("\\\n", " ")
    commands = [part.strip() for line in script.splitlines() for part in line.split("&&")]
    ours = [command.partition(">")[0] for command in commands if command.startswith("edgecompress")]
    assert any("run recipes/prune_kd.yaml --target x86" in command for command in ours)
    for command in ours:
        words = shlex.split(command)[1:]
        result = CliRunner().invoke(app, [word for word in words if not word.startswith("-")][:1] + ["--help"])
        assert result.exit_code == 0, command
        for option in (word for word in words if word.startswith("--")):
            assert option in result.output, f"{command}: {option}"


@pytest.mark.parametrize("text", _blocks("yaml"))
def test_the_recipe_is_valid(text: str) -> None:
    validate(Recipe, yaml.safe_load(text) | {"name": "readme"}, source="README.md")


def test_the_set_up_commands_are_there() -> None:
    assert "pip install . && edgecompress run recipes/prune_kd.yaml --target x86" in README
    assert "pip install '.[test]' && pytest" in README
    assert (ROOT / "docs" / "report.png").stat().st_size > 10_000
