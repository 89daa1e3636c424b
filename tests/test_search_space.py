"""What a search may choose: read from a recipe, refused with the place where it is wrong, or made up sensibly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conftest import CommandLine
from edgecompress.errors import ConfigurationError
from edgecompress.searching.space import SearchSpace, load_space
from edgecompress.settings.search_space import declared_dimensions
from edgecompress.shipped import shipped_files

RECIPE = """
name: mine
data: {name: digits}
model: {name: student_cnn, arguments: {width: {search: {choices: [8, 16]}}}}
stages:
  - {id: dense, kind: train, epochs: 3}
  - id: pruned
    kind: prune
    channel_ratio: {search: [0.2, 0.7]}
    epochs: {search: [2, 6]}
    learning_rate: {search: {low: 1e-3, high: 1e-1, log: true}}
    teacher: {search: {choices: [{stage: dense}, {stage: dense, method: dkd}]}}
  - {search: {choices: [{id: int8, kind: quantize}, {id: int8, kind: qat, epochs: 1}]}}
"""


def _file(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def _space(folder: Path, text: str = RECIPE) -> SearchSpace:
    return load_space(_file(folder, text))


def test_declared_fields_are_found_by_place(tmp_path: Path) -> None:
    space = _space(tmp_path)
    assert [d.path for d in space.dimensions] == [
        "model.arguments.width",
        "stages.pruned.channel_ratio",
        "stages.pruned.epochs",
        "stages.pruned.learning_rate",
        "stages.pruned.teacher",
        "stages.2",
    ]
    assert not space.is_default
    start = space.start()
    assert start["stages.pruned.epochs"] == 4
    assert start["stages.pruned.learning_rate"] == pytest.approx(0.01)
    recipe = space.recipe_with(start | {"stages.2": {"id": "int8", "kind": "qat", "epochs": 1}}, max_accuracy_drop=0.1)
    assert recipe.model.arguments == {"width": 8}
    assert recipe.quantize_stage.kind == "qat"
    assert recipe.gates.max_accuracy_drop == 0.1


def test_first_points_are_spread_over_what_costs(tmp_path: Path) -> None:
    space = _space(tmp_path)
    points = space.spread(6)
    assert points[0] == space.start()
    ratios = [point["stages.pruned.channel_ratio"] for point in points[1:]]
    assert ratios == pytest.approx([0.25, 0.35, 0.55, 0.65]), "0.45 is the start, which is not tried twice"
    for point in points:
        space.recipe_with(point)
        others = [path for path in point if not path.endswith(("ratio", "width"))]
        assert others
        assert [point[path] for path in others] == [points[0][path] for path in others], "as somebody chose them"


@pytest.mark.parametrize(
    ("place", "value", "needles"),
    [
        ("stages.1.channel_ratio", {"search": [0.7, 0.2]}, ["stages.pruned.channel_ratio: low (0.7) must be below"]),
        ("stages.1.channel_ratio", {"search": [0.2, 1.7]}, ["1.7 is not a fraction between 0 and 1", "channel_ratio"]),
        ("stages.1.channel_ratio", {"search": [0.2, 0.3, 0.4]}, ["two numbers", "choices"]),
        ("stages.1.channel_ratio", {"search": 0.3}, ["write {search: [low, high]}"]),
        ("stages.1.scope", {"search": {"choices": ["layer", "globl"]}}, ["globl", "did you mean 'global'"]),
        ("stages.1.scope", {"search": {"choices": ["layer"]}}, ["at least two"]),
        ("stages.1.scope", {"search": {"choices": ["layer", "layer"]}}, ["layer stands twice"]),
        ("stages.1.learning_rate", {"search": {"low": 0, "high": 1, "log": True}}, ["log scale", "above 0"]),
        ("stages.1.learning_rate", {"search": {"low": 0.1, "hihg": 1}}, ["unknown key 'hihg'", "'high'"]),
        ("stages.1.epochs", {"search": {"low": 1, "high": 9, "step": 0.5}}, ["step 0.5 between whole numbers"]),
        ("stages.1.id", {"search": {"choices": ["a", "b"]}}, ["stages.1.id", "cannot be searched"]),
        ("seed", {"search": [0, 9]}, ["seed: is chance"]),
        ("data.name", {"search": {"choices": ["digits", "cifar10"]}}, ["data.name", "compared on"]),
        ("gates.max_accuracy_drop", {"search": [0.1, 0.2]}, ["gates.max_accuracy_drop", "compared by"]),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tmp_path: Path, command_line: CommandLine, place: str, value: object, needles: list[str]
) -> None:
    override = f"{place}={yaml.safe_dump(value, default_flow_style=True).strip()}"
    answer = command_line(
        *("search", _file(tmp_path, RECIPE), "--target", "x86", "--max-accuracy-drop", "0.01"), "--set", override
    )
    answer.refusal("mine.yaml", *needles)


def test_other_commands_say_that_search_is_meant(tmp_path: Path, command_line: CommandLine) -> None:
    message = command_line("apply", _file(tmp_path, RECIPE)).refusal("use edgecompress search")
    assert "--set stages.pruned.channel_ratio=VALUE" in message
    assert message.count("\n") == 5


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--max-accuracy-drop", "3"], "did you mean 0.03?"),
        (["--max-accuracy-drop", "0.01", "--time", "2 hours"], "--time: '2 hours' is no time"),
        (["--max-accuracy-drop", "0.01", "--time", "0s"], "leaves no time"),
        (["--max-accuracy-drop", "0.01", "--storage", "mysql://x"], "--storage takes postgresql://"),
        (["--max-accuracy-drop", "0.01", "--resume"], "--resume needs --output"),
        (["--max-accuracy-drop", "0.01", "--warm-start", "nowhere"], "holds neither search.json nor run.json"),
        (["--max-accuracy-drop", "0.01", "--target", "rpi5", "--minimize", "memory"], "--minimize memory is measured"),
    ],
)
def test_bad_arguments_are_refused(command_line: CommandLine, arguments: list[str], needle: str) -> None:
    target = [] if "--target" in arguments else ["--target", "x86"]
    command_line("search", "prune_kd", *target, *arguments).refusal(needle)


def test_a_recipe_that_declares_nothing_gets_a_space_around_its_values() -> None:
    space = load_space("prune_kd")
    assert space.is_default
    paths = {dimension.path for dimension in space.dimensions}
    assert {"stages.pruned.channel_ratio", "stages.pruned.teacher.temperature", "stages.int8.placement"} <= paths
    start = space.start()
    assert space.holds(start)
    plain = load_space("prune_kd", ["stages.pruned.channel_ratio={search: [0.2, 0.7]}"])
    assert space.recipe_with(start) == plain.recipe_with({"stages.pruned.channel_ratio": 0.5})
    for dimension in space.dimensions:
        for value in dimension.extremes:
            space.recipe_with(start | {dimension.path: value})


@pytest.mark.parametrize("path", shipped_files("recipes"), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_searched_or_says_why_not(path: Path) -> None:
    try:
        space = load_space(str(path))
    except ConfigurationError as error:
        if "nothing to search" not in str(error):
            raise
        return
    assert space.holds(space.start())
    for dimension in space.dimensions:
        for value in dimension.extremes:
            space.recipe_with(space.start() | {dimension.path: value})


def test_a_range_takes_steps_and_shares() -> None:
    (dimension,) = declared_dimensions({"a": {"search": {"low": 8, "high": 32, "step": 8}}}, source="x")
    assert [dimension.at(share) for share in (0, 0.3, 0.6, 1)] == [8, 16, 24, 32]
    assert dimension.holds(9)
    assert not dimension.holds(40)
    (choice,) = declared_dimensions({"a": {"search": {"choices": [{"x": 1}, None, True]}}}, source="x")
    assert choice.holds({"x": 1})
    assert choice.holds(True)
    assert not choice.holds(1)
