"""The machine at hand: what it is, what it may use, and whether it is a given target.

What enters: `/proc`, `/sys` and the Python environment. What leaves: JSON-able facts that go into run.json
and profiles, and the reasons why this machine is not a target. A fact that the system does not expose is
None, so that an absence is stated and never guessed; every reader takes the root of the file system, so
that other machines can be described in tests.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # pydantic and yaml, which a device has no use for: a bundle ships this module there
    from edgecompress.settings.target import Target

ROOT = Path("/")
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
# The features that decide which kernels run, as /proc/cpuinfo spells them.
_X86_FEATURES = (
    *("sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_fp16"),
    *("avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
)
_ARM_FEATURES = ("neon", "asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16")
RELEVANT_FEATURES = frozenset(_X86_FEATURES + _ARM_FEATURES)
VNNI_FEATURES = ("avx512_vnni", "avx_vnni")
# Arm kernels give numbers instead of names ("CPU implementer", "CPU part"); the cores met most at the edge.
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd08": "Cortex-A72",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
_DISTRIBUTIONS = (
    "edgecompress",
    "torch",
    "torchvision",
    "torchao",
    "onnx",
    "onnxruntime",
    "timm",
    "torch-pruning",
    "accelerate",
    "numpy",
)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's fields, lower-cased names."""
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip().lower(), value.strip())
    return fields


def architecture() -> str:
    """`x86_64`, `aarch64`, or the system's own name for anything else."""
    name = platform.machine().lower()
    return _ARCHITECTURES.get(name, name)


def isa_features(root: Path = ROOT) -> list[str] | None:
    """Relevant CPU features, sorted, as the kernel names them; None where the system does not list them."""
    fields = _cpuinfo(root)
    flags = fields.get("flags") or fields.get("features")
    return None if flags is None else sorted(RELEVANT_FEATURES & set(flags.split()))


def has_vnni(root: Path = ROOT) -> bool:
    """Whether the CPU multiplies uint8 by int8 into 32-bit sums (AVX-512 VNNI or AVX-VNNI); False when unknown."""
    return bool(set(VNNI_FEATURES) & set(isa_features(root) or ()))


def device_model(root: Path = ROOT) -> str | None:
    """The board's name from the device tree (`Raspberry Pi 5 Model B Rev 1.0`), or None."""
    return _read(root / "proc/device-tree/model") or _read(root / "sys/firmware/devicetree/base/model")


def _cpu_name(root: Path) -> str | None:
    fields = _cpuinfo(root)
    part = fields.get("cpu part", "").lower() if fields.get("cpu implementer") == "0x41" else ""
    return fields.get("model name") or _ARM_PARTS.get(part) or platform.processor() or None


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's control group for `controller` and all its ancestors, innermost first (version 2, then 1)."""
    folders: list[Path] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = base / path.strip("/")
        # In a container the path may name a place of the host's tree that is not mounted; the base always is.
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return folders


def _cpu_quota(root: Path) -> float | None:
    """Processors that the control groups allow, as a number with a fraction; None without a limit."""
    limits: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        words = (_read(folder / "cpu.max") or "").split()
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def _memory_bytes(root: Path) -> int | None:
    """Memory that this process may use: the machine's, or less where a control group says so."""
    limits: list[int] = []
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name) or ""
            if text.isdigit():
                limits.append(int(text))
    return min(limits, default=None)


def usable_cpus() -> set[int] | None:
    """CPUs that this process may run on, as the kernel numbers them; None where the system does not say."""
    return set(os.sched_getaffinity(0)) if sys.platform == "linux" else None


def _usable_cores(quota: float | None) -> int | None:
    usable = usable_cpus()
    cores = os.cpu_count() if usable is None else len(usable)
    return cores if cores is None or quota is None else min(cores, max(1, math.ceil(quota)))


def _megahertz(root: Path, name: str) -> float | None:
    text = _read(root / "sys/devices/system/cpu/cpu0/cpufreq" / name) or ""
    return int(text) / 1000 if text.isdigit() else None


def frequency_facts(root: Path = ROOT) -> dict[str, Any]:
    """The clock of the usable CPUs now and its governor; `absent_because` says why where the system hides them.

    In a virtual machine /proc/cpuinfo may show a constant that its host made up, so `source` says where it is from.
    """
    clocks = [
        _read(path) or "" for path in sorted((root / "sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_cur_freq"))
    ]
    megahertz = [int(text) / 1000 for text in clocks if text.isdigit()]
    source = "cpufreq" if megahertz else None
    if not megahertz:
        lines = (_read(root / "proc/cpuinfo") or "").splitlines()
        words = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("cpu mhz")]
        megahertz = [float(word) for word in words if word.replace(".", "", 1).isdigit()]
        source = "cpuinfo" if megahertz else None
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    absent = None if governor is not None else "no cpufreq in this system, as in most virtual machines and containers"
    return {
        "mhz_lowest": min(megahertz, default=None),
        "mhz_highest": max(megahertz, default=None),
        "governor": governor,
        "source": source,
        "absent_because": absent,
    }


def describe_machine(root: Path = ROOT) -> dict[str, Any]:
    """Facts of the machine at hand, ready for JSON. What the system does not expose is None."""
    quota = _cpu_quota(root)
    return {
        "cpu": _cpu_name(root),
        "device_model": device_model(root),
        "architecture": architecture(),
        "isa": isa_features(root),
        "cores": _usable_cores(quota),
        "cpu_quota": quota,
        "memory_bytes": _memory_bytes(root),
        "os": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "frequency_mhz": {
            "current": _megahertz(root, "scaling_cur_freq"),
            "max": _megahertz(root, "cpuinfo_max_freq"),
        },
    }


def summarize_machine(facts: dict[str, Any]) -> str:
    """One line for people: name, architecture and cores of `describe_machine`'s facts."""
    name = facts.get("device_model") or facts.get("cpu") or "unknown CPU"
    cores = facts.get("cores")
    count = "cores unknown" if cores is None else f"{cores} core{'' if cores == 1 else 's'}"
    return f"{name} ({facts.get('architecture')}, {count})"


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on; a package that is missing is left out."""
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fits(target: Target, root: Path = ROOT) -> list[str]:
    """Reasons why the machine at hand is not this target; empty when it is."""
    facts = {"architecture": architecture(), "isa": isa_features(root), "device_model": device_model(root)}
    return mismatches(target, facts)


def mismatches(target: Target, facts: dict[str, Any], *, place: str = "this machine") -> list[str]:
    """Reasons why a machine with these facts (`describe_machine`) is not this target; empty when it is.

    An `isa` entry like `avx512_vnni|avx_vnni` asks for either feature. Where the system lists no features
    (macOS, Windows), only the architecture and the board are compared. `place` is what the reasons call it.
    """
    reasons: list[str] = []
    if target.architecture != facts["architecture"]:
        reasons.append(f"target {target.name} is {target.architecture}, {place} is {facts['architecture']}")
    present = facts["isa"]
    if not reasons and present is not None:
        for entry in target.isa:
            if not set(entry.split("|")) & set(present):
                wanted = " or ".join(entry.split("|"))
                reasons.append(f"target {target.name} has {wanted}, {place}'s CPU does not")
    board = facts["device_model"]
    if target.device_model is not None and target.device_model not in (board or ""):
        found = f"{place} is '{board}'" if board else f"{place} names no board"
        reasons.append(f"target {target.name} is a '{target.device_model}', {found}")
    return reasons
