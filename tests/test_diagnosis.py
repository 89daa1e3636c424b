"""Nets made to have one defect each: it is named with its numbers, a sound net is left alone, and the setting mends it.

"Mends" is measured: the net is quantized again with the setting that was named, and its logits are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CommandLine
from edgecompress.int8.causes import (
    ISLAND,
    NARROW_CHANNEL,
    NARROW_WEIGHTS,
    OUTLIER,
    SATURATION,
    SIXTEEN_BIT,
    UNFUSED,
    WEIGHTS,
    saturating_pairs,
)
from edgecompress.int8.diagnosis import Diagnosis, Findings, diagnose
from edgecompress.int8.grids import observe_grids
from edgecompress.int8.mixed import MixedModel
from edgecompress.int8.scheme import Scheme
from edgecompress.int8.sensitivity import measure_sensitivity
from edgecompress.settings.target import load_target
from edgecompress.steps.debug_run import adds_in_16_bits, debug_text
from int8_models import CLASSES, conv, images, quantized, seeded, stage

EIGHT_BITS = Scheme("uint8", 8)


class Plain(nn.Module):
    """Two convolutions with an activation each, a mean and a linear head."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.first, self.second, self.activation = conv(3, 16), conv(16, 16), activation()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.second(self.activation(self.first(x)))).mean((2, 3)))


def plain(activation: type[nn.Module] = nn.ReLU) -> Plain:
    module = seeded(Plain(activation))
    assert isinstance(module, Plain)
    return module


def found(
    module: nn.Module,
    *,
    scheme: Scheme = EIGHT_BITS,
    samples: Tensor | None = None,
    held_out: Tensor | None = None,
    saturates: bool = False,
    **settings: Any,
) -> Findings:
    """Quantize on `samples`, diagnose all layers on `held_out`."""
    asked = images(32, seed=5) if held_out is None else held_out
    mixed = MixedModel(quantized(module, scheme=scheme, samples=samples, **settings))
    sensitivity = measure_sensitivity(mixed, asked)
    batches = torch.split(images() if samples is None else samples, 16)
    return diagnose(mixed, asked, sensitivity, calibration=batches, stage=stage(**settings), saturates=saturates)


def full_db(
    module: nn.Module,
    *,
    scheme: Scheme = EIGHT_BITS,
    samples: Tensor | None = None,
    held_out: Tensor | None = None,
    **settings: Any,
) -> float:
    """SQNR of full int8 under these settings."""
    asked = images(32, seed=5) if held_out is None else held_out
    return measure_sensitivity(
        MixedModel(quantized(module, scheme=scheme, samples=samples, **settings)), asked
    ).full_sqnr_db


def layer(findings: Findings, name: str) -> Diagnosis:
    return next(row for row in findings.layers if row.layer == name)


def kinds(findings: Findings) -> set[str]:
    return {cause.kind for row in findings.layers for cause in row.causes} | {cause.kind for cause in findings.model}


def spiked(count: int, *, seed: int, height: float) -> Tensor:
    """Images of which the first has a pixel that is far brighter than all others."""
    batch = images(count, seed=seed)
    batch[0, :, 0, 0] = height
    return batch


def test_a_sound_net_has_no_causes() -> None:
    findings = found(plain(), saturates=True, scheme=Scheme("uint8", 7), effort="balanced")
    assert kinds(findings) == set()
    assert [sum(row.parts.values()) for row in findings.layers] == pytest.approx([1.0] * 3)
    text = "\n".join(debug_text(document(findings)))
    assert text.count("nothing wrong") == 3


def document(findings: Findings, sqnr_db: float = 40.0) -> dict[str, Any]:
    facts = {"images": 32, "layers_in_int8": 3, "full": {"sqnr_db": sqnr_db, "agreement": 1.0}}
    return facts | json.loads(json.dumps(findings.to_dict()))


def test_one_spike_in_the_calibration_images_is_a_range_outlier_that_another_method_mends() -> None:
    samples = spiked(512, seed=0, height=80.0)
    findings = found(plain(), samples=samples)
    assert kinds(findings) == {OUTLIER}
    (cause, *_) = layer(findings, "first").causes
    assert cause.numbers["range"][1] == pytest.approx(80.0, rel=0.02)
    assert cause.numbers["seen"][1] < 10
    assert "calibration met rare values" in cause.words
    assert cause.setting == "calibration.method: percentile, calibration.percentile: 99.9"  # 99.99 leaves 3 dB less
    before = full_db(plain(), samples=samples)
    after = full_db(plain(), samples=samples, method="percentile", percentile=99.9)
    assert after > before + 6
    assert cause.full_sqnr_db == pytest.approx(after, abs=1)


