"""Machines described from invented /proc and /sys trees, and the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgecompress import machine
from edgecompress.machine import describe_machine, fits, has_vnni, isa_features, summarize_machine, versions
from edgecompress.settings.target import Target

X86 = "model name : Example CPU\nflags : fpu sse2 avx2 fma avx512f avx512_vnni\n\nprocessor : 1\nflags : x\n"
ARM = "processor : 0\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\nCPU part : 0xd0b\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def target(**settings: object) -> Target:
    return Target.model_validate({"name": "t", "architecture": "x86_64", **settings})


def on(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)


def test_real_machine_is_described_in_json() -> None:
    facts = describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] >= 1
    assert facts["architecture"] in summarize_machine(facts)


def test_features_are_sorted_and_relevant(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": X86})
    assert isa_features(root) == ["avx2", "avx512_vnni", "avx512f", "fma"]
    assert describe_machine(root)["cpu"] == "Example CPU"


@pytest.mark.parametrize(("flags", "expected"), [("avx2 avx_vnni", True), ("avx512_vnni", True), ("avx2 fma", False)])
def test_vnni_has_two_spellings(tmp_path: Path, flags: str, expected: bool) -> None:
    assert has_vnni(write(tmp_path, {"proc/cpuinfo": f"flags : {flags}\n"})) is expected


def test_what_the_system_does_not_expose_is_none(tmp_path: Path) -> None:
    facts = describe_machine(tmp_path)
    for key in ("isa", "memory_bytes", "cpu_quota", "governor", "device_model"):
        assert facts[key] is None
    assert facts["frequency_mhz"] == {"current": None, "max": None}
    assert has_vnni(tmp_path) is False


def test_control_groups_limit_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    base = {"proc/meminfo": "MemTotal: 1000000 kB\n", "proc/self/cgroup": "0::/a/b\n"}
    root = write(
        tmp_path / "two",
        base
        | {
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",  # the parent's limit binds
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "268435456\n",
        },
    )
    facts = describe_machine(root)
    assert (facts["cpu_quota"], facts["cores"], facts["memory_bytes"]) == (1.5, 2, 268435456)

    old = {
        "proc/self/cgroup": "4:memory:/elsewhere\n1:cpu,cpuacct:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
    }
    facts = describe_machine(write(tmp_path / "one", base | old))
    assert (facts["cpu_quota"], facts["cores"], facts["memory_bytes"]) == (None, 8, 536870912)


def test_governor_and_frequency(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu0/cpufreq/"
    files = {"scaling_governor": "powersave\n", "scaling_cur_freq": "1500000\n", "cpuinfo_max_freq": "2400000\n"}
    facts = describe_machine(write(tmp_path, {folder + name: text for name, text in files.items()}))
    assert facts["governor"] == "powersave"
    assert facts["frequency_mhz"] == {"current": 1500.0, "max": 2400.0}


def test_fitting_machine_has_no_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "AMD64")
    root = write(tmp_path, {"proc/cpuinfo": X86})
    assert fits(target(isa=["avx2", "avx_vnni|avx512_vnni"]), root) == []


def test_missing_features_and_other_architectures_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, {"proc/cpuinfo": "flags : avx2 fma\n"})
    on(monkeypatch, "x86_64")
    assert fits(target(isa=["avx2", "avx512_vnni|avx_vnni"]), root) == [
        "target t has avx512_vnni or avx_vnni, this machine's CPU does not"
    ]
    on(monkeypatch, "arm64")
    assert fits(target(isa=["avx2"]), root) == ["target t is x86_64, this machine is aarch64"]


def test_a_server_is_no_raspberry_pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "aarch64")
    pi = target(architecture="aarch64", isa=["asimd", "asimddp"], device_model="Raspberry Pi 5")
    server = write(tmp_path / "server", {"proc/cpuinfo": ARM})
    assert fits(pi, server) == ["target t is a 'Raspberry Pi 5', this machine names no board"]
    assert describe_machine(server)["cpu"] == "Cortex-A76"
    board = write(tmp_path / "pi", {"proc/cpuinfo": ARM, "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert fits(pi, board) == []
    assert summarize_machine(describe_machine(board)).startswith("Raspberry Pi 5 Model B Rev 1.0 (aarch64")


def test_versions_name_what_is_installed() -> None:
    found = versions()
    assert {"numpy", "onnxruntime", "torch"} <= set(found)
    assert all(found.values())
