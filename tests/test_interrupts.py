"""Ctrl-C: exit code 130, one message, no traceback, nothing half-written, no process left; in every long command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bundle_runs import small_run

ROOT = Path(__file__).resolve().parent.parent
LONG = ["--set", "stages.dense.epochs=500", "--set", "data.max_train_samples=300"]


def interrupted(
    folder: Path, words: list[str], *, after: str | None, seconds: float = 0.0, measuring: bool = False
) -> tuple[int, str, str]:
    """Send SIGINT to a command's process group once it has said `after` (or at once), as a terminal does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder / "stderr.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgecompress", *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            start_new_session=True,
            # What starts the tests in the background of a script ignores the signal, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        limit = time.monotonic() + 240
        while after is not None and after not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.1)
        while measuring and not psutil.Process(process.pid).children():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        stdout = process.communicate(timeout=120)[0]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
    text = log.read_text()
    log.unlink()
    return process.returncode, stdout, text


def check(code: int, text: str) -> None:
    # Python ends by the signal itself where the interrupt met code that was made from text (`exec`, as tracing does),
    # whoever handled it: a shell says 130 for both.
    assert code in (130, -signal.SIGINT), text
    assert text.count("error: ") == 1
    assert text.endswith("error: interrupted\n")
    assert "Traceback" not in text


def hidden(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*")]


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    """What was done is kept and said to be; with --json the message is the document."""
    code, stdout, text = interrupted(
        tmp_path, ["apply", "prune_kd", "--output", "run", *LONG], after="run directory:", seconds=2
    )
    check(code, text)
    assert stdout == ""
    assert "go on with the same command and: --output run --resume" in text
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "interrupted")
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_before_anything_begins(tmp_path: Path) -> None:
    code, _, text = interrupted(tmp_path, ["apply", "prune_kd", "--output", "run", *LONG], after=None, seconds=2)
    check(code, text)
    assert hidden(tmp_path) == []


RECIPE = """
data: {name: digits, max_train_samples: 64}
model: {name: resnet8, arguments: {width: 8}, preprocessing: {input_size: 16}}
stages: [{id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}]
"""


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = [sys.executable, "-m", "edgecompress", "apply", "tiny.yaml", "--output", "run", "--no-gate"]
    subprocess.run(made, cwd=tmp_path, env=environment, check=True, capture_output=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, text = interrupted(tmp_path, ["export", "run", "--int8"], after="exporting fp32")
    check(code, text)
    assert hidden(tmp_path) == []
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed in ([], ["run.json"])
    json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    """While a process of its own measures."""
    small_run(tmp_path / "run")
    files = ["run/export/model.onnx", "run/export/model.int8.onnx"]
    words = ["profile", *files, "--target", "x86", "--seconds", "60", "--output", "found.json", "--json"]
    code, stdout, text = interrupted(tmp_path, words, after=None, seconds=1, measuring=True)
    assert (code, json.loads(stdout)) == (130, {"error": "interrupted", "exit_code": 130}), text
    assert not (tmp_path / "found.json").exists()
    assert hidden(tmp_path) == []
