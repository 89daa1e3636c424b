"""Nobody is let in: code that comes with files never runs, paths lead nowhere else, nothing is sent anywhere."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from bundle_runs import small_run
from conftest import CommandLine
from edgecompress.errors import RunError
from edgecompress.run_directory import atomic_path, open_run, write_json
from edgecompress.settings import named_code
from report_runs import make_run

PACKAGE = Path(__file__).resolve().parent.parent / "edgecompress"

# ---- the package's own code


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _dangers(source: str) -> list[str]:
    """What in a module could run what it reads."""
    tree = ast.parse(source)
    found = []
    for name, call in _calls(tree):
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if name.endswith(("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all")):
            found.append(name)
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval", "builtins.exec"):
            found.append(name)
        if name.rpartition(".")[2] == "exec_module":
            found.append("exec_module")
        if keywords.get("shell", "False") != "False":
            found.append("shell=True")
        if name in ("torch.jit.load", "torch.hub.load", "joblib.load", "tarfile.extractall", "shutil.unpack_archive"):
            found.append(name)
        if name.rpartition(".")[2] in ("extractall", "extract"):
            found.append(name.rpartition(".")[2])
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        risky = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "socket", "urllib.request", "http", "requests")
        found += [f"import {name}" for name in names if name in risky]
    return found


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    allowed = {
        "settings/yaml_files.py": ["yaml.load"],  # its loader is a subclass of the safe one
        "settings/user_code.py": ["exec_module"],  # the user's own file, named in a recipe or by `trust`
        "models/weights.py": ["import pickle"],  # for the name of the error that says a pickle was refused
        "searching/study.py": ["import socket"],  # this machine's name, which tells workers apart
        "searching/trial.py": ["import socket"],
    }
    found = {path.relative_to(PACKAGE).as_posix(): _dangers(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    unknown = {name: [one for one in dangers if one not in allowed.get(name, [])] for name, dangers in found.items()}
    assert {name: dangers for name, dangers in unknown.items() if dangers} == {}
    assert {name for name, dangers in allowed.items() if set(dangers) - set(found[name])} == set(), "no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x)",
        "yaml.load(x)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "import pickle",
        "from pickle import loads",
        "tar.extractall(x)",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert _dangers(source)


# ---- run directories of somebody else


TINY = """\
name: tiny
data: {name: digits, max_train_samples: 64}
model: {name: resnet8, arguments: {width: 4}}
stages:
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of a model with random weights, exported."""
    from edgecompress import pipeline

    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(TINY)
    pipeline.apply(str(folder / "tiny.yaml"), output=folder / "run")
    pipeline.export(folder / "run", int8=True, target="x86")
    return folder / "run"


EVIL = """\
import pathlib

from edgecompress.models.nets import resnet8

pathlib.Path({mark!r}).touch()


def build(num_classes=10, **_):
    return resnet8(num_classes, 1, width=4, input_size=8)


def data():
    raise ValueError("no")
