"""`--dry-run`: nothing is written, and what is said of time and disk is of the right size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import CommandLine
from edgecompress.commands.cli_schemas import read_schema
from edgecompress.settings.recipe import load_recipe
from edgecompress.steps.plan_run import Images, models_to_probe, planned_steps, totals
from edgecompress.steps.probe import ModelProbe

PROBE = ModelProbe(
    train_seconds=0.01,
    forward_seconds=0.002,
    decode_seconds=0.001,
    params=1_000_000,
    classes=10,
    image_bytes=768,
    memory_bytes=500_000_000,
    batch_size=64,
)
IMAGES = Images(train=1000, val=100, report=200)


def steps(*overrides: str, **options: Any) -> dict[str, dict[str, Any]]:
    recipe = load_recipe("prune_kd", overrides)
    probes = dict.fromkeys(models_to_probe(recipe), PROBE)
    rows = planned_steps(recipe, ["x86", "rpi4"], IMAGES, probes, **{"profile_seconds": 20.0} | options)
    return {row["step"]: row for row in rows}


def test_time_follows_from_the_probe() -> None:
    rows = steps()
    assert list(rows)[:4] == ["data", "dense", "pruned", "int8"]
    assert list(rows)[4:] == ["export x86", "profile x86", "export rpi4", "profile rpi4", "report"]
    assert rows["dense"]["seconds"] == pytest.approx(12 * (1000 * 0.01 + 100 * 0.002) + 200 * 0.002)
    longer = steps("stages.dense.epochs=24")["dense"]["seconds"]
    assert longer == pytest.approx(24 * (1000 * 0.01 + 100 * 0.002) + 200 * 0.002)
    teaching = 12 * 1000 * 0.002
    assert rows["pruned"]["seconds"] == pytest.approx(12 * (1000 * 0.01 + 100 * 0.002) + teaching + 0.25 * 200 * 0.002)
    assert rows["dense"]["disk_bytes"] == 4_000_000 + 200 * 10 * 4
    assert rows["pruned"]["disk_bytes"] == 1_000_000 + 200 * 10 * 4, "half of the channels leave a quarter"
    assert steps("stages.int8.effort=fast")["int8"]["seconds"] < rows["int8"]["seconds"]
    assert steps("stages.dense.batch_size=256")["dense"]["memory_bytes"] > 4 * 500_000_000


def test_what_is_complete_takes_no_time() -> None:
    rows = steps(complete=["dense"])
    assert (rows["dense"]["done"], rows["dense"]["seconds"], rows["dense"]["disk_bytes"]) == (True, 0.0, 0)
    assert not rows["pruned"]["done"]
    assert totals(list(rows.values()), {"": PROBE})["seconds"] < totals(list(steps().values()), {"": PROBE})["seconds"]


def test_apply_has_no_export() -> None:
    assert list(steps(profile_seconds=None)) == ["data", "dense", "pruned", "int8"]


QUICK = [
    *("model.arguments.width=8", "data.max_train_samples=200", "stages.dense.epochs=3", "stages.pruned.epochs=2"),
    *("stages.pruned.steps=1", "stages.int8.effort=fast"),
]
SETTINGS = [word for override in QUICK for word in ("--set", override)]


def test_a_dry_run_writes_nothing(command_line: CommandLine, tmp_path: Path) -> None:
    words = ["run", "prune_kd", "--target", "x86", "--quick", *SETTINGS]
    answer = command_line(*words, "--dry-run", "--json")
    assert answer.exit_code == 0, answer
    document = json.loads(answer.stdout)
    jsonschema.Draft202012Validator(read_schema("plan")).validate(document)
    assert list(tmp_path.iterdir()) == []
    assert document["data"]["splits"]["train"] == 200
    text = command_line(*words, "--dry-run", "--output", "mine").stdout
    assert "run directory: mine; nothing was written\n" in text
    assert list(tmp_path.iterdir()) == []
    command_line("apply", "prune_kd", "--dry-run", "--resume").refusal("--resume needs --output DIR")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    command_line("apply", "prune_kd", "--dry-run", "--output", "full").refusal("is no run directory")


@pytest.mark.slow
def test_the_estimate_is_of_the_right_size(command_line: CommandLine, tmp_path: Path) -> None:
    words = ["apply", "prune_kd", "--output", "run", "--no-gate", *SETTINGS]
    plan = json.loads(command_line(*words, "--dry-run", "--json").stdout)
    assert command_line(*words).exit_code == 0
    by_step = {row["step"]: row for row in plan["steps"]}
    for stage in json.loads((tmp_path / "run" / "run.json").read_text())["stages"]:
        folder = tmp_path / "run" / "stages" / stage["id"]
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0.5 < by_step[stage["id"]]["disk_bytes"] / written < 2, stage["id"]
        # The machine may be busy in one of the two, and the first steps of a process are slow.
        assert 0.1 < by_step[stage["id"]]["seconds"] / stage["seconds"] < 10, stage["id"]