def test_an_odd_image_that_no_method_leaves_out_is_named_as_such() -> None:
    samples = images(64)
    samples[0] *= 40
    cause = layer(found(plain(), samples=samples), "first").causes[0]
    assert cause.kind == OUTLIER
    assert cause.setting.startswith("leave the odd images out of train")


def test_a_spike_that_also_meets_held_out_images_names_the_bulk() -> None:
    samples, asked = spiked(64, seed=0, height=400.0), spiked(32, seed=5, height=400.0)
    findings = found(plain(), samples=samples, held_out=asked)
    causes = [cause for row in findings.layers for cause in row.causes if cause.kind == OUTLIER]
    assert causes
    widest = max(causes, key=lambda cause: float(cause.numbers["outlier_ratio"]))
    assert widest.numbers["outlier_ratio"] > 2
    assert "% lie in" in widest.words


def test_a_clipping_percentile_is_saturation_and_the_method_named_mends_it() -> None:
    findings = found(plain(), method="percentile", percentile=90.0)
    assert kinds(findings) == {SATURATION}
    cause = layer(findings, "first").causes[0]
    assert 0.03 < cause.numbers["clipped_share"] < 0.15
    method, _, percentile = cause.setting.removeprefix("calibration.method: ").partition(", calibration.percentile: ")
    named = {"method": method, **({"percentile": float(percentile)} if percentile else {})}
    assert named != {"method": "percentile", "percentile": 90.0}
    before, after = full_db(plain(), method="percentile", percentile=90.0), full_db(plain(), **named)
    assert after > before + 10
    assert cause.full_sqnr_db == pytest.approx(after, abs=2)


def test_ranges_of_too_few_images_ask_for_more_of_them() -> None:
    samples = images(64) * torch.linspace(0.02, 0.1, 64).view(-1, 1, 1, 1)
    findings = found(plain(), samples=samples, method="mse")
    settings = {cause.setting.partition(":")[0] for row in findings.layers for cause in row.causes}
    assert kinds(findings) == {SATURATION}
    assert settings == {"calibration.samples"}
    assert full_db(plain(), method="mse") > full_db(plain(), samples=samples, method="mse") + 10


def narrowed() -> Plain:
    """Four of the first layer's 16 channels are 200 times larger than the second layer wants them."""
    module = plain()
    with torch.no_grad():
        module.first.weight[:4] *= 200
        assert module.first.bias is not None
        module.first.bias[:4] *= 200
        module.second.weight[:, :4] /= 200
    return module


def test_narrow_channels_are_counted_and_the_layers_around_them_mend_it_in_float() -> None:
    findings = found(narrowed())
    (cause,) = layer(findings, "first").causes
    assert cause.kind == NARROW_CHANNEL
    assert (cause.numbers["narrow"], cause.numbers["channels"]) == (12, 16)
    assert cause.setting == "exclude: [first, second]"  # one alone would leave the tensor rounded
    before, after = full_db(narrowed()), full_db(narrowed(), exclude=("first", "second"))
    assert before < 10
    assert after > before + 30
    assert cause.full_sqnr_db == pytest.approx(after, abs=0.01)
    assert full_db(narrowed(), exclude=("first",)) < before + 20


def test_narrow_input_channels_of_weights_are_counted() -> None:
    cause = next(cause for cause in layer(found(narrowed()), "second").causes if cause.kind == NARROW_WEIGHTS)
    assert cause.numbers["narrow"] == 4
    assert cause.setting == "effort: balanced"


def test_plain_rounding_of_seven_bits_is_mended_by_effort() -> None:
    seven = Scheme("uint8", 7)
    findings = found(plain(), scheme=seven)
    (cause,) = layer(findings, "second").causes
    assert (cause.kind, cause.setting) == (WEIGHTS, "effort: balanced")
    assert cause.numbers["gain_db"] > 6
    assert full_db(plain(), scheme=seven, effort="balanced") > full_db(plain(), scheme=seven) + 3


@pytest.mark.parametrize(("activation", "name"), [(nn.GELU, "gelu"), (nn.Tanh, "tanh"), (nn.Softplus, "softplus")])
def test_an_activation_without_an_integer_kernel_is_named_with_its_layers(
    activation: type[nn.Module], name: str
) -> None:
    (cause,) = found(plain(activation)).model
    assert (cause.kind, cause.numbers["operator"]) == (UNFUSED, name)
    assert cause.numbers["behind"] == ["first", "second"]
    assert "another activation" in cause.setting


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU])
def test_an_activation_with_an_integer_kernel_is_not(activation: type[nn.Module]) -> None:
    assert found(plain(activation)).model == ()


