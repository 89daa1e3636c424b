"""Exported models in, the profile of a target out: latency, memory, size, and what runs on integers.

What enters: ONNX files, `fp32` and, where there are any, `int8` (of the same network) and `baseline` (the first
model, in fp32), and the target. What leaves: the document `profile/<target>.json`, without the verdict. Where the
machine at hand is not the target nothing that depends on the clock or on memory in use is given: those fields are
null, `measured` is false, and what the files themselves say (size, MACs, integer coverage) is still there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgecompress import console
from edgecompress.errors import ProfileError
from edgecompress.machine import (
    VNNI_FEATURES,
    describe_machine,
    fits,
    frequency_facts,
    summarize_machine,
    usable_cpus,
    versions,
)
from edgecompress.measure.explanation import LATENCY_ALONE, Depth, Explained, explain
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.measure.latencies import FreshMeasurement, LatencyMeasurement
from edgecompress.measure.measuring import STANDARD, THOROUGHNESS, WINDOW_MS, measure_fresh, measure_latency
from edgecompress.measure.statistics import Interval, drift_over
from edgecompress.models.complexity import compressed_size_bytes
from edgecompress.settings.target import Target

NOISY_FRACTION = 0.05  # spread of the reference loop above which the machine counts as busy
_PERCENTILES = (50, 90, 99)
_QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999)  # the distribution, for a figure
_ISLANDS = 20
_MODELS = ("baseline", "fp32", "int8")
Json = dict[str, Any]


@dataclass(frozen=True)
class Elsewhere:
    """What was measured on another machine: `machine` is its `describe_machine`, `place` what to call it."""

    place: str
    machine: Json
    versions: dict[str, str]
    threads: int
    fresh: dict[str, FreshMeasurement]
    latency: LatencyMeasurement
    notes: tuple[str, ...] = ()


def profile_models(
    models: Mapping[str, Path],
    *,
    target: Target,
    input_npy: Path | None,
    seconds: float = 30.0,
    thoroughness: str = STANDARD,
    depth: Depth = LATENCY_ALONE,
    elsewhere: Elsewhere | None = None,
) -> Json:
    """Profile `fp32` and perhaps `int8` and `baseline` for a target; returns the document of `profile/<target>.json`.

    `input_npy` holds preprocessed images [N, ...]; `seconds` bounds the measuring of latency, `thoroughness` names one
    of measuring's presets, `depth` asks for what explains the latency. Latencies are in ms, sizes in bytes, shares are
    fractions. `int8_speedup` compares one network in two forms (fp32 over int8), `end_to_end_speedup` the baseline with
    what ships (int8 where there is one, else fp32). With `elsewhere`, nothing is measured here. Raises ProfileError.
    """
    if "fp32" not in models or set(models) - set(_MODELS):
        raise ProfileError(
            f"profile: models are named {', '.join(_MODELS)}, and fp32 must be there; got {sorted(models)}"
        )
    paths = {name: Path(models[name]) for name in _MODELS if name in models}
    document, latency = measure_side_by_side(
        paths,
        target=target,
        input_npy=input_npy,
        seconds=seconds,
        thoroughness=thoroughness,
        depth=depth,
        explained=("fp32", "int8"),
        elsewhere=elsewhere,
    )
    empty: Json = {"ratio": None, "ci95": None}
    shipped = "int8" if "int8" in paths else "fp32"
    pairs = {"int8_speedup": ("fp32", "int8"), "end_to_end_speedup": ("baseline", shipped)}
    for key, (before, after) in pairs.items():
        known = latency is not None and before in paths and after in paths
        document[key] = speedup(latency, before, after) if known and latency is not None else dict(empty)
    document["int8_mac_coverage"] = document["models"].get("int8", {}).get("int8_mac_coverage")
    return document


def measure_side_by_side(
    paths: Mapping[str, Path],
    *,
    target: Target,
    input_npy: Path | None,
    seconds: float,
    depth: Depth,
    thoroughness: str = STANDARD,
    explained: Sequence[str],
    shapes: Mapping[str, Mapping[str, Sequence[int | None]]] | None = None,
    batches: Mapping[str, int | None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> tuple[Json, LatencyMeasurement | None]:
    """The part of a profile that is alike for all files; the latencies are None where the target is not at hand.

    `explained` are the models that `depth` goes into; `shapes` [model] [input] gives free axes a size; `batches` holds
    those whose batch is fixed in the file.
    Raises ProfileError.
    """
    sizes = {name: {key: list(size) for key, size in (shapes or {}).get(name, {}).items()} for name in paths}
    static = {name: _static(path, target, sizes[name]) for name, path in paths.items()}
    here = describe_machine()
    reasons = not_at_hand(target) if elsewhere is None else []
    machine = here if elsewhere is None else elsewhere.machine
    document: Json = {
        "target": target.name,
        "measured": not reasons,
        "not_measured_because": reasons,
        "device": {
            "summary": target.description or target.name if reasons else summarize_machine(machine),
            "is_target": not reasons,
            "machine": None if reasons else machine,
        },
        "inspected_on": summarize_machine(here),
        "versions": versions() | ({} if elsewhere is None else elsewhere.versions),
        "models": {},
        "noise": None,
        "method": None,
        "frequency": None,
        "notes": _notes(
            target, measured=not reasons, machine=machine, has_images=input_npy is not None or elsewhere is not None
        ),
    }
    if reasons:
        console.note(f"{target.name} is not at hand, so no latency is measured: {'; '.join(reasons)}")
        document["models"] = {name: {**_no_timing(), **facts} for name, facts in static.items()}
        return document, None

    how: Json = {"threads": target.threads, "providers": target.providers, "input_npy": input_npy}
    how["session"] = target.session_settings()
    if elsewhere is None:
        before = frequency_facts()
        fresh = {name: measure_fresh(path, **how, shapes=sizes[name]) for name, path in paths.items()}
        settings = {name: {"shapes": own} for name, own in sizes.items() if own}
        preset = THOROUGHNESS[thoroughness]
        how_long: Json = {"narrow_enough": preset.narrow_enough, "processes": preset.processes}
        latency = measure_latency(paths, seconds=seconds, **how_long, **how, settings=settings)
        document["frequency"] = {"before": before, "after": frequency_facts()}
    else:
        fresh, latency = elsewhere.fresh, elsewhere.latency
        document["device"]["place"] = elsewhere.place
        document["notes"] += elsewhere.notes
    images = {name: (batches or {}).get(name) or 1 for name in paths}
    document["models"] = {
        name: {**_timing(latency, name, images[name]), **_loading(fresh[name]), **static[name]} for name in paths
    }
    document["noise"] = _noise(latency)
    document["method"] = _method(latency, target, next(iter(fresh.values())).processes, thoroughness, images)
    if thoroughness == "quick":
        document["notes"].append("Measured with --quick: intervals are wide; decide on a run without it.")
    document["notes"] += _noise_notes(document["noise"])
    files = {
        name: Explained(paths[name], (batches or {}).get(name), sizes[name]) for name in explained if name in paths
    }
    if elsewhere is None:
        explain(document, files, target=target, how=how, seconds=seconds, depth=depth)
    return document, latency


def _static(path: Path, target: Target, shapes: Mapping[str, Sequence[int | None]] | None) -> Json:
    """What the file says by itself, whatever the machine."""
    graph = inspect_integer_graph(path, int8_activations=target.fuses_int8_activations, shapes=shapes)
    return {
        "size_bytes": path.stat().st_size,
        "size_bytes_compressed": compressed_size_bytes(path),
        "weights_bytes": graph.weights_bytes,
        "macs": graph.macs,
        "int8_mac_coverage": graph.int8_mac_coverage,
        "integer_nodes": graph.integer_nodes,
        "quantize_nodes": graph.quantize_nodes,
        "dequantize_nodes": graph.dequantize_nodes,
        "op_counts": graph.op_counts,
        "uncounted_ops": graph.uncounted_ops,
        "float_islands_total": len(graph.float_islands),
        "float_islands": graph.float_islands[:_ISLANDS],
    }


def not_at_hand(target: Target) -> list[str]:
    """Reasons why nothing can be timed for this target on this machine; empty when it can."""
    missing = [name for name in target.providers if name not in ort.get_available_providers()]
    reasons = fits(target) + ([f"this ONNX Runtime has no {', '.join(missing)}"] if missing else [])
    usable = usable_cpus()
    absent = [str(cpu) for cpu in target.cpu_affinity if usable is not None and cpu not in usable]
    if absent:
        reasons.append(f"target {target.name} runs on CPU {', '.join(absent)}, which this process may not use")
    return reasons


def _no_timing() -> Json:
    latency: Json = {f"p{percentile}": None for percentile in _PERCENTILES}
    latency |= {"mean": None} | {f"p{percentile}_ci95": None for percentile in _PERCENTILES}
    loading = ("load_ms", "first_inference_ms", "cold_start_ms", "peak_rss_bytes")
    null: Json = dict.fromkeys(("throughput_per_s", *loading, *(f"{name}_range" for name in loading)))
    return {"latency_ms": latency, **null, "rss_before_load_bytes": None, "model_rss_bytes": None}


def _timing(measurement: LatencyMeasurement, name: str, images: int) -> Json:
    latency: Json = {}
    for percentile in _PERCENTILES:
        interval = measurement.percentile(name, percentile)
        latency[f"p{percentile}"] = interval.value
        latency[f"p{percentile}_ci95"] = [interval.low, interval.high]
    if measurement.on_cpu_ms is not None:
        latency["on_cpu_p50"] = float(np.median(np.concatenate(measurement.on_cpu_ms[name])))
    all_ms = measurement.latencies_ms(name)
    latency["mean"] = mean = float(all_ms.mean())
    quantiles = {
        f"{share:g}": float(value) for share, value in zip(_QUANTILES, np.quantile(all_ms, _QUANTILES), strict=True)
    }
    return {"latency_ms": latency, "latency_ms_quantiles": quantiles, "throughput_per_s": 1000.0 * images / mean}


def speedup(measurement: LatencyMeasurement, before: str, after: str) -> Json:
    """How many times as long one model takes as another, with the 95 % interval, ready for JSON."""
    ratio = measurement.ratio(before, after)
    return {"ratio": ratio.ratio, "ci95": [ratio.low, ratio.high]}


def _loading(fresh: FreshMeasurement) -> Json:
    peak, before = fresh.peak_rss_bytes, fresh.rss_before_load_bytes
    return {
        "model_rss_bytes": None if peak is None or before is None else peak - before,
        "load_ms": fresh.load_ms,
        "load_ms_range": list(fresh.load_ms_range),
        "first_inference_ms": fresh.first_inference_ms,
        "first_inference_ms_range": list(fresh.first_inference_ms_range),
        "cold_start_ms": fresh.cold_start_ms,
        "cold_start_ms_range": list(fresh.cold_start_ms_range),
        "peak_rss_bytes": fresh.peak_rss_bytes,
        "peak_rss_bytes_range": None if fresh.peak_rss_bytes_range is None else list(fresh.peak_rss_bytes_range),
        "rss_before_load_bytes": fresh.rss_before_load_bytes,
    }


def _spread(values: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """Interquartile range as a fraction of the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)


