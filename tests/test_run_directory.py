"""The run directory: files are whole or absent, JSON says what was meant, and hashes follow the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress.errors import RunError
from edgecompress.run_directory import (
    RunDirectory,
    atomic_path,
    new_run_path,
    newest_run,
    open_run,
    read_json,
    sha256_of,
    to_json,
    versioned,
    write_json,
    write_text,
)

MANIFEST = {"schema_version": 1, "status": "running", "recipe": {}, "stages": [], "targets": []}


def test_atomic_path_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    for content in (b"old", b"new"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".onnx"
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_removes_its_file_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")

    def remove() -> None:
        with atomic_path(path) as temporary:
            temporary.unlink()

    with pytest.raises(FileNotFoundError):
        remove()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_numbers_without_a_name_in_json_become_null(tmp_path: Path) -> None:
    document = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (-float("inf"), 2)}, 3: True}
    expected = {"a": None, "b": [None, 1.5], "c": {"d": [None, 2]}, "3": True}
    assert json.loads(to_json(document)) == expected
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == expected
    run = RunDirectory(tmp_path)
    run.append_metrics({"loss": float("nan")})
    run.append_metrics({"loss": np.float32(0.5)})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"loss": None}, {"loss": 0.5}]


def test_arrays_and_their_scalars_become_numbers_and_paths_text() -> None:
    document = {
        "accuracy": np.float32(0.5),
        "loss": np.float32("nan"),
        "samples": np.int64(3),
        "passed": np.bool_(True),
        "counts": np.array([[1, 2], [3, 4]]),
        "folder": Path("a/b"),
    }
    assert json.loads(to_json(document)) == {
        "accuracy": 0.5,
        "loss": None,
        "samples": 3,
        "passed": True,
        "counts": [[1, 2], [3, 4]],
        "folder": "a/b",
    }


def test_paths_that_are_not_utf8_survive(tmp_path: Path) -> None:
    document = {"command": "edgecompress run caf\udce9.yaml", "word": "café"}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document
    assert "café" in (tmp_path / "a.json").read_text()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), _JSON, max_size=4))
def test_json_reads_back_as_it_was(document: dict[str, Any]) -> None:
    assert json.loads(to_json(document)) == document


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json: (cannot be read|expected a JSON object)"):
        read_json(path)


def test_documents_of_a_later_version_are_refused_and_those_from_before_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert versioned({"a": 1}) == {"schema_version": 1, "a": 1}
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text('{"schema_version": 2, "a": 1}')
    with pytest.raises(RunError, match=r"profile.json: schema_version 2, this edgecompress reads 1; use the version"):
        read_json(path)


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_artifacts_follow_the_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_manifest(MANIFEST)
    run.append_metrics({"epoch": 1})
    write_text(run.stage("dense") / "model.json", "{}")
    write_text(run.export / "model.onnx", "a")
    write_text(run.path / ".partial.onnx", "not yet")
    before = run.artifacts()
    assert list(before) == ["export/model.onnx", "stages/dense/model.json"]
    assert run.artifacts() == before
    write_text(run.export / "model.onnx", "b")
    after = run.artifacts()
    assert after["export/model.onnx"] != before["export/model.onnx"]
    assert after["stages/dense/model.json"] == before["stages/dense/model.json"]
    (run.export / "model.onnx").unlink()
    assert list(run.artifacts()) == ["stages/dense/model.json"]


def test_another_targets_files_have_a_folder_of_their_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.export_for("x86") == tmp_path / "export"
    (tmp_path / "export" / "rpi5").mkdir(parents=True)
    assert run.export_for("rpi5") == tmp_path / "export" / "rpi5"
    assert run.export_for("x86") == tmp_path / "export"
    assert run.profile_path("x86") == tmp_path / "profile" / "x86.json"
    assert run.report_path("x86", "html") == tmp_path / "report" / "x86.html"


def test_manifest_is_read_changed_and_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(RunError, match="run: not a run directory"):
        run.read_manifest()
    run.write_manifest(MANIFEST)
    written = run.update_manifest(lambda m: m.update(status="complete"))
    assert written == run.read_manifest() == MANIFEST | {"status": "complete"}
    run.write_manifest(MANIFEST | {"schema_version": 2})
    with pytest.raises(RunError, match="schema_version 2, this edgecompress reads 1; use the version that wrote it"):
        run.read_manifest()


def test_a_change_that_fails_leaves_the_manifest(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_manifest(MANIFEST)
    before = run.manifest_path.read_bytes()
    with pytest.raises(KeyError):
        run.update_manifest(lambda m: m.update(status=m["no such key"]))
    assert run.manifest_path.read_bytes() == before


def test_newest_run_is_the_one_started_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no run yet under runs/; start one with: edgecompress run"):
        newest_run()
    started = {
        "z-first": "2026-01-01T10:00:00+00:00",
        "a-last": "2026-01-03T09:00:00+00:00",
        "m": "2026-01-02T23:00:00+00:00",
    }
    for name, time in started.items():
        RunDirectory(Path("runs", name)).write_manifest(MANIFEST | {"started_at": time})
    Path("runs", "no-run").mkdir()
    assert newest_run() == Path("runs/a-last")
    assert open_run(None).path == Path("runs/a-last")
    RunDirectory(Path("runs/z-first")).update_manifest(lambda m: m.update(status="complete"))
    assert newest_run() == Path("runs/a-last"), "the time it was started counts, not the last change"
    assert open_run(Path("runs/m")).path == Path("runs/m")


def test_run_names_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(4):
        path = new_run_path("prune_kd")
        path.mkdir(parents=True)
        paths.append(path)
    assert len(set(paths)) == 4
    assert all(path.parent == Path("runs") and path.name.startswith("prune_kd-20") for path in paths)
