"""The main line, end to end, on the embedded digits with small settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.torch import save_file

from edgecompress import pipeline
from edgecompress.errors import PruningError, RunError, TrainingError
from edgecompress.models.model_building import build
from edgecompress.run_directory import sha256_of
from small_models import small_architecture

pytestmark = pytest.mark.slow

FAST = (
    "model.arguments.width=16",
    "stages.dense.epochs=3",
    "stages.pruned.epochs=2",
    "stages.pruned.epochs_between=1",
    "stages.int8.calibration.samples=64",
    "gates.max_accuracy_drop=0.2",
    "gates.int8_min_top1_agreement=0.9",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """One run of prune_kd for the machine at hand and for a board that is not here."""
    output = tmp_path_factory.mktemp("runs") / "run"
    return pipeline.run(
        "prune_kd", targets=["x86", "rpi4"], overrides=FAST, output=output, seconds=2.0, command="edgecompress run"
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_run_directory_is_as_promised(finished: pipeline.Outcome) -> None:
    run = finished.run
    for name in (
        "run.json",
        "metrics.jsonl",
        "stages/dense/model.safetensors",
        "stages/pruned/model.json",
        "stages/int8/result.json",
        "export/model.onnx",
        "export/model.int8.onnx",
        "export/parity.json",
        "export/rpi4/model.int8.onnx",
        "export/rpi4/parity.json",
        "profile/x86.json",
        "profile/rpi4.json",
        "report/x86.html",
        "report/rpi4.md",
    ):
        assert (run.path / name).stat().st_size > 0, name
    assert not [path for path in run.path.rglob(".*") if path.is_file()], "temporary files were left"


def test_the_manifest_says_what_happened(finished: pipeline.Outcome) -> None:
    manifest = _json(finished.run.manifest_path)
    assert manifest["status"] == "complete"
    assert [stage["id"] for stage in manifest["stages"]] == ["dense", "pruned", "int8"]
    dense, pruned, int8 = manifest["stages"]
    for stage in manifest["stages"]:
        assert stage["status"] == "complete"
        assert stage["accuracy"] > 0.5
        assert stage["accuracy_split"] == "test"
        assert stage["seconds"] > 0
    assert pruned["macs"] < 0.5 * dense["macs"]
    assert pruned["params"] < 0.5 * dense["params"]
    assert int8["calibration_samples"] == 64
    assert int8["calibration"]["tensors"] > 5
    assert int8["calibration"]["is_narrow"] is False
    assert int8["size_bytes"] < 0.5 * pruned["size_bytes"]
    assert manifest["baseline"]["id"] == "dense"
    assert {decision["what"] for decision in manifest["decisions"]} >= {
        "int8_scheme:x86",
        "int8_scheme:rpi4",
        "placement",
    }
    for name, digest in manifest["artifacts"].items():
        if not name.startswith("report/"):
            assert sha256_of(finished.run.path / name) == digest, name


def test_metrics_hold_one_line_an_epoch(finished: pipeline.Outcome) -> None:
    lines = [json.loads(line) for line in (finished.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines].count("dense") == 3
    assert all(0 <= line["val_accuracy"] <= 1 for line in lines)


def test_parity_holds_and_int8_runs_on_integers(finished: pipeline.Outcome) -> None:
    parity = _json(finished.run.path / "export" / "parity.json")
    assert parity["samples"] == 359
    assert parity["onnx_fp32"]["passed"]
    assert parity["onnx_fp32"]["max_abs_diff"] < 1e-3
    assert parity["onnx_fp32"]["top1_agreement"] == 1.0
    int8 = parity["onnx_int8"]
    assert int8["int8_mac_coverage"] >= 0.9
    assert int8["op_counts"]["QLinearConv"] == 9
    assert int8["op_counts"]["QGemm"] == 1
    assert int8["top1_agreement"] > 0.9
    assert int8["torch_int8_top1_agreement"] == 1.0
    assert int8["sqnr_db"] > 15
    assert sum(row["samples"] for row in parity["classes"]) == 359


def test_another_target_gets_its_own_scheme(finished: pipeline.Outcome) -> None:
    parity = _json(finished.run.path / "export" / "rpi4" / "parity.json")
    assert parity["onnx_int8"]["scheme"] == {"activations": "int8", "weights": "int8", "weight_bits": 8}
    assert parity["onnx_int8"]["int8_mac_coverage"] == 1.0  # counted as Arm builds fuse


def test_a_board_that_is_not_here_gets_no_invented_latency(finished: pipeline.Outcome) -> None:
    profile = _json(finished.run.path / "profile" / "rpi4.json")
    assert profile["measured"] is False
    assert profile["verdict"] != "ship"
    assert profile["models"]["int8"]["latency_ms"]["p50"] is None
    assert profile["models"]["int8"]["size_bytes"] > 0


def test_the_files_take_any_batch_and_carry_their_preprocessing(finished: pipeline.Outcome) -> None:
    for name in ("model.onnx", "model.int8.onnx"):
        session = onnxruntime.InferenceSession(finished.run.path / "export" / name, providers=["CPUExecutionProvider"])
        for count in (1, 5):
            logits = session.run(["logits"], {"input": np.zeros((count, 1, 16, 16), np.float32)})[0]
            assert logits.shape == (count, 10)
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["edgecompress.preprocessing"])["input_size"] == 16
        assert len(json.loads(metadata["edgecompress.labels"])) == 10


def test_a_complete_run_is_a_no_op(finished: pipeline.Outcome) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.run.path.rglob("*") if path.is_file()}
    again = pipeline.run(
        "prune_kd", targets=["x86", "rpi4"], overrides=FAST, output=finished.run.path, resume=True, seconds=2.0
    )
    assert again.manifest["status"] == "complete"
    assert before == {path: path.stat().st_mtime_ns for path in finished.run.path.rglob("*") if path.is_file()}


def test_an_existing_run_is_not_overwritten(finished: pipeline.Outcome) -> None:
    with pytest.raises(RunError, match="--resume"):
        pipeline.run("prune_kd", targets=["x86"], overrides=FAST, output=finished.run.path)
    with pytest.raises(RunError, match=r"seed: 0 there, 7 now"):
        pipeline.run("prune_kd", targets=["x86"], overrides=[*FAST, "seed=7"], output=finished.run.path, resume=True)


def _checkpoint_recipe(folder: Path, stages: str) -> Path:
    """A recipe for a given model, so that nothing has to be trained first."""
    save_file(build(small_architecture(width=8, size=8)).state_dict(), folder / "weights.safetensors")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "data: {name: digits}\n"
        f"model: {{name: resnet8, arguments: {{width: 8}}, checkpoint: {folder}/weights.safetensors}}\n"
        f"stages:\n{stages}"
    )
    return recipe


def test_a_failed_stage_keeps_what_was_done_and_resume_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (
        "  - {id: first, kind: train, epochs: 1, warmup_epochs: 0}\n"
        "  - {id: second, kind: train, epochs: 1, warmup_epochs: 0}\n"
    )
    recipe, output = _checkpoint_recipe(tmp_path, stages), tmp_path / "run"
    real = pipeline.apply_recipe.__globals__["run_stage"]

    def failing(stage: Any, *arguments: Any) -> Any:
        if stage.id == "second":
            raise TrainingError("second: the loss is not finite")
        return real(stage, *arguments)

    monkeypatch.setitem(pipeline.apply_recipe.__globals__, "run_stage", failing)
    with pytest.raises(TrainingError):
        pipeline.apply(str(recipe), output=output)
    manifest = _json(output / "run.json")
    assert manifest["status"] == "failed"
    assert [stage["status"] for stage in manifest["stages"]] == ["complete", "failed", "pending"]
    kept = sha256_of(output / "stages" / "first" / "model.safetensors")
    monkeypatch.undo()
    outcome = pipeline.apply(str(recipe), output=output, resume=True)
    assert outcome.manifest["status"] == "complete"
    assert sha256_of(output / "stages" / "first" / "model.safetensors") == kept


def test_pruning_that_removes_nothing_is_an_error(tmp_path: Path) -> None:
    stages = "  - {id: pruned, kind: prune, channel_ratio: 0.01, channel_multiple: 64, epochs: 1, warmup_epochs: 0}\n"
    recipe = _checkpoint_recipe(tmp_path, stages)
    with pytest.raises(PruningError, match="nothing was pruned"):
        pipeline.apply(str(recipe), output=tmp_path / "run")


def test_random_weights_are_said_first_and_miss_a_gate(tmp_path: Path) -> None:
    outcome = pipeline.apply(
        "int8_ptq", overrides=["model.name=student_cnn", "stages.int8.effort=fast"], output=tmp_path / "run"
    )
    assert outcome.manifest["notes"][0].startswith("The model has random weights")
    assert any("random weights" in text for text in outcome.missed)


def test_unstructured_sparsity_survives_to_the_stage_and_is_reported(tmp_path: Path) -> None:
    stages = (
        "  - {id: pruned, kind: prune, method: unstructured, sparsity: 0.6, steps: 2, epochs: 1, warmup_epochs: 0}\n"
    )
    outcome = pipeline.apply(str(_checkpoint_recipe(tmp_path, stages)), output=tmp_path / "run")
    entry = outcome.manifest["stages"][0]
    assert entry["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert "no speed" in entry["summary"]
    assert outcome.manifest["stages"][1]["id"] == "int8"


def test_zeros_reach_int8_and_a_stage_that_loses_them_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = "  - {id: pruned, kind: prune, method: unstructured, sparsity: 0.6, epochs: 1, warmup_epochs: 0}\n"
    int8 = "  - {id: int8, kind: quantize, placement: full, calibration: {samples: 32}}\n"
    outcome = pipeline.apply(str(_checkpoint_recipe(tmp_path, pruned + int8)), output=tmp_path / "kept")
    float_model, int8_model = outcome.manifest["stages"]
    assert int8_model["sparsity"] >= float_model["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert "were zero before it" not in capsys.readouterr().err

    tuned = "  - {id: tuned, kind: train, epochs: 1, warmup_epochs: 0}\n"
    outcome = pipeline.apply(str(_checkpoint_recipe(tmp_path, pruned + tuned + int8)), output=tmp_path / "lost")
    assert outcome.manifest["stages"][1]["sparsity"] < 0.1
    expected = "stage tuned: 60.0% of the weights were zero before it and"
    assert expected in " ".join(capsys.readouterr().err.split())
    assert [text for text in outcome.manifest["notes"] if text.startswith(expected)]


def test_distillation_from_a_stage_into_a_smaller_student(tmp_path: Path) -> None:
    overrides = (
        "model.arguments.width=8",
        "stages.teacher.epochs=2",
        "stages.student.epochs=2",
        "stages.student.model.arguments.width=4",
        "stages.int8.effort=fast",
    )
    outcome = pipeline.apply("distill", overrides=overrides, output=tmp_path / "run")
    teacher, student, _ = outcome.manifest["stages"]
    assert student["params"] < 0.5 * teacher["params"]
    assert "teacher stage teacher" in student["summary"]


def test_the_same_recipe_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    stages = "  - {id: tuned, kind: train, epochs: 1, warmup_epochs: 0}\n"
    recipe = _checkpoint_recipe(tmp_path, stages)
    for name in ("a", "b"):
        pipeline.apply(str(recipe), output=tmp_path / name)
        pipeline.export(tmp_path / name, int8=True, target="x86")
    for file in ("stages/tuned/model.safetensors", "stages/int8/model.safetensors", "export/model.int8.onnx"):
        assert sha256_of(tmp_path / "a" / file) == sha256_of(tmp_path / "b" / file), file


def test_export_without_int8_then_with_it(tmp_path: Path) -> None:
    stages = "  - {id: int8, kind: quantize, effort: fast}\n"
    pipeline.apply(str(_checkpoint_recipe(tmp_path, stages)), output=tmp_path / "run", target="x86")
    outcome = pipeline.export(tmp_path / "run")
    assert not (tmp_path / "run" / "export" / "model.int8.onnx").exists()
    assert "onnx_int8" not in _json(outcome.run.export / "parity.json")
    pipeline.export(tmp_path / "run", int8=True)
    assert "onnx_int8" in _json(outcome.run.export / "parity.json")


def test_export_with_preprocessing_and_ort_format(tmp_path: Path) -> None:
    settings = ("stages.int8.effort=fast", "stages.int8.placement=full", "stages.int8.calibration.samples=64")
    run = pipeline.apply("int8_ptq", target="x86", overrides=settings, output=tmp_path / "run").run
    pipeline.export(run.path, int8=True, with_preprocessing=True, ort=True)
    parity = _json(run.export / "parity.json")
    assert parity["input_form"] == "uint8_nhwc"
    assert parity["with_preprocessing"]["passed"]
    assert parity["with_preprocessing"]["top1_agreement"] == 1.0  # digits have the model's size already
    assert parity["with_preprocessing"]["int8"]["top1_agreement"] == 1.0
    assert parity["ort_format"]["passed"]
    assert all(part["passed"] for part in parity["variants"].values())
    assert parity["onnx_int8"]["mcnemar"]["p_value"] <= 1
    assert run.read_manifest()["exports"]["x86"] == {
        "folder": "export",
        "input_form": "uint8_nhwc",
        "int8": True,
        "ort_format": True,
        "outputs": ["logits"],
    }
    for name in ("model.onnx", "model.int8.onnx", "model.int8.ort"):
        (entry,) = onnxruntime.InferenceSession(run.export / name).get_inputs()
        assert (entry.type, entry.shape[1:]) == ("tensor(uint8)", ["height", "width", 1])
    profile = pipeline.profile(run.path, target="x86", seconds=1.0).profiles["x86"]
    assert profile["input_form"] == "uint8_nhwc"
    assert "latencies include" in " ".join(profile["notes"]) or not profile["measured"]
    # Without int8 the other form would be left beside it: one image could not feed both.
    pipeline.export(run.path)
    assert not (run.export / "model.int8.onnx").exists()
    assert not (run.export / "model.ort").exists()
    assert pipeline.profile(run.path, target="x86", seconds=1.0).profiles["x86"]["input_form"] == "float32_nchw"


def test_profile_before_export_says_what_to_do(tmp_path: Path) -> None:
    stages = "  - {id: int8, kind: quantize, effort: fast}\n"
    pipeline.apply(str(_checkpoint_recipe(tmp_path, stages)), output=tmp_path / "run")
    with pytest.raises(RunError, match="first: edgecompress export"):
        pipeline.profile(tmp_path / "run", target="x86")


def test_run_goes_on_where_apply_ended(tmp_path: Path) -> None:
    recipe = str(_checkpoint_recipe(tmp_path, "  - {id: int8, kind: quantize, effort: fast}\n"))
    output = tmp_path / "run"
    pipeline.apply(recipe, output=output, target="rpi4")
    pipeline.run(recipe, targets=["rpi4"], output=output, resume=True)
    assert (output / "profile" / "rpi4.json").is_file()
    assert (output / "report" / "rpi4.html").is_file()