def _noise(measurement: LatencyMeasurement) -> Json:
    reference = np.concatenate(measurement.reference_ms)
    medians = {
        name: np.array([np.median(process) for process in processes])
        for name, processes in measurement.window_medians_ms.items()
    }
    return {
        "reference_ms": float(np.median(reference)),
        "reference_spread": _spread(reference),
        "reference_p99_over_median": float(np.percentile(reference, 99) / np.median(reference)),
        "processes_range": {name: float(m.max() / m.min() - 1) for name, m in medians.items()},
        "steady_processes": measurement.steady_processes,
        "processes": measurement.processes,
        "drift": {
            "reference": _change(measurement.drift()),
            **{name: _change(measurement.drift(name)) for name in measurement.windows_ms},
        },
        "frequency_mhz": _frequency(measurement),
        "on_cpu_share": _on_cpu_shares(measurement),
    }


def _change(factor: Interval | None) -> Json | None:
    """A change from the first process to the last, as a fraction (0.1: a tenth slower), with its 95 % interval."""
    return None if factor is None else {"change": factor.value - 1, "ci95": [factor.low - 1, factor.high - 1]}


def _on_cpu_shares(measurement: LatencyMeasurement) -> Json | None:
    """The share of an inference's time for which it really had a CPU, by model; None where several threads work."""
    shares = measurement.on_cpu_shares
    return None if shares is None else {name: float(np.median(values)) for name, values in shares.items()}


