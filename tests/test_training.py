from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgecompress.data.run_data import PreparedSplit
from edgecompress.errors import TrainingError
from edgecompress.models.model_building import build
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.training.distill import LossFunction, TrainingBatch, label_loss
from edgecompress.training.precision import resolve_precision
from edgecompress.training.training_loop import EpochRecord, FitResult, fit
from small_models import digits_splits, small_architecture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def splits() -> dict[str, PreparedSplit]:
    return digits_splits()


def _fit(
    splits: dict[str, PreparedSplit],
    seed: int = 0,
    loss: LossFunction | None = None,
    precision: str = "fp32",
    **settings: Any,
) -> tuple[nn.Module, FitResult, list[EpochRecord]]:
    torch.manual_seed(seed)
    module = build(small_architecture())
    records: list[EpochRecord] = []
    chosen = TrainingSettings.model_validate({"epochs": 2, "learning_rate": 0.1, "batch_size": 64} | settings)
    result = fit(
        module,
        settings=chosen,
        epochs=chosen.epochs,
        loss=loss or label_loss(),
        train=splits["train"],
        val=splits["val"],
        preprocessing=small_architecture().preprocessing,
        precision=precision,
        seed=seed,
        description="test",
        on_epoch=records.append,
    )
    return module, result, records


def test_it_learns_and_reports_each_epoch(splits: dict[str, PreparedSplit]) -> None:
    module, result, records = _fit(splits, epochs=3)
    assert [record.epoch for record in records] == [1, 2, 3]
    assert records[-1].loss < 0.5 * records[0].loss
    assert result.val_accuracy > 0.8
    assert not module.training
    assert records[-1].learning_rate < records[0].learning_rate


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(splits: dict[str, PreparedSplit]) -> None:
    augmented = {"augment": {"shift_pixels": 1, "horizontal_flip": True}}
    states = [_fit(splits, seed=seed, **augmented)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_best_val_keeps_the_best_epoch(splits: dict[str, PreparedSplit]) -> None:
    _, result, records = _fit(splits, epochs=3, keep="best_val", warmup_epochs=0)
    assert records[result.kept_epoch - 1].val_accuracy == max(record.val_accuracy for record in records)


def test_adamw_learns_too(splits: dict[str, PreparedSplit]) -> None:
    _, result, _ = _fit(splits, optimizer="adamw", learning_rate=0.005, epochs=3, gradient_clip_norm=1.0)
    assert result.val_accuracy > 0.7


def test_a_loss_that_is_not_finite_stops_with_advice(splits: dict[str, PreparedSplit]) -> None:
    def broken(batch: TrainingBatch, logits: Tensor) -> Tensor:
        return logits.sum() * float("nan")

    with pytest.raises(
        TrainingError, match=r"not finite in epoch 1, and .* holds NaN or infinity; lower learning_rate"
    ):
        _fit(splits, loss=broken)


def test_precision_names() -> None:
    module = build(small_architecture())
    assert resolve_precision("fp32", module) == "no"
    assert resolve_precision("bf16", module) == "bf16"
    assert resolve_precision("auto", module) in ("no", "bf16", "fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rule is for CPUs")
@pytest.mark.parametrize(("name", "expected"), [("resnet8", "bf16"), ("mobilenet_small", "no")])
def test_auto_keeps_depthwise_nets_in_fp32(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    monkeypatch.setattr("edgecompress.training.precision.isa_features", lambda: ("avx512_bf16",))
    assert resolve_precision("auto", build(small_architecture(name))) == expected


def test_mixed_precision_leaves_the_module_as_it_was(splits: dict[str, PreparedSplit]) -> None:
    module, result, _ = _fit(splits, precision="bf16", epochs=1, warmup_epochs=0)
    assert result.mixed_precision == "bf16"
    with torch.inference_mode():
        assert module(torch.zeros(1, 1, 8, 8)).dtype == torch.float32
    assert "forward" not in vars(module)
    assert all(p.dtype == torch.float32 for p in module.parameters())
