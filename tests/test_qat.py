from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecompress import pipeline
from edgecompress.errors import ConfigurationError
from edgecompress.int8 import weight_ranges
from edgecompress.int8.operators import QUANTIZE
from edgecompress.int8.post_training import quantize
from edgecompress.int8.qat import TrainableInt8, _RoundToStep, _step_within
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.scheme import Scheme
from edgecompress.settings.recipe import QatStage, QuantizeStage, load_recipe
from edgecompress.stages.train_stages import _compare
from small_models import images, tiny_net


def _int8(
    batch: Tensor,
    scheme: Scheme = Scheme("uint8", 7),  # noqa: B008  # frozen
    module: nn.Module | None = None,
) -> QuantizedModel:
    return quantize(
        module or tiny_net(),
        stage=QuantizeStage(kind="quantize", id="int8", effort="fast"),
        scheme=scheme,
        calibration=lambda: iter([batch]),
        batches=1,
        example=batch[:2],
    )


def test_rounding_has_the_gradients_of_learned_step_size_quantization() -> None:
    """Esser et al., 2020, equations 3 and 5, by hand: inside, below and above the range [-2, 1] steps."""
    values = torch.tensor([0.7, -5.0, 5.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    rounded = _RoundToStep.apply(values, step, -2, 1)
    torch.testing.assert_close(rounded, torch.tensor([0.5, -1.0, 0.5]))
    rounded.sum().backward()
    assert values.grad is not None
    assert step.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(step.grad, torch.tensor((1 - 1.4) - 2.0 + 1.0))


def test_training_begins_where_post_training_ended_and_the_way_back_changes_nothing() -> None:
    batch = images(32)
    model = _int8(batch)
    trainable = TrainableInt8(model)
    with torch.no_grad():
        logits = trainable(batch)
        torch.testing.assert_close(logits, model.graph(batch), atol=1e-4, rtol=0)
        torch.testing.assert_close(trainable.quantized("x").graph(batch), logits, atol=1e-4, rtol=0)


def test_training_comes_nearer_to_float_and_the_integers_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_ranges, "_MOST_WEIGHTS", 0)  # the largest weights' steps, so that there is much to learn
    batch = images(64)
    model = _int8(batch, Scheme("uint8", 7))
    with torch.no_grad():
        wanted = tiny_net()(batch)
        before = float(((model.graph(batch) - wanted) ** 2).mean())
    trainable = TrainableInt8(model)
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (((trainable(batch) - wanted) ** 2).mean() / before).backward()
        optimizer.step()
    trained = trainable.quantized("trained")
    with torch.no_grad():
        after = float(((trained.graph(batch) - wanted) ** 2).mean())
    assert after < 0.7 * before
    assert trained.correction == "trained"
    for name, tensor in trained.graph.state_dict().items():
        if tensor.dtype == torch.int8:
            assert int(tensor.abs().max()) <= 63, name
    # The bias keeps the accumulator's scale, s_x * s_w, though both have moved.
    for node in trained.graph.graph.nodes:
        if node.target is torch.ops.aten.conv2d.default and len(node.args) > 2 and node.args[2] is not None:
            source, weight, bias = node.args[:3]
            scales = [trained.graph.get_buffer(str(read.args[1].target)) for read in (weight, bias)]
            torch.testing.assert_close(scales[1].float(), scales[0].float() * source.args[1])


class _Clamps(nn.Module):
    """Two-sided clamps and one-sided ones, in place and not, each behind a convolution."""

    CLAMPS: tuple[tuple[Callable[[Tensor], Tensor], float, float], ...] = (
        (lambda x: torch.clamp(x, min=-0.75), -0.75, math.inf),
        (lambda x: torch.clamp(x, max=0.6), -math.inf, 0.6),
        (lambda x: torch.clamp(x, -0.7, 0.5), -0.7, 0.5),
        (functional.hardtanh, -1.0, 1.0),
        (lambda x: torch.clamp_max(x, 0.8), -math.inf, 0.8),
        (lambda x: torch.clamp_min(x, -0.65), -0.65, math.inf),
        (lambda x: x.clamp_(0.0, 0.9), 0.0, 0.9),
        (functional.relu6, 0.0, 6.0),
    )

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in self.CLAMPS)
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, (clamp, _, _) in zip(self.convs, self.CLAMPS, strict=True):
            x = clamp(8.0 * convolution(x))
        return torch.as_tensor(self.head(x).mean((2, 3)))


