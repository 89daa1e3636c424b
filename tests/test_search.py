"""A whole search on the digits: real training, real files, real measuring; then one more trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import CommandLine
from edgecompress.commands.cli_schemas import read_schema
from edgecompress.models.checkpoint import example_input
from edgecompress.models.complexity import count_macs
from edgecompress.models.model_building import build
from edgecompress.run_directory import sha256_of
from edgecompress.searching.latency_table import LatencyTable, layer_shapes
from edgecompress.settings.target import load_target
from small_models import small_architecture

RECIPE = """
name: small
data: {name: digits}
model: {name: student_cnn, arguments: {width: 16}}
stages:
  - {id: dense, kind: train, epochs: 3, batch_size: 64}
  - {id: pruned, kind: prune, channel_ratio: {search: [0.2, 0.7]}, scope: layer, epochs: 2, warmup_epochs: 0,
     learning_rate: 0.02, teacher: {stage: dense}}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 32}}
gates: {int8_min_top1_agreement: 0.5}
"""


def _document(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "search.json").read_text()))


@pytest.mark.slow
def test_a_search_and_one_more_trial(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgecompress.stages import train_stages

    trained: list[str] = []
    real = train_stages.fit

    def counting(*arguments: Any, **named: Any) -> Any:
        trained.append(named["description"])
        return real(*arguments, **named)

    monkeypatch.setattr(train_stages, "fit", counting)
    (tmp_path / "small.yaml").write_text(RECIPE)
    target = (tmp_path / "x86.yaml").resolve()
    target.write_text("name: mine\narchitecture: x86_64\nbudgets: {min_int8_speedup: null}\n")
    how = ("--target", target, "--max-accuracy-drop", "0.5", "--output", "found", "--json")
    plan = json.loads(command_line("search", "small.yaml", *how, "--trials", "2", "--dry-run").stdout)
    assert not (tmp_path / "found").exists()
    assert not trained
    answer = command_line("search", "small.yaml", *how, "--trials", "2")
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert {key: document[key] for key in _document(tmp_path / "found")} == _document(tmp_path / "found")
    jsonschema.Draft202012Validator(read_schema("search")).validate(document)
    assert [trial["status"] for trial in document["trials"]] == ["complete", "complete"]
    # The machine may be busy in one of the two.
    assert 0.1 < plan["seconds"] / document["spent"]["seconds"] < 10
    assert trained.count("dense") == 1
    assert trained.count("pruned 1/1") == 2
    for row in document["front"]:
        run = tmp_path / "found" / row["run"]
        manifest = json.loads((run / "run.json").read_text())
        profile = json.loads((run / "profile" / "mine.json").read_text())
        assert manifest["status"] == "complete"
        assert row["latency_ms_p50"] == profile["models"]["int8"]["latency_ms"]["p50"]
        assert row["size_bytes"] == (run / "export" / "model.int8.onnx").stat().st_size
        assert (run / "report" / "mine.html").is_file()
        assert row["reported_accuracy"] == manifest["stages"][-1]["accuracy"]
    assert document["pick"] in [row["trial"] for row in document["front"]]
    thoroughness = {row["trial"]: row["thoroughness"] for row in document["front"]}
    assert thoroughness[document["pick"]] == "standard"
    before = {path: sha256_of(path) for path in (tmp_path / "found" / "trials").rglob("model.safetensors")}
    trained.clear()
    answer = command_line("search", "small.yaml", *how, "--trials", "3", "--resume")
    assert answer.exit_code == 0, answer.stderr
    assert trained == ["pruned 1/1"], "only what is new is computed"
    again = json.loads(answer.stdout)["trials"]
    assert [trial["settings"] for trial in again[:2]] == [trial["settings"] for trial in document["trials"]]
    assert {path: sha256_of(path) for path in before} == before
    assert command_line("verify", tmp_path / "found" / document["front"][0]["run"]).exit_code == 0


def test_layers_are_counted_as_everywhere_else() -> None:
    architecture = small_architecture("mobilenet_small")
    module, example = build(architecture).eval(), example_input(architecture, batch=1)
    layers = layer_shapes(module, example)
    assert sum(layer.macs for layer in layers) == count_macs(module, example)
    assert {layer.kind.partition(" ")[0] for layer in layers} >= {"convolution", "depthwise", "linear"}


@pytest.mark.slow
def test_the_table_foretells_wider_networks_slower(tmp_path: Path) -> None:
    table = LatencyTable.open(tmp_path / "layers.json", load_target("x86"))
    wide = small_architecture("student_cnn", width=64, size=16)
    assert table.predict_ms(layer_shapes(build(wide).eval(), example_input(wide, batch=1))) is None
    table.measure(wide)
    rows = dict(table.rows)
    again = LatencyTable.open(tmp_path / "layers.json", load_target("x86"))
    assert again.rows == rows
    again.measure(wide)
    assert again.rows == rows, "measured once"
    foretold = []
    for width in (16, 48, 64):
        narrow = small_architecture("student_cnn", width=width, size=16)
        foretold.append(again.predict_ms(layer_shapes(build(narrow).eval(), example_input(narrow, batch=1))))
    assert None not in foretold
    assert foretold[0] < foretold[1] < foretold[2]
    assert foretold[2] < 20
