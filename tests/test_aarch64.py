"""The bundle on 64-bit Arm, in truth but for the board: Debian's Python and the aarch64 wheels under emulation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bundle_runs import small_run
from edgecompress.deploy.bundle import write_bundle
from edgecompress.settings.target import load_target

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "aarch64_self_test.py"
LOST = [tool for tool in ("qemu-aarch64", "apt-get", "dpkg-deb") if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(LOST), reason=f"not installed: {', '.join(LOST)} (Debian: qemu-user)")
def test_a_bundle_gives_its_answers_on_emulated_arm(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    made = write_bundle(run, load_target("arm64"), exported=run.export, output=tmp_path / "out")
    command = [sys.executable, SCRIPT, made.folder, "--cpu", "cortex-a72", "--cpu", "max"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if "fetching" in done.stderr or "apt-get update" in done.stderr:
        pytest.skip(f"the packages for arm64 are not to be had here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| cortex-a72", "| max"))]
    assert len(rows) == 4
    assert all(row.endswith("| passed |") for row in rows)
