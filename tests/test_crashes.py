"""SIGKILL at chosen writes of every command that changes a run, and of a search: nothing half-written, no lie, the same
bytes again.

EDGECOMPRESS_KILL_POINTS=100 kills at that many points instead of eleven, EDGECOMPRESS_KILL_SEED chooses others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bundle_runs import small_run
from crash_points import faults_of
from edgecompress.deploy.verify import verify
from edgecompress.run_directory import RunDirectory, sha256_of, write_json

ROOT = Path(__file__).resolve().parent.parent
COUNT = int(os.environ.get("EDGECOMPRESS_KILL_POINTS", "11"))


@pytest.mark.slow
@pytest.mark.timeout(600 + 60 * COUNT)
def test_a_killed_command_is_made_good_by_repeating_it() -> None:
    seed = os.environ.get("EDGECOMPRESS_KILL_SEED", "0")
    words = [sys.executable, str(ROOT / "tests" / "crash_points.py"), "--points", str(COUNT), "--seed", seed]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout)
    assert document["faults"] == {}
    assert sum(document["killed"].values()) == COUNT


def run_with(tmp_path: Path, *names: str) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    for name in names:
        write_json(run.path / name, {"old": name})
    write_json(run.manifest_path, {"schema_version": 1, "artifacts": run.artifacts()})
    return run


def test_hashes_are_absent_while_their_files_are_replaced(tmp_path: Path) -> None:
    run = run_with(tmp_path, "export/parity.json", "stages/a/result.json")
    with run.replacing(run.export):
        write_json(run.export / "parity.json", {"new": 1})
        assert list(faults_of(run.path)) == []
        assert list(run.read_manifest()["artifacts"]) == ["stages/a/result.json"]
    assert run.read_manifest()["artifacts"]["export/parity.json"] == sha256_of(run.export / "parity.json")


def test_an_error_while_files_are_replaced_leaves_the_hashes_of_what_is_there(tmp_path: Path) -> None:
    run = run_with(tmp_path, "export/parity.json", "export/other.json")
    with pytest.raises(TypeError), run.replacing(run.export):
        write_json(run.export / "parity.json", json.dumps({"new": write_json(run.export / "other.json", 2)}, object()))
    found = run.read_manifest()["artifacts"]
    assert found == {f"export/{name}": sha256_of(run.export / name) for name in ("other.json", "parity.json")}


def test_hashes_of_other_files_stay_so_that_what_was_changed_can_still_be_told(tmp_path: Path) -> None:
    run = run_with(tmp_path, "export/parity.json", "stages/a/result.json", "stages/a/debug.json")
    recorded = run.read_manifest()["artifacts"]
    write_json(run.stage("a") / "result.json", {"changed": "by hand"})
    run.write_document(run.stage("a") / "debug.json", {"new": 1})
    now = run.read_manifest()["artifacts"]
    assert now["stages/a/debug.json"] == sha256_of(run.stage("a") / "debug.json") != recorded["stages/a/debug.json"]
    assert now["stages/a/result.json"] == recorded["stages/a/result.json"]
    assert run.changed_files() == ["stages/a/result.json"]


def test_what_a_crash_left_in_the_making_is_no_artifact(tmp_path: Path) -> None:
    run = run_with(tmp_path, "export/parity.json", "bundle/.tiny-x86.abc/tiny-x86/manifest.json")
    assert list(run.artifacts()) == ["export/parity.json"]


def test_what_a_crash_left_in_the_making_does_not_fail_verify(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_json(run.path / "bundle" / ".tiny-here.abc" / "tiny-here" / "manifest.json", {})
    assert verify(run.path).ok
