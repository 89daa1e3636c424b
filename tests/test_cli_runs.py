"""`runs list` and `runs rm`: what is listed, and that nothing but a run is ever removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import CommandLine
from edgecompress.commands.cli_schemas import read_schema


def make_run(folder: Path, started: str, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    stages = [
        {"id": "dense", "kind": "train", "status": "complete", "accuracy": 0.75},
        {"id": "int8", "kind": "quantize", "status": "pending"},
    ]
    manifest = {"schema_version": 1, "recipe_name": "tiny", "status": "failed", "started_at": started, "recipe": {}}
    (folder / "run.json").write_text(json.dumps(manifest | {"stages": stages, "targets": ["x86"]} | changes))
    return folder


def listed(command_line: CommandLine, *words: str) -> list[dict[str, Any]]:
    document = json.loads(command_line("runs", "list", *words, "--json").stdout)
    jsonschema.Draft202012Validator(read_schema("runs")).validate(document)
    return list(document["runs"])


def test_list(command_line: CommandLine, tmp_path: Path) -> None:
    assert listed(command_line) == []
    assert "start one with: edgecompress run" in command_line("runs", "list").stdout
    make_run(tmp_path / "runs" / "old", "2026-01-01T00:00:00+00:00")
    new = make_run(tmp_path / "runs" / "new", "2026-01-02T00:00:00+00:00", status="complete")
    (new / "profile").mkdir()
    (new / "profile" / "x86.json").write_text('{"verdict": "ship"}')
    (tmp_path / "runs" / "other").mkdir()
    (make_run(tmp_path / "runs" / "broken", "") / "run.json").write_text("{")
    rows = listed(command_line)
    assert [Path(row["path"]).name for row in rows] == ["new", "old", "broken"]
    assert [row["status"] for row in rows] == ["complete", "failed", "damaged"]
    assert (rows[0]["accuracy"], rows[0]["verdicts"]) == (0.75, {"x86": "ship"})
    assert rows[0]["size_bytes"] == sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    text = command_line("runs", "list").stdout
    assert "x86: ship" in text
    assert "75.0%" in text
    assert "1 of 2" in text
    command_line("runs", "list", "--root", "nowhere").refusal("nowhere: there is no such folder")


def test_remove(command_line: CommandLine, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", "")
    (run / "stages").mkdir()
    (run / "stages" / "weights").write_bytes(b"1234")
    other = make_run(tmp_path / "runs" / "b", "")
    command_line("runs", "rm", run).refusal("there is no terminal; give --yes")
    assert run.is_dir()
    answer = command_line("runs", "rm", run, run, "--yes", "--json")
    document = json.loads(answer.stdout)
    jsonschema.Draft202012Validator(read_schema("removal")).validate(document)
    assert [row["path"] for row in document["removed"]] == [str(run)]
    assert document["freed_bytes"] > 4
    assert not run.exists()
    assert other.is_dir()


def test_what_is_no_run_is_never_removed(command_line: CommandLine, tmp_path: Path) -> None:
    """And where one of several paths is none, not one is removed."""
    run = make_run(tmp_path / "runs" / "a", "")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(run)
    for path, message in (
        (precious, "not a run directory"),
        (tmp_path / "nowhere", "not a run directory"),
        (link, "is a link"),
    ):
        command_line("runs", "rm", run, path, "--yes").refusal(str(path), message)
        assert (run / "run.json").is_file()
    assert (precious / "thesis.tex").is_file()


def test_the_folder_one_is_in_stays(command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs" / "a", "")
    monkeypatch.chdir(run)
    command_line("runs", "rm", ".", "--yes").refusal("is the folder you are in")
    assert (run / "run.json").is_file()