def _clamped_ranges(model: QuantizedModel) -> list[tuple[float, float]]:
    """The ranges that the outputs of clamps are rounded in, in graph order."""
    ranges = []
    for node in model.graph.graph.nodes:
        if node.target is QUANTIZE and re.search("clamp|hardtanh|relu6", str(node.args[0].target)):
            scale, zero_point, low, high = node.args[1:5]
            ranges.append(((low - zero_point) * scale, (high - zero_point) * scale))
    return ranges


def test_no_learned_range_grows_beyond_its_clamp() -> None:
    """The runtime drops a clamp, and may then run on integers, only where the range that follows ends within it."""
    torch.manual_seed(0)
    model = _int8(images(16), module=_Clamps())
    trainable = TrainableInt8(model)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(3.0)  # twenty times as wide, if nothing held it
    before, after = _clamped_ranges(model), _clamped_ranges(trainable.quantized("x"))
    assert len(after) == len(_Clamps.CLAMPS)
    for (low, high), (old_low, old_high), (_, least, most) in zip(after, before, _Clamps.CLAMPS, strict=True):
        # Calibration rounds zero points, so a range may begin or end a part of a step beyond its clamp.
        assert low >= min(least, old_low) - 1e-6
        assert high <= max(most, old_high) + 1e-6
    assert after[-1][1] == pytest.approx(6.0) != before[-1][1]


@pytest.mark.parametrize("limit", [0.1, 2.718281828, 3.0, 6.0, 9.426883557880855])
def test_the_widest_range_within_a_clamp_stays_within_it_in_float32(limit: float) -> None:
    """The runtime multiplies in float32, and drops a clamp only where the range ends at most 1.2e-7 beyond it."""
    for count in range(1, 256):
        step = np.float32(_step_within(limit, count))
        assert step * np.float32(count) <= np.float32(limit)
        assert step * count == pytest.approx(limit, rel=1e-6)


def test_recipe_takes_it_as_the_int8_stage_and_wants_it_last() -> None:
    recipe = load_recipe("qat")
    assert isinstance(recipe.quantize_stage, QatStage)
    assert recipe.quantize_stage.id == "int8_trained"
    with pytest.raises(ConfigurationError, match="qat must be the last stage"):
        load_recipe("qat", ["stages.dense.kind=qat"])


FAST = (
    "model.name=resnet8",
    "model.arguments.width=8",
    "model.preprocessing.input_size=8",
    "stages.dense.epochs=3",
    "stages.int8_trained.epochs=1",
    "stages.int8_trained.warmup_epochs=0",
    "stages.int8_trained.calibration.samples=64",
    "stages.int8_trained.placement=full",
    "gates.max_accuracy_drop=0.2",
    "gates.int8_min_top1_agreement=0.8",
)


LABELS = torch.zeros(1000, dtype=torch.long)


def _logits(right: Tensor, *, margin: float | Tensor = 1.0) -> Tensor:
    """Of two classes, the first of which is the label; bool [N] to [N, 2]."""
    return torch.stack([torch.where(right, 1.0, -1.0) * margin, torch.zeros(len(right))], dim=1)


def _first(count: int) -> Tensor:
    return torch.arange(len(LABELS)) < count


@pytest.mark.parametrize(
    ("right", "margin", "helped"),
    [
        (_first(901), 1.0, False),  # one image more of a thousand, and an error as large
        (_first(910), 1.0, True),  # ten won, none lost
        (_first(912) & ~_first(6), 1.0, False),  # six more, as the next, but by losing six and winning twelve
        (_first(906), 1.0, True),
        (_first(901), 1.2, True),  # each image that is right is more surely so
        (_first(899), 1.2, False),  # no score is worth an image
        (_first(901), 0.8, False),
        (_first(900), 1.0, False),  # nothing has changed
    ],
)
def test_what_was_trained_is_kept_only_where_it_helped(right: Tensor, margin: float, helped: bool) -> None:
    verdict, summary, facts = _compare(_logits(_first(900)), _logits(right, margin=margin), LABELS)
    assert verdict == facts["kept_trained"] == helped
    assert summary.startswith(
        "quantization-aware training "
        + ("helped: val " if helped else "did not help beyond chance, so the post-training int8 model is kept: val ")
    )
    assert facts["val_accuracy"] == pytest.approx(float(right.double().mean()))


