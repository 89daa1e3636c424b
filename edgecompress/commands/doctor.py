"""`doctor`: is this machine fit for the tool, and what do its features mean for int8 and for measuring?

What enters: the Python environment, `/proc`, `/sys`, and a second of a fixed loop. What leaves: findings in an order
that a reader can stop in: what is missing first decides, what is merely worth knowing comes last. Nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import psutil
from packaging.requirements import Requirement
from rich import box
from rich.table import Table
from rich.text import Text

from edgecompress.machine import ROOT, VNNI_FEATURES, describe_machine, summarize_machine
from edgecompress.measure.measure_worker import reference_ms
from edgecompress.measure.profiling import NOISY_FRACTION

Status = Literal["ok", "note", "problem"]
_NOISE_SECONDS = 1.5
_SMALL_DISK_BYTES = 2_000_000_000
_SMALL_MEMORY_BYTES = 2_000_000_000
_TURBO = (("intel_pstate/no_turbo", "0"), ("cpufreq/boost", "1"))  # file, and its text where turbo is on


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what that means for the user. A problem must be mended."""

    name: str
    found: str
    meaning: str
    status: Status = "ok"


def examine(root: Path = ROOT) -> list[Finding]:
    """Every finding on this machine and this Python environment."""
    machine = describe_machine(root)
    return [
        *_packages(),
        *_cpu(machine),
        *_clock(machine, root),
        *_room(machine),
        _noise(),
    ]


def doctor_document(findings: list[Finding]) -> dict[str, Any]:
    """What `doctor --json` prints."""
    problems = [finding.name for finding in findings if finding.status == "problem"]
    return {"ok": not problems, "problems": problems, "findings": [asdict(finding) for finding in findings]}