def _frequency(measurement: LatencyMeasurement) -> Json | None:
    """The CPU's frequency while measuring, None where the system does not expose it."""
    if measurement.frequency_mhz is None:
        return None
    at, seen = np.concatenate(measurement.round_at), np.concatenate(measurement.frequency_mhz)
    low, middle, high = (float(value) for value in np.percentile(seen, [0, 50, 100]))
    return {"min": low, "median": middle, "max": high, "drift": _change(drift_over(at, seen))}


def _noise_notes(noise: Json) -> list[str]:
    notes = []
    if noise["reference_spread"] > NOISY_FRACTION:
        notes.append(
            f"The machine was busy: a fixed loop of {noise['reference_ms']:.2f} ms varied by "
            f"{100 * noise['reference_spread']:.0f} % (quartiles). Measure again when it is idle."
        )
    unsteady = noise["processes"] - noise["steady_processes"]
    if unsteady:
        notes.append(f"{unsteady} of {noise['processes']} processes were not steady when their warm-up time ended.")
    shares = noise["on_cpu_share"]
    if shares is not None and min(shares.values()) < 1 - NOISY_FRACTION:
        notes.append(
            f"Other processes wanted the CPU: inferences had it for {100 * min(shares.values()):.0f} % of their time. "
            "Ratios compare time on the CPU and hold; latencies are what the clock said, waiting included."
        )
    drift = noise["drift"]["reference"]
    if drift is not None and abs(drift["change"]) > NOISY_FRACTION and drift["ci95"][0] * drift["ci95"][1] > 0:
        slower = "slower" if drift["change"] > 0 else "faster"
        notes.append(
            f"The machine got {slower} by {100 * abs(drift['change']):.0f} % while measuring (a fixed loop, from the "
            "first process to the last). It hits the models alike, so ratios hold; latencies by themselves moved."
        )
    frequency = noise["frequency_mhz"]
    if frequency is None:
        notes.append("The CPU's frequency is not exposed by this system, so its changes show in the fixed loop alone.")
    elif frequency["min"] < (1 - NOISY_FRACTION) * frequency["max"]:
        notes.append(f"The CPU ran at {frequency['min']:.0f} to {frequency['max']:.0f} MHz while measuring.")
    return notes


