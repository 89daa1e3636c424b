"""What ships with the package: every recipe and target loads, and its header says how to use it."""

from __future__ import annotations

import itertools
import shlex
import tomllib
from pathlib import Path

import pytest

from edgecompress import shipped
from edgecompress.settings.recipe import load_recipe
from edgecompress.settings.target import load_target

ROOT = Path(__file__).resolve().parent.parent
RECIPES = shipped.shipped_files("recipes")
TARGETS = shipped.shipped_files("targets")


def header_commands(path: Path) -> list[list[str]]:
    """The commands in the comment at the top of a file: indented lines, with continuations joined."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = "\n".join(line.removeprefix("#") for line in header).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("   ")]


def options(words: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(words) if option == name]


def test_the_promised_recipes_and_targets_are_there() -> None:
    assert {"prune_kd", "distill", "prune_finetune", "int8_ptq", "paper/pruning"} <= {
        shipped.shipped_name("recipes", path) for path in RECIPES
    }
    assert {"x86", "x86-avx2", "arm64", "rpi4", "rpi5"} <= {path.stem for path in TARGETS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_header_command_does(path: Path) -> None:
    name = shipped.shipped_name("recipes", path)
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "-")
    assert recipe.description
    commands = header_commands(path)
    assert commands, "the header holds the command that runs the recipe"
    for words in commands:
        assert words[0] == "edgecompress"
        assert words[1] in ("run", "apply")
        assert words[2] in (name, f"recipes/{name}.yaml")
        load_recipe(name, options(words, "--set"))
        assert [load_target(name).name for name in options(words, "--target")]
    assert "Change first:" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TARGETS, ids=lambda path: path.stem)
def test_target_loads_and_its_header_command_does(path: Path) -> None:
    assert load_target(path.stem).name == path.stem
    commands = header_commands(path)
    assert commands
    for words in commands:
        assert words[:2] == ["edgecompress", "run"]
        assert options(words, "--target") == [path.stem]
        load_recipe(words[2], options(words, "--set"))


def test_recipe_of_the_contract_has_its_stages() -> None:
    stages = load_recipe("prune_kd").stages
    assert [(stage.id, stage.kind) for stage in stages] == [
        ("dense", "train"),
        ("pruned", "prune"),
        ("int8", "quantize"),
    ]


def test_wheel_carries_recipes_and_targets_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"recipes": "edgecompress/recipes", "targets": "edgecompress/targets"}
    installed, beside = tmp_path / "edgecompress" / "recipes", tmp_path / "recipes"
    installed.mkdir(parents=True)
    beside.mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "edgecompress")
    assert shipped.shipped_files("recipes") == []
    (beside / "b.yaml").write_text("")
    assert shipped.shipped_files("recipes") == [beside / "b.yaml"]
    (installed / "c.yaml").write_text("")
    (installed / "a.yaml").write_text("")
    assert shipped.shipped_files("recipes") == [installed / "a.yaml", installed / "c.yaml"]
    assert shipped.shipped_path("recipes", "c") == installed / "c.yaml"
    assert shipped.shipped_path("recipes", "b") is None
    assert shipped.shipped_path("recipes", "../recipes/c") is None
    (installed / "tables").mkdir()
    (installed / "tables" / "b.yaml").write_text("")
    assert [shipped.shipped_name("recipes", path) for path in shipped.shipped_files("recipes")] == [
        "a",
        "c",
        "tables/b",
    ]
    assert shipped.shipped_path("recipes", "tables/b") == installed / "tables" / "b.yaml"
    assert shipped.shipped_path("recipes", "b") is None