def findings_table(findings: list[Finding]) -> Table:
    """The findings as the terminal shows them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "found", "what it means"):
        table.add_column(column, overflow="fold")
    styles: dict[Status, str] = {"ok": "", "note": "yellow", "problem": "bold red"}
    for finding in findings:
        mark = "" if finding.status == "ok" else f" ({finding.status})"
        cells = (Text(finding.name), Text(finding.found), Text(finding.meaning + mark))
        table.add_row(*cells, style=styles[finding.status])
    return table


def _packages() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", python, "what the tool runs on")
    faults: list[str] = []
    texts = importlib.metadata.requires("edgecompress") or []
    wanted = [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            faults.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if faults:
        yield Finding("Packages", "; ".join(faults), "install the tool again: pip install --upgrade .", "problem")
    else:
        yield Finding("Packages", f"all {len(wanted)} that it needs, in versions that fit", "nothing to do")
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("PyTorch", f"cannot be loaded: {error}", "nothing but `profile` and `report` can run", "problem")
        return
    if torch.cuda.is_available():
        yield Finding("Training", f"on {torch.cuda.get_device_name()}", "recipes train on the GPU")
    else:
        yield Finding("Training", "on the CPU: PyTorch sees no GPU", "small nets train in minutes, large ones in days")


def _cpu(machine: dict[str, Any]) -> Iterator[Finding]:
    yield Finding("Machine", summarize_machine(machine), _cores_meaning(machine["cpu_quota"]))
    isa = machine["isa"]
    if isa is None:
        yield Finding("Int8", "this system does not list CPU features", "targets are taken on trust here", "note")
        return
    present = set(isa)
    if machine["architecture"] == "aarch64":
        yield _arm_int8(present)
    elif present & set(VNNI_FEATURES):
        amx = " and AMX" if "amx_int8" in present else ""
        yield Finding("Int8", f"VNNI{amx}", "8-bit weights are safe, and int8 is several times as fast as fp32")
    elif "avx2" in present:
        text = "8-bit weights would saturate 16-bit sums: they get 7 bits here, and int8 gains less"
        yield Finding("Int8", "AVX2 without VNNI", text, "note")
    else:
        yield Finding("Int8", "neither VNNI nor AVX2", "int8 is slower than fp32 on such CPUs", "note")
    fast = present & {"avx512_bf16", "amx_bf16", "bf16"}
    text = "precision: auto trains in bf16, except nets with depthwise layers" if fast else "training stays in fp32"
    yield Finding("bf16", ", ".join(sorted(fast)) or "none", text)


def _cores_meaning(quota: float | None) -> str:
    if quota is None:
        return "no limit on CPU time is set"
    return f"a control group allows {quota:g} CPUs: threads beyond that stand still now and then"


def _arm_int8(present: set[str]) -> Finding:
    if "i8mm" in present:
        return Finding("Int8", "dot products and int8 matrix products (i8mm)", "int8 is several times as fast as fp32")
    if "asimddp" in present:
        return Finding("Int8", "dot products (asimddp)", "int8 is about twice as fast as fp32, or more")
    return Finding("Int8", "no dot products", "int8 gains little over fp32 here; measure before relying on it", "note")


def _clock(machine: dict[str, Any], root: Path) -> Iterator[Finding]:
    governor = machine["governor"]
    if governor is None:
        yield Finding("Governor", "not exposed (usual in a virtual machine)", "the host decides on the clock")
    elif governor == "performance":
        yield Finding("Governor", governor, "the clock stays up while measuring")
    else:
        text = "latencies vary with the clock; steadier: cpupower frequency-set --governor performance"
        yield Finding("Governor", governor, text, "note")
    for name, on in _TURBO:
        path = root / "sys/devices/system/cpu" / name
        if path.is_file():
            is_on = path.read_text(encoding="ascii", errors="replace").strip() == on
            text = "a warm chip is slower than a cold one: compare within one run" if is_on else "the clock is steady"
            yield Finding("Turbo", "on" if is_on else "off", text, "note" if is_on else "ok")
            return
    yield Finding("Turbo", "not exposed", "whether the clock is raised for a while cannot be told")


def _room(machine: dict[str, Any]) -> Iterator[Finding]:
    available = int(psutil.virtual_memory().available)
    total = machine["memory_bytes"]
    found = f"{available / 1e9:.1f} GB available" + (f" of {total / 1e9:.1f} GB" if total else "")
    if available < _SMALL_MEMORY_BYTES:
        yield Finding(
            "Memory", found, "rounding a ResNet-50 needs about 3 GB; close something, or effort: fast", "note"
        )
    else:
        yield Finding("Memory", found, "enough for the networks of the edge")
    for name, folder in (("Disk", Path.cwd()), ("Temporary files", Path(tempfile.gettempdir()))):
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding(name, f"{folder}: {error.strerror}", "choose another folder", "problem")
            continue
        writable = os.access(folder, os.W_OK)
        if not writable:
            yield Finding(name, f"{folder} cannot be written", "start the tool elsewhere, or use --output", "problem")
        elif free < _SMALL_DISK_BYTES:
            text = "a run keeps every stage's weights and every exported file; make room"
            yield Finding(name, f"{free / 1e9:.1f} GB free in {folder}", text, "note")
        else:
            yield Finding(name, f"{free / 1e9:.0f} GB free in {folder}", "enough for many runs")


def _noise() -> Finding:
    """How much a fixed loop varies now: the interquartile range over the median, as profiles state it."""
    times: list[float] = []
    deadline = perf_counter() + _NOISE_SECONDS
    while perf_counter() < deadline:
        times.append(reference_ms())
    low, middle, high = np.percentile(times, [25, 50, 75])
    spread = float((high - low) / middle)
    found = f"a fixed loop of {middle:.2f} ms varies by {spread:.1%} (quartiles)"
    if spread > NOISY_FRACTION:
        return Finding("Noise", found, "something else is running: intervals will be wide, measure when idle", "note")
    return Finding("Noise", found, "quiet enough to measure latency")
