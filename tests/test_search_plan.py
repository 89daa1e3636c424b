"""`search --dry-run`: how many trials, what is computed once for all of them, and that nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import CommandLine
from edgecompress.commands.cli_schemas import read_schema

RECIPE = """
name: small
data: {name: digits, max_train_samples: 300}
model: {name: student_cnn, arguments: {width: 8}}
stages:
  - {id: dense, kind: train, epochs: 2}
  - {id: pruned, kind: prune, channel_ratio: {search: [0.1, 0.9]}, epochs: 4, teacher: {stage: dense}}
  - {id: int8, kind: quantize, effort: fast, calibration: {samples: 32}}
"""
WORDS = ("search", "small.yaml", "--target", "x86", "--max-accuracy-drop", "0.05", "--dry-run")


@pytest.fixture
def plan(command_line: CommandLine, tmp_path: Path) -> Any:
    (tmp_path / "small.yaml").write_text(RECIPE)

    def planned(*words: str) -> dict[str, Any]:
        answer = command_line(*WORDS, *words, "--json")
        assert answer.exit_code == 0, answer
        document: dict[str, Any] = json.loads(answer.stdout)
        jsonschema.Draft202012Validator(read_schema("plan")).validate(document)
        assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
        document["by_step"] = {row["step"]: row for row in document["steps"]}
        return document

    return planned


def test_shared_stages_count_once_and_a_trial_as_often_as_it_is_tried(plan: Any) -> None:
    few, many = plan("--trials", "4"), plan("--trials", "8")
    assert [row["step"] for row in few["steps"]] == [
        *("dense", "layers", "data", "pruned", "int8"),
        *("export x86", "profile x86", "report", "accuracy", "pick"),
    ]
    assert (few["by_step"]["dense"]["times"], few["by_step"]["pruned"]["times"]) == (1, 4)
    assert many["by_step"]["pruned"]["times"] == 8
    assert many["by_step"]["pruned"]["disk_bytes"] == 2 * few["by_step"]["pruned"]["disk_bytes"]
    assert many["by_step"]["dense"]["disk_bytes"] == few["by_step"]["dense"]["disk_bytes"]
    assert few["seconds"] == pytest.approx(sum(row["seconds"] for row in few["steps"]))
    assert few["search"]["space_in_words"] == ["stages.pruned.channel_ratio: 0.1 to 0.9"]
    assert (few["search"]["limited_by"], few["search"]["trials_done"]) == ("trials", 0)


def test_what_is_searched_before_a_stage_is_shared_by_none(plan: Any) -> None:
    document = plan("--trials", "2", "--set", "stages.dense.epochs={search: [2, 4]}")
    assert document["by_step"]["dense"]["times"] == 2


def test_a_time_says_how_many_trials_fit(plan: Any) -> None:
    document = plan("--time", "10m")
    found = document["search"]
    assert found["limited_by"] == "time"
    once = document["by_step"]["dense"]["seconds"] + document["by_step"]["layers"]["seconds"]
    assert (found["trials"] - 1) * found["seconds_a_trial"] < 600 - once <= found["trials"] * found["seconds_a_trial"]
    assert plan("--time", "10m", "--trials", "2")["search"]["limited_by"] == "trials"


def test_nothing_is_timed_for_a_target_elsewhere(plan: Any) -> None:
    document = plan("--target", "rpi4", "--trials", "2")
    assert document["search"]["not_measured_because"]
    assert not {"layers", "pick"} & document["by_step"].keys()


def test_for_people_and_what_it_refuses(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    given = (*WORDS, "--trials", "3", "--output", "mine")
    monkeypatch.setattr(sys, "argv", ["edgecompress", *given])
    text = command_line(*given).stdout
    assert "stages.pruned.channel_ratio: 0.1 to 0.9" in text
    assert "3 trials; those that are given up early take less" in text
    assert "search directory: mine; nothing was written\nnext: edgecompress search " in text
    assert "--dry-run" not in text.partition("next: ")[2]
    command_line(*WORDS, "--resume").refusal("--resume needs --output DIR")
    command_line(*WORDS, "--minimize", "memory", "--target", "rpi4").refusal("--minimize memory is measured", "rpi4")
    command_line(*WORDS, "--warm-start", "nowhere").refusal("--warm-start nowhere: holds neither")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    command_line(*WORDS, "--output", "full").refusal("full: exists and holds no search")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "small.yaml"]