def test_the_best_of_several_epochs_needs_more() -> None:
    six_won = _logits(_first(906))
    assert _compare(_logits(_first(900)), six_won, LABELS)[0]
    assert not _compare(_logits(_first(900)), six_won, LABELS, tries=10)[0]


def test_training_by_chance_is_kept_at_the_stated_rate() -> None:
    """A model beside one that differs from it by noise: kept in 5 % of trials at most, as the two tests promise."""
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(400):
        base = torch.randn(300, 5, generator=generator)
        labels = (base + torch.randn(300, 5, generator=generator)).argmax(dim=1)
        before, after = (base + 0.3 * torch.randn(300, 5, generator=generator) for _ in range(2))
        kept += _compare(before, after, labels)[0]
    assert 0 < kept <= 28  # 5 % and two standard deviations; with the better of the two it would be half


def test_a_model_that_only_grew_surer_of_itself_is_seldom_kept() -> None:
    """Too unsure before, as much too sure after: most images gain a little, few lose much, and the mean is the same."""
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(1000):
        logits = 8 * torch.randn(300, 10, generator=generator)
        labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
        kept += _compare(0.8 * logits, 1.28 * logits, labels)[0]
    assert 0 < kept <= 50  # by cross-entropy more


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_stage_through_apply_resume_and_export_for_two_schemes(tmp_path: Path) -> None:
    output = tmp_path / "run"
    overrides = [*FAST, "stages.int8_trained.teacher.stage=dense"]
    outcome = pipeline.apply("qat", overrides=overrides, output=output, resume=False)
    stage = outcome.manifest["stages"][-1]
    assert stage["status"] == "complete"
    assert stage["summary"].startswith("quantization-aware training ")
    assert stage["qat"]["kept_trained"] == ("did not help" not in stage["summary"])
    assert stage["qat"]["val_accuracy"] > 0.5
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines].count("int8_trained") == 1
    again = pipeline.apply("qat", overrides=overrides, output=output, resume=True)
    assert again.manifest["stages"][-1]["seconds"] == stage["seconds"], "a complete stage is kept"
    for target, folder in (("x86", output / "export"), ("rpi4", output / "export" / "rpi4")):
        pipeline.export(output, target=target, int8=True)
        parity = _json(folder / "parity.json")
        assert parity["onnx_int8"]["op_counts"]["QLinearConv"] == 9
        assert parity["onnx_int8"]["torch_int8_top1_agreement"] > 0.98
    assert parity["onnx_int8"]["scheme"]["activations"] == "int8"
    retrained = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["scheme"]["activations"] for line in retrained if "scheme" in line][-1] == "int8"


@pytest.mark.slow
def test_where_it_is_worse_post_training_is_kept_and_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = [
        "stages.int8_trained.optimizer=sgd",
        "stages.int8_trained.learning_rate=3",
        "stages.int8_trained.momentum=0",
    ]
    outcome = pipeline.apply("qat", overrides=[*FAST, *wild], output=tmp_path / "run", resume=False)
    stage = outcome.manifest["stages"][-1]
    assert stage["qat"]["kept_trained"] is False
    assert stage["summary"].startswith("quantization-aware training did not help beyond chance, so the post-training")
    assert stage["accuracy"] > 0.5
    assert "did not help" in capsys.readouterr().err


@pytest.mark.slow
def test_it_wins_back_what_poor_ranges_lost(tmp_path: Path) -> None:
    poor = [
        "stages.int8_trained.calibration.method=percentile",
        "stages.int8_trained.calibration.percentile=80",
        "stages.int8_trained.epochs=2",
        "gates.max_accuracy_drop=1",
    ]
    outcome = pipeline.apply("qat", overrides=[*FAST, *poor], output=tmp_path / "run", resume=False)
    found = outcome.manifest["stages"][-1]["qat"]
    assert found["kept_trained"] is True
    assert found["val_accuracy"] > found["val_accuracy_post_training"]
    assert found["val_brier_score"] < found["val_brier_score_post_training"]
    assert outcome.manifest["stages"][-1]["accuracy"] > 0.9  # 0.88 after calibration
