"""Verifying: every kind of fault is named, hostile archives are refused, and nothing that a bundle brings is run."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bundle_runs import here, small_run
from conftest import CommandLine
from edgecompress.deploy import archive
from edgecompress.deploy.bundle import pack, write_bundle
from edgecompress.deploy.verify import verify
from edgecompress.device import infer
from edgecompress.errors import RunError
from edgecompress.run_directory import sha256_of, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("runs") / "run")
    return write_bundle(run, here(), exported=run.export, output=tmp_path_factory.mktemp("bundles")).folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "bundle" / "tiny-here"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest, and give it the hashes of the files as they are: what a forger would do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    for name, facts in manifest["files"].items():
        if (folder / name).is_file():
            facts["sha256"] = sha256_of(folder / name)
    write_json(folder / "manifest.json", manifest)


# ---- bundles and archives


def test_an_untouched_bundle_is_verified(command_line: CommandLine, made: Path) -> None:
    for path in (made, made.with_name("tiny-here.tar.gz")):
        answer = command_line("verify", path)
        assert answer.exit_code == 0, answer
        verdict, then = answer.stdout.splitlines()[-2:]
        assert verdict.startswith("verified: ")
        assert then.startswith("next:   ")
        assert "infer.py --self-test" in then
        document = json.loads(command_line("verify", path, "--json").stdout)
        assert document["ok"] is True
        assert [row["passed"] for row in document["self_test"]] == [True, True]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_every_fault_is_named(command_line: CommandLine, folder: Path, packed: bool) -> None:
    (folder / "labels.txt").unlink()
    (folder / "samples" / "0.npy").write_bytes(b"x" * (folder / "samples" / "0.npy").stat().st_size)
    with (folder / "infer.py").open("a") as stream:
        stream.write("\n")
    (folder / "edgecompress" / "__pycache__").mkdir()
    (folder / "edgecompress" / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"")
    path = folder
    if packed:
        path = folder.parent / "tiny-here.tar.gz"
        pack(folder, path)
    answer = command_line("verify", path)
    assert answer.exit_code == 1
    *lines, then = answer.stdout.splitlines()
    assert then.startswith("next:   edgecompress bundle ")
    assert lines[:-2] == [
        "missing: labels.txt",
        "changed: infer.py",
        "changed: samples/0.npy",
        "unexpected: edgecompress/__pycache__/errors.cpython-311.pyc",
    ]
    assert lines[-2] == "self-test not made: the files are not those of the manifest"
    assert lines[-1].startswith("NOT VERIFIED")
    document = json.loads(command_line("verify", path, "--json").stdout)
    assert (document["ok"], document["missing"], document["self_test"]) == (False, ["labels.txt"], None)


def test_a_link_is_unexpected(folder: Path, tmp_path: Path) -> None:
    labels = folder / "labels.txt"
    labels.rename(tmp_path / "labels.txt")
    labels.symlink_to(tmp_path / "labels.txt")
    found = verify(folder)
    assert (found.missing, found.unexpected) == (["labels.txt"], ["labels.txt"])


def test_wrong_answers_are_found_though_every_hash_is_right(command_line: CommandLine, folder: Path) -> None:
    logits = folder / "samples" / "logits.fp32.npy"
    np.save(logits, np.load(logits)[:, ::-1])
    rewrite(folder, lambda manifest: None)
    answer = command_line("verify", folder)
    assert answer.exit_code == 1
    assert "self-test FAILED  fp32" in answer.stdout
    assert "self-test passed  int8" in answer.stdout


def test_code_of_the_bundle_never_runs(folder: Path, tmp_path: Path) -> None:
    """Every script is replaced by one that leaves a mark, with hashes that fit."""
    mark = tmp_path / "mark"
    for script in [*folder.glob("*.py"), *(folder / "edgecompress").glob("*.py")]:
        script.write_text(f"open({str(mark)!r}, 'w')\n")
    rewrite(folder, lambda manifest: None)
    assert verify(folder).ok
    assert not mark.exists()


def test_a_model_may_not_take_weights_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    rewrite(folder, lambda manifest: None)
    found = verify(folder)
    assert not found.ok
    assert "takes weights from another file" in str(found.self_test_error)


def test_a_model_that_never_ends_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of 2**62 rounds behind the logits, with every hash right."""
    monkeypatch.setattr(infer, "ANSWER_SECONDS", 0.5)
    model = onnx.load(folder / "model.onnx")
    graph, helper, kinds = model.graph, onnx.helper, onnx.TensorProto
    for node in graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = "answer" if name == "logits" else name
    values = [("go", kinds.BOOL), ("value", kinds.FLOAT), ("go_on", kinds.BOOL), ("doubled", kinds.FLOAT)]
    go, value, go_on, doubled = (helper.make_tensor_value_info(name, kind, None) for name, kind in values)
    again = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["value", "value"], ["doubled"])]
    number = helper.make_tensor_value_info("round", kinds.INT64, [])
    body = helper.make_graph(again, "body", [number, go, value], [go_on, doubled])
    graph.node.append(helper.make_node("Loop", ["rounds", "always", "answer"], ["logits"], body=body))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(2**62), "rounds"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    onnx.save(model, folder / "model.onnx")
    rewrite(folder, lambda manifest: None)
    found = verify(folder)
    assert not found.ok
    assert "model.onnx: gave no answer within 0.5 s" in str(found.self_test_error)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda m: m["files"].update({"../secret": {"sha256": "0"}}), "'../secret' is no path inside"),
        (lambda m: m["files"].update({"/etc/passwd": {"sha256": "0"}}), "'/etc/passwd' is no path inside"),
        (lambda m: m["files"].update({"labels.txt": {}}), "has no sha256"),
        (lambda m: m.update(files=[]), "names no files"),
        (
            lambda m: m["self_test"]["samples"][0].update(image="/etc/passwd"),
            "'/etc/passwd', which is none of its files",
        ),
        (lambda m: m["models"]["int8"].update(file="../model.onnx"), "which is none of its files"),
        (lambda m: m.update(self_test=None), "'self_test', which is none"),
        (lambda m: m.update(schema_version=99), "schema_version 99"),
        (lambda m: m.update(kind="something"), "is no manifest of a bundle"),
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, change: Callable[[Any], None], needle: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(RunError, match=needle.replace(".", r"\.")):
        verify(folder)