"""


@pytest.fixture
def attack(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that run beside an evil.py, and the mark that evil.py leaves when it runs."""
    mark = tmp_path / "mark"
    run = Path(shutil.copytree(made, tmp_path / "run"))
    for folder in (tmp_path, run):
        (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    return run, mark


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _evil_stage(run: Path, name: str) -> None:
    for path in run.glob("stages/*/model.json"):
        _edit(path, lambda m: m["architecture"].update(name=name))


def _evil_model(run: Path, name: str) -> None:
    _edit(run / "run.json", lambda m: m["recipe"]["model"].update(name=name))
    _evil_stage(run, name)


def _evil_data(run: Path, name: str) -> None:
    _edit(run / "run.json", lambda m: m["recipe"]["data"].update(name=name.replace("build", "data")))


COMMANDS = {
    "export": ["export", "RUN", "--int8"],
    "profile": ["profile", "RUN", "--target", "x86", "--quick"],
    "sensitivity": ["sensitivity", "RUN"],
    "debug-int8": ["debug-int8", "RUN"],
    "report": ["report", "RUN", "--target", "x86"],
    "bundle": ["bundle", "RUN", "--target", "x86", "--output", "out"],
    "verify": ["verify", "RUN"],
    "runs": ["runs", "list", "--root", "."],
    "resume": ["apply", "tiny.yaml", "--output", "RUN", "--resume"],
}


@pytest.mark.parametrize("place", [_evil_stage, _evil_model, _evil_data], ids=["model.json", "both", "data"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_never_brings_code(
    command_line: CommandLine,
    tmp_path: Path,
    attack: tuple[Path, Path],
    place: Callable[[Path, str], None],
    name: str,
) -> None:
    run, mark = attack
    (tmp_path / "tiny.yaml").write_text(TINY)
    place(run, "run/evil.py:build")
    if name == "resume":
        _edit(run / "run.json", lambda m: m.update(status="failed"))
    answer = command_line(*[str(run) if word == "RUN" else word for word in COMMANDS[name]], "--no-gate")
    assert not mark.exists()
    if name in ("export", "sensitivity", "debug-int8") or (name == "profile" and place is not _evil_stage):
        answer.refusal("code that you have not named on this machine", "edgecompress trust run/evil.py:")


def test_named_code_of_a_run_is_used(
    command_line: CommandLine, attack: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mark = attack
    monkeypatch.setattr(named_code, "_here", set())
    _evil_model(run, "evil.py:build")
    assert command_line("export", run, "--no-gate").exit_code == 2
    assert command_line("trust", "evil.py:data").exit_code == 0
    assert command_line("export", run, "--no-gate").exit_code == 2, "another function of the same file was named"
    listed = json.loads(command_line("trust", "evil.py:build", "--json").stdout)
    assert str(run.parent / "evil.py") + ":build" in listed["named"]
    assert not mark.exists()
    assert command_line("export", run, "--no-gate").exit_code == 0
    assert mark.exists()
    assert stat.S_IMODE(named_code.names_file().parent.stat().st_mode) == 0o700


def test_what_a_recipe_named_needs_no_leave(
    command_line: CommandLine, attack: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TINY.replace("resnet8, arguments: {width: 4}", "'evil.py:build'")
    (tmp_path / "own.yaml").write_text(recipe)
    assert command_line("apply", "own.yaml", "--output", "own", "--no-gate").exit_code == 0
    monkeypatch.setattr(named_code, "_here", set())  # another process
    assert command_line("export", "own", "--no-gate").exit_code == 0
    named_code.names_file().write_text("{half a file")
    command_line("export", "own", "--no-gate").refusal("edgecompress trust evil.py:build")


@pytest.mark.parametrize("words", [["nets.py"], ["nope.py:build"], ["evil.txt:build"], ["evil.py:a b"]])
def test_only_functions_of_files_can_be_trusted(
    command_line: CommandLine, attack: tuple[Path, Path], words: list[str]
) -> None:
    command_line("trust", *words).refusal(words[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained": True},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/evil.pth"}},
    ],
)
def test_a_run_never_leads_timm_to_a_pickle(tmp_path: Path, made: Path, arguments: dict[str, Any]) -> None:
    from edgecompress.models.checkpoint import load_checkpoint

    folder = Path(shutil.copytree(made / "stages" / "initial", tmp_path / "initial"))
    _edit(folder / "model.json", lambda m: m["architecture"].update(name="timm/resnet18", arguments=arguments))
    with pytest.raises(RunError, match=next(iter(arguments))):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["../../out", "/tmp/x", "a/b", "", ".hidden", "..", "a\\b", "a\nb"])
@pytest.mark.parametrize("place", ["target", "stage", "baseline", "recipe"])
def test_names_in_a_run_lead_nowhere_else(command_line: CommandLine, tmp_path: Path, name: str, place: str) -> None:
    run = make_run(tmp_path / "runs" / "run")

    def change(manifest: Any) -> None:
        if place == "target":
            manifest["targets"] = [name]
        elif place == "stage":
            manifest["stages"][0]["id"] = name
        elif place == "recipe":
            manifest["recipe_name"] = name
        else:
            manifest["baseline"]["id"] = name

    _edit(run.manifest_path, change)
    command_line("bundle", run.path, "--target", "x86", "--output", "o").refusal("is no name of a target")
    command_line("report", run.path).refusal("is no name of a target, a stage or a recipe")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin"])
def test_a_runs_model_takes_nothing_from_outside(command_line: CommandLine, tmp_path: Path, location: str) -> None:
    run = small_run(tmp_path / "run", int8=False)
    (tmp_path / "secret.bin").write_bytes(b"secret" * 10_000)
    (run.export / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(run.export / "model.onnx")
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location)
    (run.export / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "here.yaml").write_text("name: here\narchitecture: x86_64\n")
    for words in (["bundle", run.path, "--output", "out"], ["profile", run.path]):
        answer = command_line(*words, "--target", "here.yaml")
        answer.refusal("model.onnx: takes weights from another file")
    assert not list((tmp_path / "out").glob("*/*.onnx"))


# ---- temporary files


def test_files_in_the_making_are_their_owners_alone(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "run.json") as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664), (0o000, 0o666)])
def test_finished_files_are_what_the_user_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        threads = [threading.Thread(target=write_json, args=(tmp_path / f"{k}.json", {})) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_temporary_folders_are_private_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles and archives are taken apart in folders that nobody else may enter."""
    from edgecompress.deploy import verify as verify_module

    seen: list[int] = []
    inner = verify_module.unpack

    def unpack(archive: Path, folder: Path) -> Path:
        seen.append(stat.S_IMODE(folder.stat().st_mode))
        return inner(archive, folder)

    monkeypatch.setattr(verify_module, "unpack", unpack)
    run = small_run(tmp_path / "run", int8=False)
    from bundle_runs import here
    from edgecompress.deploy.bundle import write_bundle

    made = write_bundle(run, here(), exported=run.export, output=tmp_path / "out")
    before = os.umask(0)
    try:
        assert verify_module.verify(made.archive).ok
    finally:
        os.umask(before)
    assert seen == [0o700]


# ---- the network


def _namespace_works() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    return subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _namespace_works(), reason="this system permits no network namespace (unshare -rn)")
def test_the_main_job_needs_no_network(tmp_path: Path) -> None:
    """The whole line in a namespace without a single interface that is up."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "edgecompress", "run", "tiny.yaml", "--target", "x86", "--quick", "--no-gate"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    alone = ["unshare", "-rn", *command, "--output", "run"]
    done = subprocess.run(
        alone, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert open_run(tmp_path / "run").read_manifest()["status"] == "complete"
    probe = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    silent = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert "unreachable" in silent.stderr, "the namespace must have no network, or this proves nothing"