def test_another_operator_in_float_is_an_island() -> None:
    class Normed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.activation(self.first(x))
            return self.head(self.activation(self.second(x.cumsum(2) / 4)).mean((2, 3)))

    causes = found(seeded(Normed()), placement="full").model
    assert {cause.kind for cause in causes} == {ISLAND}
    assert causes[0].numbers["behind"] == ["activation"]
    assert "placement: auto" in causes[0].setting


def test_16_bit_sums_are_named_for_8_bit_weights_on_such_a_target_only() -> None:
    (cause,) = found(plain(), saturates=True).model
    assert (cause.kind, cause.setting) == (SIXTEEN_BIT, "scheme.weight_bits: 7")
    assert set(cause.numbers["channel_shares"]) <= {"first", "second", "head"}
    assert found(plain(), saturates=False).model == ()
    assert found(plain(), saturates=True, scheme=Scheme("uint8", 7)).model == ()


def test_pairs_saturate_where_two_products_leave_16_bits() -> None:
    rows = torch.tensor([[127, 2, 0], [127, -127, 127], [64, 64, 0], [0, -120, -120]], dtype=torch.int8)
    # 255 * 129 > 32767; opposite signs cancel and 127 alone fits; 255 * 128 = 32640 fits; neighbours 2 and 3 don't pair
    assert saturating_pairs(rows) == 0.25
    assert saturating_pairs(torch.full((1, 2, 1, 1), -65, dtype=torch.int8)) == 1.0
    channels_last = torch.tensor([127, 0, 0, 127], dtype=torch.int8).view(1, 2, 1, 2)  # pairs (127, 0), (0, 127)
    assert saturating_pairs(channels_last) == 0.0


def test_which_targets_add_in_16_bits() -> None:
    assert adds_in_16_bits(load_target("x86-avx2"))
    assert not adds_in_16_bits(load_target("x86-vnni"))
    assert not adds_in_16_bits(load_target("rpi4"))


def test_grids_hold_what_the_float_values_do() -> None:
    mixed = MixedModel(quantized(plain(), scheme=EIGHT_BITS))
    asked = images(20, seed=5) * 2
    grid = next(grid for grid in observe_grids(mixed, asked, [images()]) if grid.sources == {"x"})
    low, high = grid.range
    outside = ((asked < low - grid.scale / 2) | (asked > high + grid.scale / 2)).double().mean()
    assert grid.clipped_share == pytest.approx(float(outside))
    assert grid.clipped_share > 0
    assert grid.seen == (pytest.approx(float(asked.min())), pytest.approx(float(asked.max())))
    span = asked.amax((0, 2, 3)).clamp(max=high) - asked.amin((0, 2, 3)).clamp(min=low)
    torch.testing.assert_close(grid.steps(), span / grid.scale)
    assert grid.range_by("minmax") == pytest.approx(grid.range, rel=0.01)  # as it was calibrated
    assert grid.range_seen_by("minmax") == grid.seen
    bulk_low, bulk_high = grid.bulk
    inside = ((asked >= bulk_low) & (asked <= bulk_high)).double().mean()
    assert float(inside) == pytest.approx(0.999, abs=0.001)


@pytest.mark.slow
def test_the_command_prints_and_writes_what_it_found(command_line: CommandLine, tmp_path: Path) -> None:
    settings = ("--set", "model.name=student_cnn", "--set", "stages.int8.effort=fast")
    clipping = ("--set", "stages.int8.calibration.method=percentile", "--set", "stages.int8.calibration.percentile=80")
    placement = ("--set", "stages.int8.placement=full", "--set", "stages.int8.calibration.samples=32")
    run = tmp_path / "run"
    made = command_line("apply", "int8_ptq", *settings, *clipping, *placement, "--output", run, "--no-gate")
    assert made.exit_code == 0, made.stderr
    answer = command_line("debug-int8", run, "--images", "8", "--worst", "2", "--json")
    assert answer.exit_code == 0, answer.stderr
    written = json.loads((run / "stages/int8/debug.json").read_text())
    assert json.loads(answer.stdout) == written
    assert len(written["layers"]) == 2
    assert SATURATION in {cause["kind"] for row in written["layers"] for cause in row["causes"]}
    assert written["exported"] is None
    assert command_line("export", run, "--int8", "--no-gate").exit_code == 0
    shown = command_line("debug-int8", run, "--images", "8", "--worst", "2", "--quiet")
    assert shown.exit_code == 0
    assert f"1. {written['layers'][0]['layer']}: " in shown.stdout
    assert "     set: calibration.method: " in shown.stdout
    assert "export/model.int8.onnx in ONNX Runtime: " in shown.stdout
    assert command_line("debug-int8", tmp_path / "none").exit_code == 2