def _archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    ("members", "needle"),
    [
        ([(_member("/etc/cron.d/job"), b"x")], "/etc/cron.d/job: leads outside"),
        ([(_member("b/../../job"), b"x")], "b/../../job: leads outside"),
        ([(_member("b/link", tarfile.SYMTYPE, "/etc"), b"")], "b/link: is a link to /etc"),
        ([(_member("b/hard", tarfile.LNKTYPE, "b/other"), b"")], "b/hard: is a link to b/other"),
        ([(_member("b/pipe", tarfile.FIFOTYPE), b"")], "b/pipe: is neither a file nor a folder"),
        ([(_member("b/disk", tarfile.BLKTYPE), b"")], "b/disk: is neither a file nor a folder"),
        ([(_member("b/a"), b"1"), (_member("b/./a"), b"2")], "b/./a: is there twice"),
        ([(_member("a/x"), b"1"), (_member("b/x"), b"2")], "holds 2 folders at its top"),
        ([(_member("b/zeros"), b"\0" * 40_000_000)], "b/zeros: 40000000 bytes so far"),
    ],
)
def test_hostile_archives_are_refused(
    command_line: CommandLine, tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], needle: str
) -> None:
    path = _archive(tmp_path / "hostile.tar.gz", members)
    answer = command_line("verify", path)
    assert answer.exit_code == 1
    assert f"refused: {needle}" in answer.stdout
    assert sorted(tmp_path.rglob("*")) == [path]


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    path = _archive(tmp_path / "many.tar.gz", [(_member(f"b/{index}"), b"x") for index in range(4)])
    assert archive.refusals(path) == ["more than 3 members"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no archive at all"])
def test_broken_archives_are_bad_input(
    command_line: CommandLine, made: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(damage(made.with_name("tiny-here.tar.gz").read_bytes()))
    command_line("verify", path).refusal("broken.tar.gz", "is no .tar.gz that can be read to its end")


# ---- runs, and what is neither


def test_a_runs_files_are_checked(command_line: CommandLine, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    assert command_line("verify", run.path).exit_code == 0
    (run.export / ".model.onnx.part").write_text("left by an interrupted command")
    assert command_line("verify", run.path).exit_code == 0
    (run.export / "samples.npy").write_bytes(b"")
    (run.export / "model.int8.onnx").unlink()
    (run.path / "extra").write_text("")
    answer = command_line("verify", run.path, "--json")
    assert answer.exit_code == 1
    document = json.loads(answer.stdout)
    found = (document["missing"], document["changed"], document["unexpected"])
    assert found == (["export/model.int8.onnx"], ["export/samples.npy"], ["extra"])
    run.update_manifest(lambda m: m.update(artifacts={"../x": "0"}))
    command_line("verify", run.path).refusal("'../x', which is not inside of the run")


def test_anything_else_is_bad_input(command_line: CommandLine, tmp_path: Path) -> None:
    command_line("verify", tmp_path / "nowhere").refusal("no such file or folder")
    command_line("verify", tmp_path).refusal("neither a bundle (no manifest.json) nor a run directory (no run.json)")
    assert "no such file" in command_line("verify", tmp_path / "nowhere", "--json").json_refusal()
