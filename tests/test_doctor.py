"""What `doctor` finds on machines that are described by a few files."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgecompress import machine
from edgecompress.cli import app
from edgecompress.commands import doctor
from edgecompress.commands.doctor import Finding, doctor_document, examine


@pytest.fixture(autouse=True)
def short_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_NOISE_SECONDS", 0.05)


def _look(root: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, architecture: str) -> dict[str, Finding]:
    monkeypatch.setattr(machine, "architecture", lambda: architecture)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {finding.name: finding for finding in examine(root)}


@pytest.mark.parametrize(
    ("architecture", "flags", "found", "status"),
    [
        ("x86_64", "flags : avx2 avx512_vnni amx_int8 amx_bf16", "VNNI and AMX", "ok"),
        ("x86_64", "flags : avx2 fma", "AVX2 without VNNI", "note"),
        ("x86_64", "flags : sse4_2", "neither VNNI nor AVX2", "note"),
        ("aarch64", "Features : asimd asimddp i8mm", "dot products and int8 matrix products (i8mm)", "ok"),
        ("aarch64", "Features : asimd asimddp", "dot products (asimddp)", "ok"),
        ("aarch64", "Features : asimd", "no dot products", "note"),
        ("x86_64", "model name : unknown", "this system does not list CPU features", "note"),
    ],
)
def test_int8_is_told_by_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, flags: str, found: str, status: str
) -> None:
    findings = _look(tmp_path, {"proc/cpuinfo": flags + "\n"}, monkeypatch, architecture)
    assert (findings["Int8"].found, findings["Int8"].status) == (found, status)


def test_clock_and_quota_say_what_they_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/cpuinfo": "flags : avx2\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/devices/system/cpu/intel_pstate/no_turbo": "0\n",
    }
    findings = _look(tmp_path, files, monkeypatch, "x86_64")
    assert "allows 1.5 CPUs" in findings["Machine"].meaning
    assert findings["Governor"].status == "note"
    assert "cpupower" in findings["Governor"].meaning
    assert findings["Turbo"].found == "on"


def test_what_is_not_exposed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = _look(tmp_path, {}, monkeypatch, "x86_64")
    assert "not exposed" in findings["Governor"].found
    assert findings["Turbo"].found == "not exposed"
    assert findings["Noise"].found.startswith("a fixed loop of")


def test_a_package_that_does_not_fit_is_a_problem_and_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnx":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "onnxruntime" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 3
    document = json.loads(done.stdout)
    assert (document["ok"], document["problems"]) == (False, ["Packages"])
    packages = next(finding for finding in document["findings"] if finding["name"] == "Packages")
    assert "onnx is missing" in packages["found"]
    assert "onnxruntime 1.0 is not" in packages["found"]
    assert CliRunner().invoke(app, ["doctor", "--no-gate"]).exit_code == 0


def test_this_installation_is_sound() -> None:
    document = doctor_document(examine())
    assert document["ok"], document["problems"]
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "what it means" in done.stdout