def _method(
    measurement: LatencyMeasurement,
    target: Target,
    fresh_processes: int,
    thoroughness: str,
    images: Mapping[str, int],
) -> Json:
    """How it was measured; `images` of one inference by model, of which `batch` is made, one number where it can be."""
    return {
        "processes": measurement.processes,
        "windows_per_model": measurement.windows,
        "inferences": {name: len(measurement.latencies_ms(name)) for name in measurement.windows_ms},
        "window_ms_at_most": WINDOW_MS,
        "batch": next(iter(images.values())) if len(set(images.values())) == 1 else dict(images),
        "threads": target.threads,
        "providers": list(target.providers),
        "graph_optimization": target.session.optimization,
        "session": target.session_settings(),
        "ratio_of": "latencies" if measurement.on_cpu_ms is None else "time on the CPU, one thread",
        "interleaved": len(measurement.windows_ms) > 1,
        "preset": thoroughness,
        "narrow_enough": THOROUGHNESS[thoroughness].narrow_enough,
        "seconds": measurement.seconds,
        "stopped_because": measurement.stopped_because,
        "interval": "95 %, Student's t over processes, bootstrap over windows",
        "fresh_processes_per_model": fresh_processes,
        "load_and_memory": "median of fresh processes; Python and ONNX Runtime included; file in the page cache",
    }


def faster_than_target(target: Target, machine: Json) -> str | None:
    """Why int8 may be faster where it was measured than on the target itself; None where nothing says so."""
    if target.architecture != "x86_64" or target.int8.weight_bits != 7:
        return None
    if not set(VNNI_FEATURES) & set(machine["isa"] or ()):
        return None
    return "The target describes a machine without VNNI; this one has it, so int8 may be faster here than there."


def _notes(target: Target, *, measured: bool, machine: Json, has_images: bool) -> list[str]:
    notes: list[str] = []
    if not measured:
        if machine["architecture"] != target.architecture:
            notes.append(f"Operators were counted by ONNX Runtime on {machine['architecture']}.")
        return notes
    faster = faster_than_target(target, machine)
    if faster is not None:
        notes.append(faster)
    if target.isa and machine["isa"] is None:
        notes.append("This system does not list CPU features; that the machine has the target's is taken on trust.")
    if machine["cores"] is not None and machine["cores"] < target.threads:
        notes.append(f"The target runs {target.threads} threads; this machine offers {machine['cores']} cores.")
    if target.cores is not None and machine["cores"] is not None and machine["cores"] > target.cores:
        notes.append(f"This machine offers {machine['cores']} cores, the target has {target.cores}.")
    if machine["governor"] not in (None, "performance"):
        notes.append(f"The CPU's frequency governor is '{machine['governor']}'; 'performance' gives steadier numbers.")
    if not has_images:
        notes.append("Random images were used.")
    return notes
