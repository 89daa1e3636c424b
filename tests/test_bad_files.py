"""Thousands of files made bad by chance: refused with one message or read, and never a traceback, a hang, a wrong ok.

EDGECOMPRESS_BAD_INPUTS says how many (600 in CI); `python tests/bad_files.py --inputs 5000` prints the table.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

import bad_files
from bad_files import GOOD, KINDS, REFUSED, faults_of, table, try_inputs

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
