"""A disk that is full, a folder that is read-only, few open files, little memory: really, in a mount namespace.

`unshare -rm python tests/small_machine.py` tries more of each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _may_mount(folder: Path) -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    words = [unshare, "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_what_runs_out_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    if not _may_mount(tmp_path):
        pytest.skip("this system permits no mount namespace (unshare -rm mount -t tmpfs)")
    words = ["unshare", "-rm", sys.executable, str(ROOT / "tests" / "small_machine.py"), "--short"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout)
    assert document["faults"] == []
    said = " ".join(document["tried"].values())
    for words_of in ("No space left on device", "Read-only file system"):
        assert words_of in said
