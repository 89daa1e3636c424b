"""Every shipped target loads, says how to use it, and has the facts that its kernels need."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from edgecompress.errors import ConfigurationError
from edgecompress.machine import RELEVANT_FEATURES
from edgecompress.settings import onnx_versions
from edgecompress.settings.configuration import validate
from edgecompress.settings.target import Target, load_target
from edgecompress.shipped import shipped_files

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "targets.md").read_text(encoding="utf-8")

NAMES = ["arm64", "rpi4", "rpi5", "x86", "x86-avx2", "x86-vnni"]


def test_these_targets_are_shipped() -> None:
    assert set(NAMES) <= {path.stem for path in shipped_files("targets")}


@pytest.mark.parametrize("path", shipped_files("targets"), ids=lambda path: path.stem)
def test_shipped_target_is_complete(path: Path) -> None:
    target = load_target(path.stem)
    assert target.name == path.stem
    assert target.description
    assert target.sources
    assert all(source.startswith("https://") for source in target.sources)
    header = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert f"--target {path.stem}" in header
    assert "Change first:" in header
    assert target.budgets.min_int8_speedup == 1.0
    assert target.budgets.max_accuracy_drop == 0.02
    assert target.budgets.size_bytes is not None
    assert target.budgets.peak_rss_bytes is not None
    assert {name for entry in target.isa for name in entry.split("|")} <= RELEVANT_FEATURES


@pytest.mark.parametrize(
    ("name", "activations", "weight_bits"),
    [
        ("x86", "auto", "auto"),
        ("x86-vnni", "uint8", 8),
        ("x86-avx2", "uint8", 7),
        ("arm64", "int8", 8),
        ("rpi4", "int8", 8),
        ("rpi5", "int8", 8),
    ],
)
def test_int8_scheme_belongs_to_the_kernels(name: str, activations: str, weight_bits: int | str) -> None:
    scheme = load_target(name).int8
    assert (scheme.activations, scheme.weight_bits) == (activations, weight_bits)


def test_only_the_newer_raspberry_pi_has_dot_products() -> None:
    old, new = load_target("rpi4"), load_target("rpi5")
    assert (old.architecture, old.cores, new.architecture, new.cores) == ("aarch64", 4, "aarch64", 4)
    assert "asimddp" not in old.isa
    assert "asimddp" in new.isa
    assert (old.device_model, new.device_model) == ("Raspberry Pi 4", "Raspberry Pi 5")


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("architecture: arm\nthreads: 0\nbudgets:\n  max_accuracy_drop: 2\n  size_byte: 1\n")
    with pytest.raises(ConfigurationError) as caught:
        load_target(str(path))
    for expected in ("architecture", "threads", "0.02", "size_byte", "size_bytes"):
        assert expected in str(caught.value)


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'rpi4'"):
        load_target("rpi44")


def faults_of(**settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        validate(Target, {"name": "t", "architecture": "x86_64", **settings}, source="t")
    return str(caught.value)


def made(**settings: Any) -> Target:
    return validate(Target, {"name": "t", "architecture": "x86_64", **settings}, source="t")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"onnxruntime_min": "1.13"}, "onnxruntime_min: 1.13 cannot read opset 18; use 1.14"),
        ({"opset": 21}, "opset: onnxruntime 1.17 reads opset 20 at most, not 21; set onnxruntime_min: '1.18'"),
        ({"max_ir_version": 10}, "max_ir_version: onnxruntime 1.17 reads IR version 9 at most, not 10"),
        ({"opset": 20, "max_ir_version": 8}, "a file of opset 20 needs IR version 9 at least"),
        ({"opset": 17}, "opset: 17 cannot be exported; use 18 to 23"),
        ({"threads": 4, "cores": 2}, "threads: 4 threads, but cores is 2"),
        ({"cpu_affinity": [0, 2], "cores": 2}, "cpu_affinity: CPUs are numbered 0 to 1"),
        ({"cpu_affinity": [3], "threads": 2}, "cpu_affinity: 2 threads on 1 CPUs"),
        ({"cpu_affinity": [1, 1]}, "cpu_affinity: a CPU stands twice"),
        ({"memory_bytes": 10, "budgets": {"peak_rss_bytes": 11}}, "budgets.peak_rss_bytes: 11 is more than"),
        ({"provider_options": {"Xnnpack": {}}}, "provider_options: 'Xnnpack' is not among providers"),
        ({"isa": ["avx512vnni"]}, "did you mean 'avx512_vnni'"),
        ({"session": {"inter_op_threads": 2}}, "set execution: parallel"),
        ({"session": {"config": {"session.intra_op.allowspinning": 0}}}, "'session.intra_op.allow_spinning'"),
        ({"session": {"config": {"allow spinning": 0}}}, "is no session key"),
        ({"device": {"host": "-oProxyCommand=x"}}, "does not begin with a dash"),
        ({"budgets": {"latency_ms_p95": 1}}, "did you mean 'latency_ms_p9"),
    ],
)
def test_a_target_that_contradicts_itself_is_refused(settings: dict[str, Any], expected: str) -> None:
    assert expected in faults_of(**settings)


def test_several_contradictions_are_named_at_once() -> None:
    text = faults_of(opset=22, threads=4, cores=2, cpu_affinity=[0, 0])
    assert all(place in text for place in ("opset:", "threads:", "cpu_affinity:"))


def test_what_a_release_reads_is_what_its_files_get() -> None:
    assert (made().opset, made().ir_version) == (18, 9)
    assert made(onnxruntime_min="1.20").ir_version == 10  # between two rows: what the older one reads
    newest = made(onnxruntime_min="1.99", opset=23, max_ir_version=12)
    assert (newest.opset, newest.ir_version) == (23, 12)
    for opset in onnx_versions.OPSETS:
        oldest = onnx_versions.oldest_release(opset, onnx_versions.oldest_ir(opset))
        assert oldest is not None
        assert made(onnxruntime_min=oldest, opset=opset).opset == opset


def test_the_runtime_installed_here_agrees_with_the_table(tmp_path: Path) -> None:
    """A file one IR version newer is refused by this very runtime, and one as new as the table says is read."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    release = ".".join(onnxruntime.__version__.split(".")[:2])
    reads = onnx_versions.newest_read(release)
    assert reads is not None

    def load(ir: int, opset: int) -> None:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
        onnx.save(model, tmp_path / "m.onnx")
        onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])

    load(reads.ir, reads.opset)
    if release == "1.32":  # a later release may read more than the table's last row
        with pytest.raises(Exception, match=f"max supported IR version: {reads.ir}"):
            load(reads.ir + 1, reads.opset)
        with pytest.raises(Exception, match=f"till opset {reads.opset}"):
            load(reads.ir, reads.opset + 1)


