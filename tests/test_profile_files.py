"""Any ONNX files side by side: names, inputs, one document, and refusals that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from conftest import CommandLine
from edgecompress import machine
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ModelError
from edgecompress.exporting.preprocessing_graph import PIXEL_FORM
from edgecompress.measure import explanation, profiling
from edgecompress.measure.explanation import LATENCY_ALONE, Depth
from edgecompress.measure.latencies import FreshMeasurement, LatencyMeasurement
from edgecompress.measure.measure_worker import feeds
from edgecompress.measure.model_files import name_files, open_files, parse_shapes
from edgecompress.reporting.profile_text import budget_lines, files_table
from edgecompress.settings.target import Target
from edgecompress.steps.profile_files import profile_files
from onnx_models import quantized, residual_net, residual_net_macs, save

needs_target = pytest.mark.skipif(
    machine.architecture() not in ("x86_64", "aarch64"), reason="no target has this architecture"
)


def here(**changes: Any) -> Target:
    return Target.model_validate({"name": "here", "architecture": machine.architecture(), **changes})


def invented(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> None:
    """Latencies that are known, so that ratios and budgets are."""

    def latency(paths: dict[str, Path], **_: object) -> LatencyMeasurement:
        windows = {name: [[np.full(3, milliseconds[name])] * 4] * 5 for name in paths}
        return LatencyMeasurement(windows, [np.ones(4)] * 5, 5, 1.0, "narrow enough")

    fresh = FreshMeasurement(
        load_ms=9.0,
        load_ms_range=(8.0, 10.0),
        first_inference_ms=1.0,
        first_inference_ms_range=(1.0, 1.0),
        cold_start_ms=10.0,
        cold_start_ms_range=(9.0, 11.0),
        peak_rss_bytes=90_000_000,
        peak_rss_bytes_range=(90_000_000, 90_000_000),
        rss_before_load_bytes=60_000_000,
        processes=3,
    )
    monkeypatch.setattr(profiling, "measure_latency", latency)
    monkeypatch.setattr(profiling, "measure_fresh", lambda *_, **__: fresh)


def test_names_tell_files_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx", tmp_path / "b" / "model.int8.onnx"]
    assert list(name_files(paths)) == ["a/model", "b/model", "model.int8"]
    assert list(name_files([paths[0], paths[0]])) == ["model", "model#2"]


@needs_target
def test_every_file_has_the_same_keys_and_is_compared_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp32 = residual_net(tmp_path / "net.onnx", 16, 32)
    int8 = quantized(fp32, tmp_path / "net.int8.onnx", size=32)
    invented(monkeypatch, {"net": 6.0, "net.int8": 2.0})
    target = here(budgets={"latency_ms_p90": 3.0, "peak_rss_bytes": 95_000_000, "size_bytes": 1_000_000})
    document = profile_files([fp32, int8], target=target, seconds=1.0, depth=LATENCY_ALONE)
    assert json.loads(json.dumps(document)) == document
    assert document["reference"] == "net"
    assert document["ratios"] == {"net.int8": {"ratio": pytest.approx(3.0), "ci95": pytest.approx([3.0, 3.0])}}
    first, second = document["models"].values()
    assert set(first) == set(second)
    assert [first["macs"], second["macs"]] == [sum(residual_net_macs(16, 32).values())] * 2
    assert [first["int8_mac_coverage"], second["int8_mac_coverage"]] == [0.0, 1.0]
    assert first["model_rss_bytes"] == 30_000_000
    assert first["inputs"][0]["shape"] == [1, 3, 32, 32]
    assert {name: budget["status"] for name, budget in document["budgets"].items()} == {
        "net": "missed",
        "net.int8": "met",
    }
    assert document["missed"] == [reason for reason in document["budgets"]["net"]["reasons"] if "6 ms" in reason]
    assert "verdict" not in document  # nobody knows whether a bare file is right
    assert files_table(document).row_count >= 8
    assert "  net: MISSED" in budget_lines(document)


@needs_target
def test_a_fixed_batch_counts_all_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("Relu", ["input"], ["logits"])]
    four = save(tmp_path / "four.onnx", nodes, [], [4, 3, 8, 8])
    invented(monkeypatch, {"four": 2.0})
    document = profile_files([four], target=here(), seconds=1.0, depth=LATENCY_ALONE)
    model = document["models"]["four"]
    assert (model["batch"], model["batch_is_fixed"]) == (4, True)
    assert model["throughput_per_s"] == pytest.approx(2000.0)
    assert document["method"]["batch"] == 4
    assert any("4 images at a time" in note for note in document["notes"])
    invented(monkeypatch, {"four": 2.0, "net": 2.0})
    both = [four, residual_net(tmp_path / "net.onnx")]
    assert profile_files(both, target=here(), seconds=1.0, depth=LATENCY_ALONE)["method"]["batch"] == {
        "four": 4,
        "net": 1,
    }


@needs_target
def test_the_images_that_a_throughput_counts_are_fed(tmp_path: Path) -> None:
    """A sweep of a real file in real processes: the net's work is its images', so that batches bring little."""
    free = residual_net(tmp_path / "net.onnx", 16, 64)
    depth = Depth(explains=False, sweeps=("batch",))
    document = profile_files([free], target=here(), seconds=0.3, depth=depth, thoroughness="quick")
    *_, row = document["scaling"]["net"]["batch"]
    assert row["batch"] >= 4
    assert row["gain"] < 0.75 * row["batch"]


def test_inputs_get_the_batch_that_is_asked_for_or_none_at_all(tmp_path: Path) -> None:
    free = residual_net(tmp_path / "free.onnx")
    four = save(tmp_path / "four.onnx", [helper.make_node("Relu", ["input"], ["logits"])], [], [4, 3, 8, 8])
    pixels = save(tmp_path / "pixels.onnx", [helper.make_node("Relu", ["input"], ["logits"])], [], ["N", "H", "W", 3])
    inside = Preprocessing(input_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    facts = {"edgecompress.input_form": PIXEL_FORM, "edgecompress.preprocessing": json.dumps(inside.to_dict())}
    model = onnx.load(pixels)
    helper.set_model_props(model, facts)
    onnx.save(model, pixels)
    files = open_files({path.stem: path for path in (free, four, pixels)}, {})
    given = open_files({"given": free}, {"input": [4, 3, 8, 8]})["given"]
    assert [file.batch for file in (*files.values(), given)] == [None, 4, None, 4]
    for file in (*files.values(), given):
        session = ort.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
        assert {len(feed["input"]) for feed in feeds(session, {"shapes": file.sizes})} == {file.images}
        if file.batch is None:
            assert {len(feed["input"]) for feed in feeds(session, {"batch": 8, "shapes": file.sizes})} == {8}
        else:
            with pytest.raises(ValueError, match="is fed 4 images at a time; a batch of 8 was asked for"):
                feeds(session, {"batch": 8, "shapes": file.sizes})


def _two_inputs(path: Path) -> Path:
    nodes = [
        helper.make_node("Cast", ["ids"], ["ids_float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "ids_float"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "L"]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "L"]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "L"])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def test_several_inputs_get_the_sizes_given(tmp_path: Path) -> None:
    path = _two_inputs(tmp_path / "two.onnx")
    with pytest.raises(ModelError, match=r"two\.onnx: input 'x' has free axes.*--shape x=SIZExSIZE"):
        open_files({"two": path}, {})
    file = open_files({"two": path}, parse_shapes(["x=1x5", "ids=1x5"]))["two"]
    assert [entry["shape"] for entry in file.inputs] == [[1, 5], [1, 5]]
    assert file.batch == 1  # given a size, the batch is no longer free
    with pytest.raises(ModelError, match="--shape z: no file has such an input; there are ids, x"):
        open_files({"two": path}, parse_shapes(["x=1x5", "ids=1x5", "z=1"]))


@pytest.mark.parametrize("text", ["input", "=1x3", "input=1xthree", "input=0x3", "input="])
def test_shapes_are_checked(text: str) -> None:
    with pytest.raises(ModelError, match="--shape"):
        parse_shapes([text])


def test_all_faults_are_named_at_once(tmp_path: Path, command_line: CommandLine) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    residual_net(tmp_path / "good.onnx")
    answer = command_line("profile", "good.onnx", "text.onnx", "empty.onnx", "absent.onnx", "--target", "x86")
    answer.refusal("text.onnx", "it is no ONNX file", "empty.onnx", "it is empty", "absent.onnx: no such file")
    answer = command_line("profile", "good.onnx", ".", "--target", "x86", "--json")
    assert "one run directory" in answer.json_refusal()
    command_line("profile", "good.onnx", "--target", "x86", "--sweep", "colours").refusal("--sweep colours", "threads")
    command_line("profile", "good.onnx", "--target", "x86", "--providers", "cuda").refusal(
        "--providers cuda", "xnnpack"
    )
    command_line("profile", "good.onnx", "--target", "x86", "--output", "no/file").refusal("--output no/file")


def test_other_targets_files_are_inspected_and_not_timed(tmp_path: Path, command_line: CommandLine) -> None:
    residual_net(tmp_path / "net.onnx")
    answer = command_line("profile", "net.onnx", "net.onnx", "--target", "rpi4", "--json", "--output", "kept.json")
    assert answer.exit_code == 0, answer
    document = json.loads(answer.stdout)
    assert document == json.loads((tmp_path / "kept.json").read_text())
    assert document["measured"] is False
    assert document["ratios"] == {"net#2": {"ratio": None, "ci95": None}}
    assert document["models"]["net"]["latency_ms"]["p50"] is None
    assert document["models"]["net"]["macs"] == sum(residual_net_macs().values())


@needs_target
@pytest.mark.slow
def test_the_whole_command_on_real_processes(tmp_path: Path, command_line: CommandLine) -> None:
    fp32 = residual_net(tmp_path / "net.onnx", 64, 32)
    quantized(fp32, tmp_path / "small.onnx", size=32)
    target = "x86" if machine.architecture() == "x86_64" else "arm64"
    asked = ["--target", target, "--seconds", "1", "--no-gate", "--json", "--providers", "all"]
    answer = command_line("profile", "net.onnx", "small.onnx", *asked)
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["ratios"]["small"]["ratio"] > 0
    for model in document["models"].values():
        assert sum(row["share"] for row in model["modules"]) == pytest.approx(1.0)
        assert sum(row["ms"] for row in model["operators"]) == pytest.approx(model["operators_ms"])
        assert model["arena_bytes"] > 0
        assert model["model_rss_bytes"] > 0
        assert (model["energy"]["joules_per_inference"] is None) == (model["energy"]["absent_because"] is not None)
    peaks = document["roofline"]["threads"]["1"]
    assert peaks["float_gmacs_per_s"] > 0
    for share in document["roofline"]["models"].values():
        assert 0 < share["share_of_peak"] < 1.5
    (row,) = [row for row in document["providers"]["rows"] if row["provider"] == "CPUExecutionProvider"]
    assert row["speedup"] == 1.0
    assert sum(row["nodes_by_provider"].values()) > 0
    for table in document["scaling"].values():
        assert [row["threads"] for row in table["threads"]][:1] == [1] or table["left_out"]


@needs_target
def test_what_cannot_be_explained_costs_a_note_and_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise explanation.ProfileError("the profiler is broken")

    for name in ("kernel_times", "measure_arena", "measure_energy", "measure_peaks", "sweep"):
        monkeypatch.setattr(explanation, name, fails)
    invented(monkeypatch, {"net": 6.0})
    document = profile_files(
        [residual_net(tmp_path / "net.onnx")], target=here(), seconds=1.0, depth=explanation.Depth()
    )
    assert document["models"]["net"]["modules"] is None
    assert document["models"]["net"]["arena_bytes"] is None
    assert document["roofline"] is None
    assert document["scaling"] == {"net": None}
    assert document["models"]["net"]["latency_ms"]["p50"] == pytest.approx(6.0)
    assert sum("the profiler is broken" in note for note in document["notes"]) == 5
