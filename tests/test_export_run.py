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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an int8 export, and of its target."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "recipe.yaml").write_text(RECIPE + "gates: {int8_min_top1_agreement: 0.1}\n")
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
