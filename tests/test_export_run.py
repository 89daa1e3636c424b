"""`export` over an earlier export: what run.json, verify, profile, report and bundle say of files that changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecompress import pipeline
from edgecompress.deploy.verify import verify
from edgecompress.machine import architecture
from edgecompress.reporting.report_facts import report_document
from edgecompress.results import read_result
from edgecompress.run_directory import RunDirectory, sha256_of
from edgecompress.settings.gates import missed_gates
from edgecompress.steps import export_run
from tiny_run import RECIPE, TARGET

TRAINED = RECIPE.replace("max_train_samples: 64", "max_train_samples: 600").replace("epochs: 1", "epochs: 8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an int8 export, and of its target."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "recipe.yaml").write_text(TRAINED + "gates: {int8_min_top1_agreement: 0.1}\n")
    elsewhere = "aarch64" if architecture() == "x86_64" else "x86_64"  # so that a profile times nothing
    (folder / "here.yaml").write_text(TARGET.format(architecture=elsewhere))
    pipeline.apply(str(folder / "recipe.yaml"), target=str(folder / "here.yaml"), output=folder / "run")
    pipeline.export(folder / "run", target=str(folder / "here.yaml"), int8=True)
    return folder


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    return RunDirectory(tmp_path / "run")


def _here(run: RunDirectory) -> str:
    return str(run.path.parent / "here.yaml")


def _parity(run: RunDirectory) -> Any:
    return json.loads((run.export / "parity.json").read_text())


def _interrupt(monkeypatch: pytest.MonkeyPatch, again: Callable[[], object]) -> None:
    """Do an export again until its int8 file is written, and stop it before anything was compared."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_run, "inspect_integer_graph", stop)
        with pytest.raises(KeyboardInterrupt):
            again()


@pytest.mark.slow
def test_an_interrupted_export_leaves_no_gate_of_the_earlier_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run.read_manifest()
    assert missed_gates(before, "here") == []
    earlier = sha256_of(run.export / "model.int8.onnx")
    changed = "stages.int8.exclude=[blocks.0.conv1]"
    _interrupt(monkeypatch, lambda: pipeline.export(run.path, target=_here(run), int8=True, overrides=(changed,)))
    assert sha256_of(run.export / "model.int8.onnx") != earlier
    manifest = run.read_manifest()
    assert [gate for gate in manifest["gates"] if gate["step"] == "export" and gate["passed"]] == []
    assert "here" not in manifest["exports"]
    (missed,) = missed_gates(manifest, "here")
    assert "begun and not completed" in missed
    assert verify(run.path).notes == [missed]
    profile = pipeline.profile(run.path, target=_here(run), seconds=0.1, thoroughness="quick").profiles["here"]
    assert profile["verdict"] == "hold"
    assert missed in profile["missed"]
    report = report_document(run, "here")
    assert report["decision"]["reasons"][0] == missed
    assert "parity" in [row["what"] for row in report["missing"]]
    assert read_result(run).parity == {}
    _, made = pipeline.bundle(run.path, target=_here(run), output=None, preprocessing_inside=False)
    assert made.caution is not None
    assert missed in made.caution

    pipeline.export(run.path, target=_here(run), int8=True)
    now = run.read_manifest()
    assert (now["gates"], now["exports"]) == (before["gates"], before["exports"])
    assert verify(run.path).notes == []


def test_an_export_without_int8_leaves_no_int8_file_behind(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its gates go with its part of parity.json, so nothing would speak against a file that misses them."""
    (run.export / "flipped").mkdir(exist_ok=True)
    (run.export / "flipped" / "0.png").write_bytes(b"")
    pipeline.export(run.path, target=_here(run))
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("warning: ")
    assert f"{run.export}/model.int8.onnx of an earlier export goes" in said
    left = [name for name in run.read_manifest()["artifacts"] if name.startswith("export/")]
    assert sorted(left) == [f"export/{name}" for name in ("model.onnx", "parity.json", "samples.npy")]
    assert verify(run.path).ok


def test_a_model_without_a_parity_record_is_not_presented_as_proved(run: RunDirectory) -> None:
    (run.export / "parity.json").write_text(json.dumps({k: v for k, v in _parity(run).items() if k != "onnx_int8"}))
    unproved = "model.int8.onnx has no parity record"
    profile = pipeline.profile(run.path, target=_here(run), seconds=0.1, thoroughness="quick").profiles["here"]
    assert profile["verdict"] == "hold"
    assert profile["reasons"][0].startswith(unproved)
    _, made = pipeline.bundle(run.path, target=_here(run), output=None, preprocessing_inside=False)
    assert made.caution is not None
    assert made.caution.startswith(f"DO NOT SHIP: a gate was missed: {unproved}")


def test_int8_quantized_again_is_judged_by_its_own_accuracy(run: RunDirectory) -> None:
    """Another scheme with ranges that cut off most values: the accuracy of the quantize stage is not this file's."""
    other = run.path.parent / "other.yaml"
    budget = "budgets: {max_accuracy_drop: 0.05}\n"
    other.write_text(
        Path(_here(run)).read_text().replace("here", "other").replace("symmetric", "symmetric, weight_bits: 7") + budget
    )
    spoilt = ("calibration.method=percentile", "calibration.percentile=51")
    overrides = (
        *(f"stages.int8.{text}" for text in spoilt),
        "gates.int8_min_top1_agreement=0",
        "gates.max_samples=200",
    )
    pipeline.export(run.path, target=str(other), int8=True, overrides=overrides)
    parity = json.loads((run.export / "other" / "parity.json").read_text())
    found = parity["onnx_int8_against_first"]
    assert found["model"] == "dense"
    assert found["accuracy_int8"] == parity["onnx_int8"]["accuracy_int8"] < 0.5 < found["accuracy"]
    assert found["accuracy"] == pytest.approx(parity["onnx_int8"]["accuracy_fp32"])  # on the same 200 images
    (gate,) = [g for g in run.read_manifest()["gates"] if (g["gate"], g["target"]) == ("max_accuracy_drop", "other")]
    assert (gate["step"], gate["passed"], gate["value"]) == ("export", False, found["accuracy_drop"])
    assert gate["sentence"] in missed_gates(run.read_manifest(), "other")
    profile = pipeline.profile(run.path, target=str(other), seconds=0.1, thoroughness="quick").profiles["other"]
    assert profile["accuracy_drop"] == found["accuracy_drop"]
    assert any(text.startswith("Accuracy drops by") for text in profile["missed"])
    (row,) = [row for row in report_document(run, "other")["decision"]["budgets"] if row["name"] == "max_accuracy_drop"]
    assert (row["value"], row["met"]) == (found["accuracy_drop"], False)

    assert "onnx_int8_against_first" not in _parity(run)  # the stage's own model, which apply judged


def test_a_killed_export_leaves_no_gate_of_the_earlier_one(run: RunDirectory) -> None:
    """What run.json says while files change is what a kill would leave."""
    seen = []

    def look(*_: Any, **__: Any) -> None:
        seen.append(run.read_manifest())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export_run, "_export_and_compare", look)
        with pytest.raises(KeyboardInterrupt):
            pipeline.export(run.path, target=_here(run), int8=True)
    (manifest,) = seen
    assert not any(name.startswith("export/") for name in manifest["artifacts"])
    assert [gate["gate"] for gate in manifest["gates"] if gate["step"] == "export"] == ["export_complete"]
