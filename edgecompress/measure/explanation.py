"""What explains a latency: operators and modules, memory, energy, the roofline, sweeps, other settings of the runtime.

What enters: a profile with its latencies, the files, and how deep to go. What leaves: the same profile with more keys.
Whatever cannot be measured is null, and a note says why: an explanation that fails must not cost the profile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompress import console
from edgecompress.errors import ProfileError
from edgecompress.measure.energy import find_sources, measure_energy
from edgecompress.measure.kernel_times import by_module, by_operator, kernel_times
from edgecompress.measure.measuring import measure_arena
from edgecompress.measure.roofline import measure_peaks, model_share
from edgecompress.measure.runtime_options import compare_providers, sweep_options
from edgecompress.measure.sweeps import BATCHES, MORE_BATCHES, sweep
from edgecompress.settings.target import Target

_KERNEL_SECONDS = 0.5
_SMALL_SWEEP_SHARE = 0.15  # of the time for latency, each model
Json = dict[str, Any]


@dataclass(frozen=True)
class Depth:
    """How deep a profile goes; options and providers are compared for the last model, which is the one to ship.

    `explains`: operators, arena, energy and roofline. `sweeps`: `threads`, `batch`, `options`; None stands for a small
    sweep of threads and batches that costs seconds. `providers`: execution providers to compare.
    """

    explains: bool = True
    sweeps: tuple[str, ...] | None = None
    providers: tuple[str, ...] = ()


LATENCY_ALONE = Depth(explains=False, sweeps=())


@dataclass(frozen=True)
class Explained:
    """A file that is gone into: its `batch` where the file fixes it, and the sizes of its inputs' free axes."""

    path: Path
    batch: int | None
    shapes: dict[str, list[int | None]]


def explain(
    document: Json, files: Mapping[str, Explained], *, target: Target, how: Json, seconds: float, depth: Depth
) -> None:
    """Add to `document` what `depth` asks for.

    `how` holds threads, providers, images and session as the latencies were measured, `seconds` what they were allowed.
    Sweeps get as much again where they were asked for, those of options twice as much.
    """
    if depth.explains:
        for name, file in files.items():
            document["models"][name] |= _one_model(document, name, file, how)
        document["energy_absent_because"] = find_sources().absent_because
        document["roofline"] = _attempt(document, "the machine's peaks", lambda: _roofline(document, files, target))
    cores = document["device"]["machine"]["cores"] or 1
    kinds = ("threads", "batch") if depth.sweeps is None else depth.sweeps
    scaled = [kind for kind in kinds if kind != "options"]
    if scaled:
        allowed = seconds if depth.sweeps is not None else _SMALL_SWEEP_SHARE * seconds
        batches = BATCHES if depth.sweeps is None else MORE_BATCHES
        document["scaling"] = {}
        for name, file in files.items():
            asked = functools.partial(sweep, file.path, kinds=scaled, cores=cores, batch=file.batch, batches=batches)
            expected_ms = document["models"][name]["latency_ms"]["p50"] / (file.batch or 1)
            rest: Json = {**how, "shapes": file.shapes, "expected_ms": expected_ms, "seconds": allowed, "name": name}
            document["scaling"][name] = _attempt(document, f"the sweep of {name}", functools.partial(asked, **rest))
    name, file = list(files.items())[-1]
    if "options" in kinds:
        work = functools.partial(sweep_options, file.path, cores=cores, seconds=2 * seconds, shapes=file.shapes, **how)
        found = _attempt(document, f"the options of {name}", work)
        document["options"] = None if found is None else {"model": name, **found}
    if depth.providers:
        own = {key: value for key, value in how.items() if key != "providers"} | {"shapes": file.shapes}
        compare = functools.partial(compare_providers, file.path, depth.providers, seconds=seconds, **own)
        found = _attempt(document, f"the providers for {name}", compare)
        document["providers"] = None if found is None else {"model": name, **found}


def _one_model(document: Json, name: str, file: Explained, how: Json) -> Json:
    """Operators, modules, arena and energy of one file."""
    own: Json = {**how, "shapes": file.shapes}
    profiled = functools.partial(kernel_times, file.path, seconds=_KERNEL_SECONDS, **own)
    times = _attempt(document, f"the operators of {name}", profiled)
    arena = _attempt(document, f"the arena of {name}", functools.partial(measure_arena, file.path, **own))
    if arena is None:
        document["notes"].append(f"How much ONNX Runtime's arena takes for {name} is not known: its log does not tell.")
    energy = _attempt(document, f"the energy of {name}", functools.partial(measure_energy, file.path, **own))
    return {
        "operators": None if times is None else by_operator(times),
        "modules": None if times is None else by_module(times),
        "operators_ms": None if times is None else sum(kernel.ms for kernel in times.kernels),
        "arena_bytes": arena,
        "energy": energy,
    }


def _attempt(document: Json, what: str, measure: Callable[[], Any]) -> Any:
    """The result, or None with a note where it cannot be measured."""
    try:
        return measure()
    except ProfileError as error:
        note = f"{what[:1].upper()}{what[1:]} could not be measured: {' '.join(str(error).split())}"
        document["notes"].append(note)
        console.note(note)
        return None


def _roofline(document: Json, files: Mapping[str, Any], target: Target) -> Json:
    memory = document["device"]["machine"]["memory_bytes"]
    signed = target.int8.activations == "int8" or target.architecture == "aarch64"
    peaks = measure_peaks(threads=target.threads, int8_activations=signed, memory_bytes=memory)
    shares = {
        name: model_share(document["models"][name], peaks, threads=target.threads)
        for name in files
        if document["models"][name]["macs"]
    }
    return {**peaks, "models": shares}
