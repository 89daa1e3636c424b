"""Thousands of files made bad by chance: refused with one message or read, and never a traceback, a hang, a wrong ok.

EDGECOMPRESS_BAD_INPUTS says how many (600 in CI); `python tests/bad_files.py --inputs 5000` prints the table.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bad_files
from bad_files import GOOD, KINDS, REFUSED, faults_of, table, try_inputs
from edgecompress.data.image_folder import _read_class_index
from edgecompress.errors import EdgeCompressError, RunError
from edgecompress.models.checkpoint import rebuild
from edgecompress.run_directory import is_plain_name, open_run

INPUTS = int(os.environ.get("EDGECOMPRESS_BAD_INPUTS", "600"))


@pytest.mark.slow
def test_no_bad_file_is_worse_than_refused() -> None:
    findings = try_inputs(INPUTS)
    faults = faults_of(findings)
    shown = "\n".join(f"{one.kind}, seed {one.seed}: {one.outcome}: {one.detail[-800:]}" for one in faults[:5])
    assert not faults, f"{table(findings)}\n{shown}"
    for name, found in findings.items():
        counts = Counter(one.outcome for one in found)
        assert counts[REFUSED] > counts.total() / 4, f"{name}: hardly anything is refused, so hardly anything is tried"
        assert len({one.detail for one in found if one.outcome == REFUSED}) > 1, name
    assert sum(len(found) for found in findings.values()) >= INPUTS - len(KINDS)
    assert any(one.outcome == GOOD for found in findings.values() for one in found)


NUMBERS = st.floats(allow_nan=False) | st.integers()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["status", "recipe", "stages", "targets", "baseline", "gates", "decisions", "artifacts"])


def told(work: Callable[[], Any]) -> Any:
    """What it gives, or the message with which it refuses."""
    try:
        return work()
    except EdgeCompressError as error:
        return str(error)


@given(st.dictionaries(KEYS, JSON))
def test_any_manifest_is_opened_or_refused(tmp_path_factory: pytest.TempPathFactory, manifest: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run", numbered=True)
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, **manifest}))
    run = told(lambda: open_run(folder))
    if isinstance(run, str):
        assert "run.json" in run
    else:
        assert all(is_plain_name(name) for name in run.read_manifest()["targets"])


@given(st.dictionaries(st.sampled_from(["format_version", "architecture", "history"]), JSON))
def test_any_model_description_is_rebuilt_or_refused(
    tmp_path_factory: pytest.TempPathFactory, description: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("stage", numbered=True)
    (folder / "model.json").write_text(json.dumps({"format_version": 2} | description))
    with pytest.raises(RunError, match=folder.name):
        rebuild(folder)


@given(JSON)
def test_any_class_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, index: Any) -> None:
    path = tmp_path_factory.mktemp("index", numbered=True) / "index.json"
    path.write_text(json.dumps(index))
    found = told(lambda: _read_class_index(path))
    if isinstance(found, str):
        assert "index.json" in found
    else:
        assert found
        assert len(set(found.values())) == len(found)


def test_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that raises, one that says ok to a changed file, one that does not name it."""
    outcomes = iter([("wrong ok", ""), ("unnamed", "no"), ("exit code", "7")])

    def reads(folder: Path, path: Path, chance: object) -> tuple[str, str]:
        if path.read_bytes() == b"good":
            return GOOD, ""
        outcome = next(outcomes, None)
        if outcome is None:
            raise KeyError("x")
        return outcome

    def make(folder: Path) -> None:
        (folder / "file").write_bytes(b"good")

    kind = bad_files.Kind(make, lambda folder: [folder / "file"], lambda content, chance: b"bad", reads)
    found = [kind.attempt("mine", tmp_path / "mine", seed) for seed in range(4)]
    assert [one.outcome for one in found] == ["wrong ok", "unnamed", "exit code", "traceback"]
    assert len(faults_of({"mine": found})) == 4
    assert (tmp_path / "mine" / "file").read_bytes() == b"good"
