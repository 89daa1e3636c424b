"""--track: what TensorBoard reads back is what metrics.jsonl and run.json say; and what is missing is said at once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import CommandLine
from edgecompress.errors import ConfigurationError
from edgecompress.training.tracking import Tracking, require_trackers, tracked
from edgecompress.training.training_loop import EpochRecord

RECIPE = {"seed": 3, "model": {"name": "resnet8", "checkpoint": None}, "stages": [{"id": "dense", "epochs": 2}]}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def record(epoch: int, loss: float) -> EpochRecord:
    return EpochRecord(epoch, loss, val_accuracy=0.5, learning_rate=0.1, seconds=1.0, images_per_second=10.0)


def test_epochs_and_results(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    with tracked(["tensorboard"], run, RECIPE) as tracking:
        assert tracking is not None
        for epoch, loss in ((1, 0.9), (2, 0.7), (1, 0.5)):  # a stage that cuts in steps counts from 1 again
            tracking.watch("pruned", record(epoch, loss), None)
        stages = [{"id": "pruned", "accuracy": 0.75, "params": 10, "summary": "x"}]
        profile = {"models": {"fp32": {"latency_ms": {"p50": 2.0}}, "int8": {"latency_ms": {"p50": None}}}}
        tracking.results({"stages": stages}, {"x86": profile})
    found = curves(tmp_path / "runs" / "tensorboard" / "mine")
    assert found["pruned/loss"] == [(1, pytest.approx(0.9)), (2, pytest.approx(0.7)), (3, pytest.approx(0.5))]
    assert found["result/pruned/accuracy"] == [(0, 0.75)]
    assert found["profile/x86/fp32/latency_ms_p50"] == [(0, 2.0)]
    assert "profile/x86/int8/latency_ms_p50" not in found
    assert not run.exists(), "a run holds nothing of the tracker's"
    (settings,) = (tmp_path / "runs" / "tensorboard").rglob("hparams.yml")
    assert "stages.dense.epochs: 2" in settings.read_text()


class Rising:
    """Takes what Weights & Biases takes: without a step, one call after the other; with one, never a lower one."""

    name = "wandb"

    def __init__(self) -> None:
        self.tracker, self.axes, self.rows = self, {}, []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float], step: int | None) -> None:
        assert step is None or step >= len(self.rows)
        self.rows.append(values)


def test_each_stage_has_an_axis_of_its_own_where_steps_must_rise() -> None:
    rising = Rising()
    tracking = Tracking([rising])
    for stage, epoch in (("dense", 1), ("dense", 2), ("pruned", 1)):
        tracking.watch(stage, record(epoch, 0.5), None)
    tracking.results({"stages": [{"id": "pruned", "accuracy": 0.75}]}, {})
    assert rising.axes == {
        **{"dense/epoch": None, "dense/*": "dense/epoch"},
        **{"pruned/epoch": None, "pruned/*": "pruned/epoch"},
    }
    assert [row.get("dense/epoch", row.get("pruned/epoch")) for row in rising.rows] == [1, 2, 1, None]
    assert rising.rows[-1] == {"result/pruned/accuracy": 0.75}


def test_mlflow_reads_back_what_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    told(tmp_path / "mine", "mlflow")
    (found,) = mlflow.search_runs(experiment_names=["edgecompress"], output_format="list")
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params["stages.dense.epochs"] == "2"
    assert found.data.metrics["result/pruned/accuracy"] == 0.75
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "pruned/loss")
    assert [(row.step, row.value) for row in history] == [(1, 0.5)]


def test_wandb_keeps_every_epoch_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    told(tmp_path / "mine", "wandb")
    (file,) = tmp_path.rglob("run-*.wandb")
    content = file.read_bytes()
    assert [name for name in (b"dense/loss", b"pruned/loss", b"result/pruned/accuracy") if name not in content] == []
    said = capfd.readouterr().err
    assert "Tried to log to step" not in said, said
    assert "pruned/loss" in said


def told(run: Path, name: str) -> None:
    """Two stages and a result, told to a tracker of that name."""
    with tracked([name], run, RECIPE) as tracking:
        assert tracking is not None
        for stage, loss in (("dense", 0.9), ("dense", 0.7), ("pruned", 0.5)):
            tracking.watch(stage, record(1, loss), None)
        tracking.results({"stages": [{"id": "pruned", "accuracy": 0.75}]}, {})


def test_no_tracker_is_none(tmp_path: Path) -> None:
    with tracked([], tmp_path / "run", RECIPE) as tracking:
        assert tracking is None
    assert list(tmp_path.iterdir()) == []


def test_trackers_are_closed_when_the_run_stops(tmp_path: Path) -> None:
    def stopped() -> None:
        with tracked(["tensorboard"], tmp_path / "run", RECIPE) as tracking:
            assert isinstance(tracking, Tracking)
            tracking.watch("dense", record(1, 0.25), None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert curves(tmp_path)["dense/loss"] == [(1, 0.25)]


def test_what_cannot_be_used_is_said_before_anything_begins(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line("apply", "prune_kd", "--track", "tensorbord").refusal("did you mean 'tensorboard'?")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "the package mlflow is not installed; pip install 'edgecompress[mlflow]'"
    with pytest.raises(ConfigurationError, match="mlflow is not installed"):
        require_trackers(["mlflow"])
    command_line("run", "prune_kd", "--target", "x86", "--track", "mlflow").refusal(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_is_tracked(command_line: CommandLine, tmp_path: Path) -> None:
    overrides = ["model.arguments.width=8", "data.max_train_samples=100", "stages.dense.epochs=3"]
    overrides += ["stages.pruned.epochs=2", "stages.int8.effort=fast", "stages.int8.placement=full"]
    settings: list[Any] = [word for override in overrides for word in ("--set", override)]
    words = ["apply", "prune_kd", "--output", "run", "--no-gate", "--track", "tensorboard", *settings]
    assert command_line(*words).exit_code == 0
    found = curves(tmp_path / "tensorboard" / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for stage in ("dense", "pruned"):
        written = [line["loss"] for line in lines if line["stage"] == stage]
        assert [value for _, value in found[f"{stage}/loss"]] == pytest.approx(written)
    for stage in json.loads((tmp_path / "run" / "run.json").read_text())["stages"]:
        assert found[f"result/{stage['id']}/accuracy"][0][1] == pytest.approx(stage["accuracy"])
    assert command_line("verify", "run").exit_code == 0
