"""The machine at hand as a target file, with comments.

What enters: the facts that the system exposes. What leaves: YAML for `targets/`, which loads as it is. What the
system does not expose is left out with a comment that says so, and no budget is made up: what a model may cost is
for the owner of the device to say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from edgecompress.errors import ConfigurationError
from edgecompress.machine import ROOT, VNNI_FEATURES, describe_machine, versions
from edgecompress.run_directory import write_text
from edgecompress.settings.configuration import validate
from edgecompress.settings.onnx_versions import OPSETS, newest_read
from edgecompress.settings.target import Target
from edgecompress.settings.yaml_files import parse_yaml

DEFAULT_NAME = "this-machine"
_QUANTIZATION = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
_CACHE_FILES = ("level", "type", "size")
_CACHE_UNITS = {"K": 1024, "M": 1024**2}


def cache_bytes(root: Path = ROOT) -> dict[str, int]:
    """Sizes of the first CPU's caches by name (`L1 data`, `L2`, `L3`), empty where the system does not list them."""
    found: dict[str, int] = {}
    for folder in sorted(root.glob("sys/devices/system/cpu/cpu0/cache/index*")):
        try:
            level, kind, size = ((folder / name).read_text(encoding="ascii").strip() for name in _CACHE_FILES)
        except (OSError, UnicodeDecodeError):
            continue
        if kind != "Instruction" and re.fullmatch(r"\d+[KM]", size):
            name = f"L{level}" if kind == "Unified" else f"L{level} {kind.lower()}"
            found[name] = int(size[:-1]) * _CACHE_UNITS[size[-1]]
    return found


def detected_target(*, name: str = DEFAULT_NAME, root: Path = ROOT) -> str:
    """A target file for the machine at hand. Raises ConfigurationError for a name or a CPU that cannot be a target."""
    machine = describe_machine(root)
    if machine["architecture"] not in ("x86_64", "aarch64"):
        raise ConfigurationError(
            f"this machine is {machine['architecture']}; targets are x86_64 or aarch64, and no other has int8 kernels"
        )
    text = _text(name, machine, cache_bytes(root), versions().get("onnxruntime"))
    validate(Target, parse_yaml(text, source="detected target"), source="--name" if name != DEFAULT_NAME else "target")
    return text


def write_target(path: Path, text: str) -> None:
    """Write a target file. Raises ConfigurationError where one is already there, or none can be."""
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"--output {path}: a target is a YAML file; name it {path.with_suffix('.yaml')}")
    if path.exists():
        raise ConfigurationError(f"--output {path}: is already there; choose another name or remove it")
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigurationError(f"--output {path}: cannot be written: {error.strerror}") from error


def _text(name: str, machine: dict[str, Any], caches: dict[str, int], runtime: str | None) -> str:
    cpu = machine["device_model"] or machine["cpu"] or "unknown CPU"
    isa: list[str] | None = machine["isa"]
    activations, bits, why = _scheme(machine["architecture"], isa)
    lines = [
        f"# {cpu}, as `edgecompress targets detect` found it.",
        "#",
        f"#   edgecompress profile --target {name}.yaml",
        "#",
        f"# Caches: {_caches_text(caches)}. Kernel: {machine['os']} {machine['kernel']}.",
        f"# {_frequency_text(machine)}",
        "# Change first: budgets (what your product can afford), then threads.",
        f"name: {_scalar(name)}",
        f"description: {_scalar(cpu)}",
        "sources:",
        f"  - {_QUANTIZATION}",
        f"architecture: {machine['architecture']}",
    ]
    if isa is None:
        lines.append("# isa: this system does not list CPU features; write them down if a profile must insist on them")
    else:
        lines += ["isa:                             # a machine without one of these is not this target"]
        lines += [f"  - {feature}" for feature in isa]
    if machine["device_model"]:
        lines.append(f"device_model: {_scalar(machine['device_model'])}")
    lines.append(_fact("cores", machine["cores"], "cores that this process may use"))
    lines.append(_fact("memory_bytes", machine["memory_bytes"], "memory that this process may use"))
    minimum, note = _runtime(runtime)
    lines += [
        "providers: [CPUExecutionProvider]",
        "threads: 1                       # one core per inference; more where the device does one thing",
        f"# {why}",
        "int8:",
        f"  activations: {activations}",
        f"  weight_bits: {bits}",
        "  conv_kernels: auto             # each convolution's fastest kernel, measured when a model is exported here",
        "channel_multiple: 8",
        f"onnxruntime_min: '{minimum}'          # {note}",
        f"opset: {OPSETS[0]}",
        "budgets:",
        "  max_accuracy_drop: 0.02        # fraction, against the recipe's first model",
        "  min_int8_speedup: 1.0          # an int8 model that is slower than fp32 is never shipped",
        "  # latency_ms_p90: 50           # your own limits: no model here can tell what your product needs",
        "  # size_bytes: 50_000_000",
        "  # peak_rss_bytes: 500_000_000",
        "  # cold_start_ms: 1000",
    ]
    return "\n".join(lines) + "\n"


def _scheme(architecture: str, isa: list[str] | None) -> tuple[str, int, str]:
    """Activations, weight bits and the reason."""
    if architecture == "aarch64":
        return "int8", 8, "Int8 by int8: Arm kernels sum signed products in 32 bits, so 8-bit weights are safe."
    if set(VNNI_FEATURES) & set(isa or ()):
        return "uint8", 8, "VNNI sums uint8 by int8 products in 32 bits, so 8-bit weights are safe and fastest."
    return "uint8", 7, "No VNNI: sums of two products in 16 bits saturate with 8-bit weights, with 7 they cannot."


def _runtime(installed: str | None) -> tuple[str, str]:
    """The release to export for, and a note: the installed one; where that is unknown or unlisted, the default."""
    release = ".".join((installed or "").split(".")[:2])
    if re.fullmatch(r"1\.\d+", release) and newest_read(release) is not None:
        return release, f"what is installed here is {installed}; lower it for an older device"
    return str(Target.model_fields["onnxruntime_min"].default), "the release installed here is not known"


def _caches_text(caches: dict[str, int]) -> str:
    return ", ".join(f"{name} {size // 1024} KiB" for name, size in caches.items()) or "not listed by this system"


def _frequency_text(machine: dict[str, Any]) -> str:
    governor, highest = machine["governor"], machine["frequency_mhz"]["max"]
    if governor is None and highest is None:
        return "CPU frequency and governor: not exposed by this system (usual in a virtual machine)."
    parts = [f"governor {governor or 'not exposed'}"]
    parts.append(f"at most {highest:.0f} MHz" if highest is not None else "highest frequency not exposed")
    if governor not in (None, "performance"):
        parts.append("'performance' gives steadier numbers")
    return f"CPU frequency: {'; '.join(parts)}."


def _fact(key: str, value: int | None, note: str) -> str:
    if value is None:
        return f"# {key}: not exposed by this system"
    return f"{f'{key}: {value}':<32} # {note}"


def _scalar(text: str) -> str:
    """A value as one line of YAML, quoted where it must be."""
    return yaml.safe_dump(str(text), default_style=None, width=10_000, allow_unicode=True).splitlines()[0]
