"""Training in two processes gives what one process gives with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from edgecompress.training.workers import Workers

_RECIPE = {
    "name": "shared",
    "precision": "fp32",
    "data": {"name": "digits"},
    "model": {"name": "NET"},
    "stages": [
        {"id": "dense", "kind": "train", "epochs": 2, "batch_size": 101, "learning_rate": 0.05},
        {"id": "tuned", "kind": "distill", "epochs": 1, "warmup_epochs": 0, "batch_size": 101, "learning_rate": 0.01}
        | {"teacher": {"stage": "dense"}},
        {"id": "int8", "kind": "quantize", "placement": "full", "calibration": {"samples": 64}},
    ],
    "gates": {"max_accuracy_drop": 1.0},
}
# Without batch norm: its statistics are those of each process's own images.
_NET = """
from torch import nn

def net(num_classes):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, num_classes)
    )
    model.preprocessing = {"input_size": 8, "channels": 1}
    return model
"""


def _apply(recipe: Path, output: Path, *, processes: int) -> str:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "edgecompress", "apply", str(recipe), "--output", str(output), "--resume", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NET)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_RECIPE).replace("NET", f"{tmp_path / 'net.py'}:net"))
    _apply(recipe, tmp_path / "one", processes=1)
    stdout = _apply(recipe, tmp_path / "two", processes=2)
    assert json.loads(stdout)["status"] == "complete"  # one document: the second process prints nothing
    for stage in ("dense", "tuned"):
        one, two = (load_file(tmp_path / run / "stages" / stage / "model.safetensors") for run in ("one", "two"))
        assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
        assert any(not torch.equal(one[name], two[name]) for name in one)  # sums in another order: it was shared
    one_lines, two_lines = _metrics(tmp_path / "one"), _metrics(tmp_path / "two")
    assert len(one_lines) == len(two_lines) == 3
    for a, b in zip(one_lines, two_lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["val_accuracy"] == pytest.approx(a["val_accuracy"], abs=0.01)
    assert not list((tmp_path / "two").glob("stages/*/progress"))
    assert json.loads(_apply(recipe, tmp_path / "two", processes=2))["status"] == "complete"  # nothing left to do


class _Two(Workers):
    """One of two processes, without the other."""

    def __init__(self, index: int) -> None:
        super().__init__(Accelerator(cpu=True))
        self.count, self.index = 2, index


def test_shares_cover_every_image_once_and_weigh_as_much_as_they_hold() -> None:
    positions = torch.arange(7)
    shares = [_Two(index).share(positions) for index in range(2)]
    assert sorted(torch.cat(shares).tolist()) == positions.tolist()
    weights = [_Two(index).weight(positions) for index in range(2)]
    values = torch.arange(7, dtype=torch.float32) ** 2
    mean = sum(w * float(values[share].mean()) for w, share in zip(weights, shares, strict=True)) / 2
    assert mean == pytest.approx(float(values.mean()))


def test_a_process_without_images_borrows_one_that_counts_nothing() -> None:
    assert _Two(1).share(torch.tensor([5])).tolist() == [5]
    assert _Two(1).weight(torch.tensor([5])) == 0.0
    assert _Two(0).weight(torch.tensor([5])) == 2.0


def test_alone_everything_is_the_identity() -> None:
    alone = Workers(Accelerator(cpu=True), shared=False)
    rows = torch.rand(5, 2)
    assert alone.gather_rows(rows, 5) is rows
    assert alone.share(torch.arange(3)).tolist() == [0, 1, 2]
    assert (alone.weight(torch.arange(3)), alone.mean(torch.tensor(2.0)), alone.any(True)) == (1.0, 2.0, True)
