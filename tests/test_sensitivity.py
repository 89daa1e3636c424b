"""A layer that int8 ruins is found, alone and by its return to float; the command prints and writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import CommandLine
from edgecompress.int8.mixed import MixedModel
from edgecompress.int8.sensitivity import measure_sensitivity, noise_alone
from int8_models import Residual, images, quantized, seeded


def ruined() -> nn.Module:
    """Residual, with one channel of its last hidden layer a thousand times larger than the head wants it."""
    module = seeded(Residual())
    assert isinstance(module, Residual)
    with torch.no_grad():
        module.hidden.weight[0] *= 1000
        module.hidden.bias[0] *= 1000
        module.head.weight[:, 0] /= 1000
    return module


def test_the_ruined_layer_comes_first_and_its_return_to_float_mends_it() -> None:
    mixed = MixedModel(quantized(ruined()))
    found = measure_sensitivity(mixed, images(24, seed=5))
    assert [row.layer for row in found.layers] == ["conv", "depthwise", "project", "hidden", "head"]
    assert {row.layer for row in found.worst_first()[:2]} == {"hidden", "head"}  # they share the tensor that is ruined
    worst, best = found.worst_first()[0], found.worst_first()[-1]
    assert worst.alone_sqnr_db < best.alone_sqnr_db - 10
    assert worst.alone_sqnr_db == pytest.approx(found.full_sqnr_db, abs=3)
    assert noise_alone(mixed, images(24, seed=5)) == {row.layer: row.alone_noise for row in found.layers}


def test_known_rows_are_not_measured_again() -> None:
    mixed = MixedModel(quantized(seeded(Residual())))
    some = images(8, seed=5)
    first = measure_sensitivity(mixed, some)
    measured: list[str] = []
    known = {row.layer: row for row in first.layers if row.layer != "project"}
    again = measure_sensitivity(mixed, some, known=known, on_row=lambda row: measured.append(row.layer))
    assert measured == ["project"]
    assert again.layers == first.layers


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(command_line: CommandLine, tmp_path: Path) -> None:
    settings = ("--set", "model.name=student_cnn", "--set", "stages.int8.effort=fast")
    placement = ("--set", "stages.int8.placement=full", "--set", "stages.int8.calibration.samples=32")
    made = command_line("apply", "int8_ptq", *settings, *placement, "--output", tmp_path / "run", "--no-gate")
    assert made.exit_code == 0, made.stderr
    answer = command_line("sensitivity", tmp_path / "run", "--what", "int8", "--images", "8", "--json")
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["images"] == 8
    assert document == json.loads((tmp_path / "run/stages/int8/sensitivity.json").read_text())
    assert document["worst_first"][0] == max(document["layers"], key=lambda row: row["alone_noise"])["layer"]
    shown = command_line("sensitivity", tmp_path / "run", "--what", "int8", "--images", "8")
    assert document["worst_first"][0][:12] in shown.stdout
    assert command_line("sensitivity", tmp_path / "none").exit_code == 2
