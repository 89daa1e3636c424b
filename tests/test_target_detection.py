"""A target for the machine at hand: it loads, it fits this machine, and it states what it could not find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgecompress import machine
from edgecompress.cli import app
from edgecompress.errors import ConfigurationError
from edgecompress.machine import fits, has_vnni
from edgecompress.measure.profiling import not_at_hand
from edgecompress.settings.configuration import validate
from edgecompress.settings.target import Target, load_target
from edgecompress.settings.target_detection import cache_bytes, detected_target
from edgecompress.settings.yaml_files import parse_yaml
from test_machine import ARM, write

CACHE = "sys/devices/system/cpu/cpu0/cache/"


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["targets", *arguments])
    return result.exit_code, result.output


def test_the_file_written_loads_and_is_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "bench.yaml"
    assert invoke("detect", "--output", str(path))[0] == 0
    target = load_target(str(path))
    assert target.name == "bench"
    assert fits(target) == []
    assert not_at_hand(target) == []
    assert target.cores == machine.describe_machine()["cores"]
    if target.architecture == "x86_64":
        assert (target.int8.activations, target.int8.weight_bits) == ("uint8", 8 if has_vnni() else 7)
    assert invoke("validate", str(path))[0] == 0
    code, output = invoke("detect", "--output", str(path))
    assert (code, "is already there" in output) == (2, True)
    assert invoke("detect", "--output", str(tmp_path / "bench.json"))[0] == 2


def test_without_a_file_it_is_printed() -> None:
    code, output = invoke("detect", "--name", "mine")
    assert code == 0
    assert validate(Target, parse_yaml(output, source="x"), source="x").name == "mine"
    code, output = invoke("detect", "--json")
    assert json.loads(output)["file"] is None
    assert json.loads(output)["target"]["name"] == "this-machine"
    code, output = invoke("detect", "--name", "a b")
    assert (code, "name" in output) == (2, True)


def test_a_board_is_described_from_what_it_exposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    governor = "sys/devices/system/cpu/cpu0/cpufreq/"
    files = {
        "proc/cpuinfo": ARM,
        "proc/meminfo": "MemTotal: 4000000 kB\n",
        "proc/device-tree/model": "Raspberry Pi 5: Model B #1\0",
        governor + "scaling_governor": "ondemand\n",
        governor + "cpuinfo_max_freq": "2400000\n",
    }
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "64K"), ("1", "Instruction", "64K"), ("2", "Unified", "512K"), ("3", "Unified", "2M")]
    ):
        folder = f"{CACHE}index{index}/"
        files |= {folder + "level": level, folder + "type": kind, folder + "size": size + "\n"}
    root = write(tmp_path, files)
    assert cache_bytes(root) == {"L1 data": 65536, "L2": 524288, "L3": 2097152}
    text = detected_target(name="board", root=root)
    target = validate(Target, parse_yaml(text, source="x"), source="x")
    assert target.device_model == "Raspberry Pi 5: Model B #1"  # quoted, or YAML would end it at the sharp
    assert target.isa == ("asimd", "asimddp")
    assert (target.int8.activations, target.int8.weight_bits) == ("int8", 8)
    assert target.memory_bytes == 4_096_000_000
    for expected in ("governor ondemand", "at most 2400 MHz", "'performance' gives steadier", "L2 512 KiB"):
        assert expected in text


def test_x86_without_vnni_gets_seven_bits_and_absences_are_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    root = write(tmp_path / "old", {"proc/cpuinfo": "flags : avx2 fma\n"})
    text = detected_target(root=root)
    assert validate(Target, parse_yaml(text, source="x"), source="x").int8.weight_bits == 7
    for expected in ("not exposed by this system (usual", "not listed by this system", "# memory_bytes: not exposed"):
        assert expected in text
    silent = detected_target(root=tmp_path / "silent")
    assert "does not list CPU features" in silent
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigurationError, match="riscv64"):
        detected_target(root=root)


def test_the_schema_is_json_and_names_every_field() -> None:
    code, output = invoke("schema")
    assert code == 0
    schema = json.loads(output)
    assert set(schema["properties"]) == set(Target.model_fields)
    assert schema["required"] == ["architecture"]
    assert schema["additionalProperties"] is False
    assert "ms" in schema["$defs"]["Budgets"]["properties"]["cold_start_ms"]["description"]
