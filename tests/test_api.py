"""The Python API: what `import edgecompress` costs and offers, and that its results are those of the files."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edgecompress
from bundle_runs import small_run
from edgecompress import console
from edgecompress.errors import ConfigurationError, InputError, RunError
from edgecompress.results import Estimate
from edgecompress.run_directory import read_json, write_json
from edgecompress.settings.recipe import load_recipe
from report_runs import PROFILE, make_run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "nightly.py"
COMMANDS = (
    *("apply", "bundle", "compare", "debug_int8", "export", "profile", "report", "run", "search", "sensitivity"),
    "verify",
)


def python(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 1500, "check": False}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, **how)


def test_importing_loads_nothing_and_every_name_is_there(tmp_path: Path) -> None:
    code = "import sys, edgecompress; print(*sorted(n for n in sys.modules if n.startswith('edgecompress')))"
    light = python("-c", f"{code}; print('typing' in sys.modules, 'torch' in sys.modules)", folder=tmp_path)
    assert light.stdout.split() == ["edgecompress", "False", "False"]
    assert set(edgecompress.__all__) <= set(dir(edgecompress))
    for name in edgecompress.__all__:
        assert getattr(edgecompress, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        edgecompress.runn  # type: ignore[attr-defined]  # noqa: B018


def test_no_room_takes_the_place_of_a_function() -> None:
    """A sub-package becomes an attribute of the package when it is imported, and would hide a function of its name."""
    rooms = {path.stem for path in (ROOT / "edgecompress").iterdir() if path.name != "__init__.py"}
    assert not rooms & set(edgecompress.__all__)


def test_the_names_are_functions_after_everything_is_imported(tmp_path: Path) -> None:
    code = "import edgecompress as e, edgecompress.cli; e.run; from edgecompress import pipeline; print(*(callable("
    answer = python("-c", f"{code}getattr(e, name)) for name in {COMMANDS!r}))", folder=tmp_path)
    assert (set(answer.stdout.split()), answer.stderr) == ({"True"}, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_function_is_documented_and_quiet_by_default(name: str) -> None:
    function = getattr(edgecompress, name)
    assert function.__doc__
    assert inspect.signature(function).parameters["progress"].default is False
    assert f"edgecompress.{name}(" in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.25, 0.25), (1e-5, 1e-5), (7, 7), (True, True), (None, None), ("1e-3", "1e-3"), (Path("a b"), "a b")],
)
def test_settings_keep_their_types(value: object, expected: object) -> None:
    from edgecompress.api import _overrides
    from edgecompress.settings.configuration import apply_overrides

    assert apply_overrides({}, _overrides({"a.b": value})) == {"a": {"b": expected}}


def test_settings_reach_the_recipe() -> None:
    from edgecompress.api import _overrides

    settings = {"stages.pruned.exclude": ["head*"], "model.arguments": {"width": 8}, "data.root": Path("ä b")}
    recipe = load_recipe("prune_kd", _overrides(settings))
    assert recipe.model.arguments == {"width": 8}
    assert recipe.data.root == Path("ä b")
    assert recipe.stages[1].model_dump()["exclude"] == ("head*",)


@pytest.mark.parametrize(
    ("call", "needle"),
    [
        (lambda: edgecompress.run("prune_kd", target=[]), "target: none given"),
        (lambda: edgecompress.run("prune_kd", target="x68"), "did you mean"),
        (lambda: edgecompress.run("prune_kd", target="x86", settings={"seed": object()}), "settings: seed"),
        (lambda: edgecompress.run("prune_kd", target="x86", settings={"seed": float("nan")}), "settings: seed"),
        (lambda: edgecompress.run("prune_kd", target="x86", settings={"sed": 1}), "did you mean 'seed'"),
        (lambda: edgecompress.run("prune_kd", target="x86", thoroughness="slow"), "thoroughness"),  # type: ignore[arg-type]
        (lambda: edgecompress.export("not-there"), "not a run directory"),
        (lambda: edgecompress.verify("not-there"), "no such file or folder"),
        (lambda: edgecompress.sensitivity("not-there"), "not a run directory"),
        (lambda: edgecompress.sensitivity("r", what="weights"), "what: 'weights' is unknown"),  # type: ignore[arg-type]
        (lambda: edgecompress.sensitivity("r", macs_ratio=50), "macs_ratio: 50 is no fraction"),
        (lambda: edgecompress.debug_int8("r", worst=0), "worst: 0 is too few"),
        (lambda: edgecompress.debug_int8("not-there"), "not a run directory"),
        (lambda: edgecompress.search("prune_kd", target="x86", max_accuracy_drop=5), "did you mean 0.05"),
        (lambda: edgecompress.search("int8", target="x86", max_accuracy_drop=0), "did you mean 'int8_ptq'"),
        (lambda: edgecompress.search("qat", target="x86", max_accuracy_drop=0, trials=0), "--trials 0"),
        (lambda: edgecompress.profile("r", target="x86", host="a", results="b"), "host and results"),
    ],
)
def test_bad_input_is_an_error_of_the_tree(
    call: Any, needle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=needle):
        call()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert ConfigurationError.exit_code == InputError.exit_code == 2


def test_what_a_call_changes_is_put_back(tmp_path: Path) -> None:
    logger, before = logging.getLogger("torch.onnx"), console._settings.quiet
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(RunError):
            edgecompress.report(tmp_path)
        assert (logger.level, console._settings.quiet) == (logging.INFO, before)
    finally:
        logger.setLevel(logging.NOTSET)


def test_a_bundle_is_made_and_verified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run")
    write_json(tmp_path / "here.yaml", {"architecture": "x86_64"})
    bundle = edgecompress.bundle(run.path, target=tmp_path / "here.yaml", output=tmp_path / "out")
    assert bundle.archive.parent == tmp_path / "out"
    assert bundle.caution is not None  # it was never profiled
    assert edgecompress.verify(bundle).ok
    assert edgecompress.verify(bundle.archive).ok
    (bundle.folder / "labels.txt").write_text("changed\n")
    found = edgecompress.verify(bundle.folder)
    assert (found.ok, found.changed) == (False, ["labels.txt"])
    assert capfd.readouterr() == ("", "")


def test_runs_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, manifest={}, profile=PROFILE) for name in ("before", "after")]
    found = edgecompress.compare(*(run.path for run in runs), output=tmp_path / "side by side")
    assert [candidate.name for candidate in found.candidates] == ["before", "after"]
    assert [candidate.run.name for candidate in found.candidates] == ["before", "after"]
    assert (found.reference, found.document["sentence"]) == ("before", found.sentence)
    assert found.files.html.parent == tmp_path / "side by side"
    assert read_json(found.files.json)["sentence"] == found.sentence
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigurationError, match="at least two runs"):
        edgecompress.compare(runs[0].path)


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (run.path / "profile").mkdir(exist_ok=True)
    write_json(run.path / "profile" / "x86.json", {"target": "x86"})
    with pytest.raises(RunError, match="damaged"):
        edgecompress.open_run(run.path)


TINY: dict[str, object] = {
    "model": {"name": "student_cnn", "arguments": {"width": 8}},
    "data.max_train_samples": 128,
    "stages.dense": {"id": "dense", "kind": "train", "epochs": 1, "warmup_epochs": 0},
    "stages.pruned": {
        "id": "pruned",
        "kind": "prune",
        "channel_ratio": {"search": [0.2, 0.7]},
        "epochs": 1,
        "warmup_epochs": 0,
    },
    "stages.int8": {"id": "int8", "kind": "quantize", "effort": "fast", "calibration": {"samples": 32}},
}


@pytest.mark.slow
def test_a_search_and_what_looks_at_its_pick(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = {"target": "rpi4", "max_accuracy_drop": 1.0, "settings": TINY, "output": tmp_path / "found"}
    found = edgecompress.search("prune_kd", trials=1, **how)
    assert found.document["trials"] == read_json(tmp_path / "found" / "search.json")["trials"]
    assert found.document["command"].startswith("edgecompress search prune_kd --target rpi4 --max-accuracy-drop 1")
    assert (found.status, len(found.front), found.path) == ("complete", 1, tmp_path / "found")
    assert found.pick == found.front[0]
    assert found.pick.accuracy.low < found.pick.accuracy.value < found.pick.accuracy.high
    assert (found.pick.latency_ms, found.pick.settings.keys()) == (None, {"stages.pruned.channel_ratio"})
    assert edgecompress.search("prune_kd", trials=1, resume=True, **how).front == found.front

    run = edgecompress.open_run(found.pick.run)
    measured = edgecompress.sensitivity(run, images=16, latency=False)
    assert measured.path == run.stage("int8").path / "sensitivity.json"
    assert measured.document == read_json(measured.path)
    assert [layer.name for layer in measured.layers] == measured.document["worst_first"]
    assert measured.layers[0].alone_sqnr_db <= measured.layers[-1].alone_sqnr_db  # type: ignore[operator]
    assert measured.layer_ratios == measured.document["channels"]["proposal"]["layer_ratios"]
    why = edgecompress.debug_int8(run, images=16, worst=2)
    assert why.document == read_json(why.path)
    assert [layer.name for layer in why.layers] == [layer.name for layer in measured.layers[:2]]
    assert (why.sqnr_db, why.agreement) == (measured.sqnr_db, measured.agreement)
    kinds = {cause.kind for layer in why.layers for cause in layer.causes}
    assert kinds == {cause["kind"] for layer in why.document["layers"] for cause in layer["causes"]}
    shown = capfd.readouterr()
    assert shown.out == ""
    assert all(line.startswith("warning: ") for line in shown.err.splitlines()), shown.err


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute of work, and a machine may be busy
def test_the_example_runs_and_its_results_are_those_of_the_files(tmp_path: Path) -> None:
    answer = python(EXAMPLE, "tonight", folder=tmp_path)
    assert answer.stderr == ""
    assert answer.returncode in (0, 1), answer  # 1: a busy machine can make int8 seem slow
    result = edgecompress.open_run(tmp_path / "tonight")
    manifest, profile = result.manifest, read_json(tmp_path / "tonight" / "profile" / "x86.json")
    assert [stage.id for stage in result.stages] == ["dense", "pruned", "int8"]
    for stage, entry in zip(result.stages, manifest["stages"], strict=True):
        assert stage.accuracy == Estimate(entry["accuracy"], *entry["accuracy_ci95"])
        assert (stage.params, stage.macs, stage.seconds) == (entry["params"], entry["macs"], entry["seconds"])
    x86 = result.profiles["x86"]
    assert (x86.verdict, x86.document) == (profile["verdict"], profile)
    assert set(x86.models) == {"baseline", "fp32", "int8"}
    for name, model in x86.models.items():
        assert model.path.stat().st_size == model.size_bytes
        assert model.latency_ms == Estimate(
            profile["models"][name]["latency_ms"]["p50"], *profile["models"][name]["latency_ms"]["p50_ci95"]
        )
    assert x86.int8_speedup == Estimate(profile["int8_speedup"]["ratio"], *profile["int8_speedup"]["ci95"])
    assert result.parity["x86"].passed
    assert result.parity["x86"].accuracy_int8 == result.stage("int8").accuracy.value  # type: ignore[union-attr]
    assert result.reports["x86"].html.is_file()
    assert manifest["command"].startswith("edgecompress run prune_kd --target x86 --set stages.dense.epochs=4")
    assert json.loads((tmp_path / "tonight" / "run.json").read_text()) == manifest
    with pytest.raises(KeyError, match="has no stage 'prned'"):
        result.stage("prned")
