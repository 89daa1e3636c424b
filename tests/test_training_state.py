"""A fit that was stopped goes on exactly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from edgecompress import pipeline
from edgecompress.data.run_data import PreparedSplit
from edgecompress.errors import RunError
from edgecompress.models.model_building import build
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.training.distill import TrainingBatch, label_loss
from edgecompress.training.training_loop import EpochRecord, FitResult, fit
from edgecompress.training.training_state import PhaseState, Progress, State
from small_models import digits_splits, small_architecture

_EVERYTHING = {
    "epochs": 3,
    "batch_size": 128,
    "learning_rate": 0.05,
    "ema_decay": 0.9,
    "keep": "best_val",
    "augment": {"shift_pixels": 1, "mixup_alpha": 0.2, "randaugment_magnitude": 5},
}


class _CrashError(Exception):
    """Stands for a crash: raised between two steps."""


@pytest.fixture(scope="module")
def splits() -> dict[str, PreparedSplit]:
    return digits_splits()


def _fit(
    splits: dict[str, PreparedSplit],
    state: PhaseState | None,
    *,
    crash_after: int | None = None,
    interrupt_after: int | None = None,
    records: list[EpochRecord] | None = None,
    dropout: bool = True,
    **settings: Any,
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(0)
    module = build(small_architecture())
    if dropout:
        module.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.3))
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == crash_after:
            raise _CrashError
        if steps == interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)

    chosen = TrainingSettings.model_validate({**_EVERYTHING, **settings})
    result = fit(
        module,
        settings=chosen,
        epochs=chosen.epochs,
        loss=label_loss(),
        train=splits["train"],
        val=splits["val"],
        preprocessing=small_architecture().preprocessing,
        precision="fp32",
        seed=0,
        description="test",
        on_epoch=records.append if records is not None else lambda record: None,
        after_step=after_step,
        state=state,
    )
    return module, result


def _same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_a_fit_that_crashed_goes_on_to_identical_weights(
    splits: dict[str, PreparedSplit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    monkeypatch.setattr("edgecompress.training.training_loop._SECONDS_BETWEEN_SAVES", save_seconds)
    whole, expected = _fit(splits, None)
    state = Progress(tmp_path).phase("test")
    for crash_after in (3, 7, 1, 9):  # each counts from where the one before was saved
        with pytest.raises(_CrashError):
            _fit(splits, state, crash_after=crash_after)
    records: list[EpochRecord] = []
    resumed, result = _fit(splits, state, records=records)
    assert _same(whole, resumed)
    assert [record.epoch for record in records] == [1, 2, 3]
    assert [r.loss for r in result.epochs] == [r.loss for r in expected.epochs]
    assert result.kept_epoch == expected.kept_epoch
    again, _ = _fit(splits, state)  # a finished phase is read back
    assert _same(whole, again)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_saves(
    splits: dict[str, PreparedSplit], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = _fit(splits, None)
    state = Progress(tmp_path).phase("test")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _fit(splits, state, interrupt_after=5)
    assert signal.getsignal(signal.SIGINT) is before
    assert "finishing the step" in capsys.readouterr().err
    resumed, _ = _fit(splits, state)
    assert "step 6" in capsys.readouterr().err
    assert _same(whole, resumed)


@pytest.mark.slow
def test_other_settings_do_not_go_on_from_a_state(splits: dict[str, PreparedSplit], tmp_path: Path) -> None:
    state = Progress(tmp_path).phase("test")
    _fit(splits, state, epochs=2)
    with pytest.raises(RunError, match="belongs to other settings"):
        _fit(splits, state, epochs=2, learning_rate=0.01)


def test_a_damaged_state_is_named_and_nothing_pickled_runs(tmp_path: Path) -> None:
    state = Progress(tmp_path).phase("pruned 1/2")
    assert state.path.name == "pruned_1_2.pt"
    assert state.load(fingerprint="x") is None
    state.path.write_bytes(b"no archive")
    with pytest.raises(RunError, match=r"pruned_1_2\.pt: cannot be read"):
        state.load(fingerprint="x")
    torch.save({"version": 1, "fingerprint": "x", "state": Path("code")}, state.path)
    with pytest.raises(RunError, match="cannot be read"):
        state.load(fingerprint="x")
    state.save({"tensor": torch.arange(3)}, fingerprint="x")
    loaded = state.load(fingerprint="x")
    assert loaded is not None
    assert torch.equal(loaded["tensor"], torch.arange(3))
    Progress(tmp_path).clear()
    assert not tmp_path.exists()


@pytest.mark.slow
def test_early_stop_hands_on_the_best_epoch(splits: dict[str, PreparedSplit]) -> None:
    # A learning rate that does nothing: no epoch is better than the first by more than a tie, so patience runs out.
    def loss(batch: TrainingBatch, logits: Tensor) -> Tensor:
        return logits.sum() * 0.0

    torch.manual_seed(0)
    module = build(small_architecture())
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0  # statistics stay too, so that every epoch is the same model
    settings = TrainingSettings(epochs=9, weight_decay=0.0, keep="best_val", early_stop_epochs=2)
    result = fit(
        module,
        settings=settings,
        epochs=9,
        loss=loss,
        train=splits["train"],
        val=splits["val"],
        preprocessing=small_architecture().preprocessing,
        precision="fp32",
        seed=0,
        description="test",
    )
    assert len(result.epochs) == 3
    assert result.kept_epoch == 3  # of epochs that are equal, the last


_STEPS = {
    "name": "steps",
    "precision": "fp32",
    "data": {"name": "digits"},
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "stages": [
        {"id": "dense", "kind": "train", "epochs": 2, "batch_size": 128, "learning_rate": 0.05},
        {"id": "pruned", "kind": "prune", "channel_ratio": 0.5, "channel_multiple": 2, "scope": "layer", "steps": 2}
        | {"importance": "taylor", "epochs_between": 1, "epochs": 1, "warmup_epochs": 0, "teacher": {"stage": "dense"}},
        {"id": "int8", "kind": "quantize", "placement": "full", "effort": "fast", "calibration": {"samples": 32}},
    ],
    "gates": {"max_accuracy_drop": 1.0},
}


@pytest.mark.slow
def test_a_stage_of_several_phases_goes_on_in_the_one_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "steps.yaml"
    recipe.write_text(yaml.safe_dump(_STEPS))

    def weights(run: Path) -> dict[str, bytes]:
        return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("stages/*/*.safetensors"))}

    def epochs(run: Path) -> list[tuple[str, str, int]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["stage"], line["phase"], line["epoch"]) for line in lines]

    pipeline.apply(str(recipe), output=tmp_path / "whole")
    expected = epochs(tmp_path / "whole")
    assert expected == [("dense", "", 1), ("dense", "", 2), ("pruned", "1/2", 1), ("pruned", "2/2", 1)]
    save = PhaseState.save
    saves = 0

    def crash(self: PhaseState, state: State, *, fingerprint: str) -> None:
        nonlocal saves
        saves += 1
        save(self, state, fingerprint=fingerprint)
        if saves in (1, 3, 4):  # after an epoch of dense, of the first cut's finetuning, of the second's
            raise _CrashError

    monkeypatch.setattr(PhaseState, "save", crash)
    for _ in range(3):
        with pytest.raises(_CrashError):
            pipeline.apply(str(recipe), output=tmp_path / "cut", resume=(tmp_path / "cut").exists())
    manifest = pipeline.apply(str(recipe), output=tmp_path / "cut", resume=True).manifest
    assert manifest["status"] == "complete"
    assert saves == 4  # no epoch was trained twice
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert epochs(tmp_path / "cut") == expected
    assert not any("progress" in name for name in manifest["artifacts"])
