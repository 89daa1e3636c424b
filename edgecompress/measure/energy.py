"""Energy of inferences, where the platform tells: RAPL's counters, and the sensors of hwmon.

What enters: one ONNX file and how to run it. What leaves: joules an inference, above what the machine draws when idle
and in all, or the reason why the platform does not tell. Counters count the whole package, whatever else runs on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompress.measure.measuring import ask_worker

SECONDS = 1.0
_ROOT = Path("/")
Json = dict[str, Any]


@dataclass(frozen=True)
class EnergySources:
    """Files that count microjoules, each with the value at which it starts again, and files that show microwatts."""

    counters: dict[str, float | None]
    sensors: tuple[str, ...]
    absent_because: str | None


def find_sources(root: Path = _ROOT) -> EnergySources:
    """The packages' RAPL counters, else the energy or power inputs of hwmon; readable ones only, and no joule twice.

    RAPL's zone `psys` is the whole platform, packages included; zones within a package (`intel-rapl:0:0`) are not
    looked for. The sockets of amd_energy include its cores. A power sensor may show its value in two files.
    """
    zones = root / "sys/class/powercap"
    found = sorted(zones.glob("*rapl:[0-9]")) + sorted(zones.glob("*rapl:[0-9][0-9]"))
    counters = {
        str(zone / "energy_uj"): _number(zone / "max_energy_range_uj")
        for zone in found
        if _text(zone / "name") != "psys"
    }
    inputs = root / "sys/class/hwmon"
    energies = {str(path): None for path in sorted(inputs.glob("hwmon*/energy*_input")) if not _is_core(path)}
    powers = [str(path) for pattern in ("power*_input", "power*_average") for path in inputs.glob(f"hwmon*/{pattern}")]
    readable: dict[str, float | None] = {}
    for group in (counters, energies):
        readable = readable or {path: limit for path, limit in group.items() if _number(Path(path)) is not None}
    sensors: dict[str, str] = {}
    for path in powers if not readable else ():  # inputs come before averages, which reach back before the inference
        if _number(Path(path)) is not None:
            sensors.setdefault(path.rpartition("_")[0], path)
    if readable or sensors:
        return EnergySources(readable, tuple(sorted(sensors.values())), None)
    if counters or energies or powers:
        why = f"{next(iter([*counters, *energies, *powers]))} cannot be read; reading it needs root"
    else:
        why = "this platform shows no energy: neither RAPL (sys/class/powercap) nor a hwmon energy or power input"
    return EnergySources({}, (), why)


def _is_core(energy: Path) -> bool:
    return _text(energy.with_name(energy.name.replace("_input", "_label"))).startswith("Ecore")


def _text(path: Path) -> str:
    """What a file says; empty where it is not there or not to be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def measure_energy(
    model: Path,
    *,
    threads: int,
    providers: Sequence[str],
    input_npy: Path | None,
    session: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    sources: EnergySources | None = None,
    seconds: float = SECONDS,
) -> Json:
    """Joules an inference, from one fresh process that runs for `seconds` and rests for as long. Raises ProfileError.

    `joules_per_inference` is all that was drawn while inferring, `joules_per_inference_above_idle` what inferring
    added; both are null where `absent_because` says why.
    """
    sources = find_sources() if sources is None else sources
    keys = ("joules_per_inference", "joules_per_inference_above_idle", "idle_watts", "busy_watts")
    if sources.absent_because is not None:
        return {**dict.fromkeys(keys), "source": None, "absent_because": sources.absent_because}
    answer = ask_worker(
        "sustained",
        model,
        what=f"the energy of {model.name}",
        threads=threads,
        providers=providers,
        input_npy=input_npy,
        session=session,
        shapes=shapes,
        seconds=seconds,
        counters=list(sources.counters),
        sensors=list(sources.sensors),
    )
    busy, idle = (_joules(answer[part], sources) / answer[part]["seconds"] for part in ("busy", "idle"))
    per_second = answer["busy"]["runs"] / answer["busy"]["seconds"]
    values = (busy / per_second, (busy - idle) / per_second, idle, busy)
    source = next(iter([*sources.counters, *sources.sensors]))
    return {**dict(zip(keys, values, strict=True)), "source": source, "absent_because": None}


def _joules(part: Json, sources: EnergySources) -> float:
    """Counters that started again meanwhile have gone through their whole range once."""
    total = 0.0
    for before, after, limit in zip(part["before"], part["after"], sources.counters.values(), strict=True):
        total += after - before + (limit or 0.0 if after < before else 0.0)
    samples = part["samples"]
    if sources.sensors and samples:
        total += part["seconds"] * sum(sum(sample) for sample in samples) / len(samples)
    return total / 1e6