def test_options_of_yaml_become_the_text_that_the_runtime_takes() -> None:
    text = """
    name: t
    architecture: aarch64
    providers: [XnnpackExecutionProvider, CPUExecutionProvider]
    provider_options: {XnnpackExecutionProvider: {intra_op_num_threads: 4}}
    cpu_affinity: [2, 3]
    session: {arena: false, config: {session.intra_op.allow_spinning: false}}
    """
    settings = validate(Target, yaml.safe_load(text), source="t").session_settings()
    assert settings["provider_options"] == [{"intra_op_num_threads": "4"}, {}]
    assert settings["session"] == {"session.intra_op.allow_spinning": "0"}
    assert settings["cpu_affinity"] == [2, 3]
    assert settings["arena"] is False
    assert json.loads(json.dumps(settings)) == settings


def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every field with its default, dotted; a nested model stands for its own fields."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            found |= _fields(type(default), f"{prefix}{name}.")
        else:
            assert field.description, f"{prefix}{name} has no description"
            found[prefix + name] = default
    return found


def test_the_document_has_every_field_with_its_default_and_no_other() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) \|", DOCUMENT, flags=re.MULTILINE))
    fields = _fields(Target)
    assert set(rows) == set(fields)
    for name, default in fields.items():
        stated = re.fullmatch(r"`(.*)`", rows[name])
        if stated is not None:
            value = yaml.safe_load(stated[1])
            as_written = tuple(value) if isinstance(value, list) else value
            assert as_written == default or stated[1] == default, name
        else:
            assert name in ("name", "architecture") or not default, f"{name}: the default {default} is not stated"


def test_the_document_has_the_table_of_releases() -> None:
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in DOCUMENT.splitlines())}
    for release, opset, ir in zip(rows["onnxruntime"], rows["opset"], rows["IR version"], strict=True):
        assert onnx_versions.newest_read(release) == (int(opset), int(ir))
