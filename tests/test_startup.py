"""What a command costs before it works: the modules that it loads, and processor time beside that of typer alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = ["-c", "import typer, rich"]
HEAVY = {"torch", "torchvision", "timm", "onnx", "onnxruntime", "numpy", "matplotlib", "jinja2", "sklearn", "PIL"}


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "words", [["recipes", "list"], ["targets", "list"], ["recipes", "show", "prune_kd"], ["targets", "list", "--json"]]
)
def test_looking_at_files_loads_no_settings_class(tmp_path: Path, words: list[str]) -> None:
    """typer itself loads pydantic to parse options; what takes longer are the classes of recipes and targets."""
    script = (
        "import sys\n"
        "from edgecompress.cli import app\n"
        "try:\n"
        f"    app({words}, standalone_mode=False)\n"
        "finally:\n"
        "    print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    answer = _run(["-c", script], tmp_path)
    assert answer.stdout
    loaded = set(answer.stderr.split())
    assert "edgecompress.settings.yaml_files" in loaded
    assert loaded & (HEAVY | {"edgecompress.settings.configuration", "edgecompress.pipeline", "rich.console"}) == set()


def _processor_seconds(words: list[str], folder: Path) -> float:
    before = os.times()
    assert _run(words, folder).returncode == 0
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "limit"),
    [(["--help"], 0.15), (["recipes", "list"], 0.3), (["targets", "list"], 0.3)],
    ids=["help", "recipes list", "targets list"],
)
def test_a_command_starts_at_once(tmp_path: Path, words: list[str], limit: float) -> None:
    """The least of several processes, the two in turn: processor time, which others on the machine do not add to."""
    base, ours = [], []
    for _ in range(7):
        base.append(_processor_seconds(BASE, tmp_path))
        ours.append(_processor_seconds(["-m", "edgecompress", *words], tmp_path))
    assert min(ours) - min(base) < limit
