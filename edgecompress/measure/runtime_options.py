"""ONNX Runtime's own choices: execution providers side by side, and session options one by one.

What enters: one ONNX file, a target and what to compare. What leaves: tables of ratios with intervals, and the settings
that were better beyond doubt, measured once more and written out so that a user can copy them. Options are tried alone
against the target's own settings, then the best one and all that won at once: all combinations would take hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgecompress.errors import ConfigurationError, ProfileError
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.sweeps import thread_counts

CPU = "CPUExecutionProvider"
# Providers that compute on the CPU, by the name people use; the others hand the work to another device or to a service.
CPU_SIDE = {
    "cpu": CPU,
    "xnnpack": "XnnpackExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "acl": "ACLExecutionProvider",
    "armnn": "ArmNNExecutionProvider",
}
PROCESSES = 5
_GROUP = 3  # variants beside the plain one in a process, so that many sessions at once do not crowd the memory
_NARROW = 0.03
Json = dict[str, Any]
Shapes = Mapping[str, Sequence[int | None]]


def parse_providers(text: str | None) -> tuple[str, ...]:
    """`all`, or names such as `cpu,xnnpack` or onnxruntime's own, as onnxruntime spells them. Raises
    ConfigurationError for a name that is unknown or computes elsewhere."""
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["all"]:
        return tuple(CPU_SIDE.values())
    spelled = {key: name for name in CPU_SIDE.values() for key in (name.lower(), name.lower()[: -len(CPU) + 3])}
    known = {**spelled, **CPU_SIDE}
    unknown = [word for word in words if word.lower() not in known]
    if unknown or not words:
        raise ConfigurationError(f"--providers {text}: known CPU-side providers are {', '.join(CPU_SIDE)}, or all")
    return tuple(dict.fromkeys(known[word.lower()] for word in words))


def compare_providers(
    path: Path,
    wanted: Sequence[str],
    *,
    threads: int,
    input_npy: Path | None,
    seconds: float,
    session: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    available: Sequence[str] | None = None,
) -> Json:
    """Every provider that this build offers against the plain CPU provider; the others are `absent`, by name.

    Each provider gets the CPU provider behind it, for operators that it leaves. A provider that fails on this model
    is listed with its `error`. Raises ProfileError only where the CPU provider itself fails.
    """
    offered = ort.get_available_providers() if available is None else list(available)
    present = [provider for provider in wanted if provider in offered]
    absent = [provider for provider in wanted if provider not in offered]
    # A target's provider options belong to its own providers, in their order; here every provider runs as it comes.
    plain = {key: value for key, value in (session or {}).items() if key != "provider_options"}
    how: Json = {"threads": threads, "input_npy": input_npy, "session": plain, "shapes": shapes}
    chains = {provider: [provider] if provider == CPU else [provider, CPU] for provider in [CPU, *present]}
    rows: list[Json] = []
    working = {CPU: chains[CPU]}
    for provider in present:
        try:
            measure_latency(
                {provider: path}, **how, providers=chains[provider], processes=1, seconds=0.1, what=provider
            )
            working[provider] = chains[provider]
        except ProfileError as error:
            rows.append({"provider": provider, "error": str(error)})
    measured = measure_latency(
        dict.fromkeys(working, path),
        **how,
        providers=chains[CPU],
        processes=PROCESSES,
        seconds=seconds,
        settings={provider: {"providers": chain} for provider, chain in working.items()},
        what=f"{path.name} by provider",
    )
    rows = [
        _row(measured, CPU, provider) | {"provider": provider, "nodes_by_provider": _assignment(path, chain)}
        for provider, chain in working.items()
        if provider in present
    ] + rows
    return {"rows": rows, "absent": absent, "offered": offered, "reference": CPU}


def _assignment(path: Path, chain: Sequence[str]) -> dict[str, int] | None:
    """How many nodes each provider took, as the runtime says; None where this version does not say."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        groups = ort.InferenceSession(str(path), options, providers=list(chain)).get_provider_graph_assignment_info()
    except Exception:  # an older runtime knows neither the key nor the method
        return None
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.ep_name] = counts.get(group.ep_name, 0) + len(group.get_nodes())
    return counts


def option_variants(*, threads: int, cores: int) -> dict[str, Json]:
    """What is tried, by the words that a table shows: the worker's settings that each one changes."""
    variants: dict[str, Json] = {
        f"intra_op_num_threads {count}": {"threads": count} for count in thread_counts(cores) if count != threads
    }
    if max([threads, cores]) > 1:
        variants["no spinning"] = {"session": {"session.intra_op.allow_spinning": "0"}}
    variants |= {
        "no memory arena": {"arena": False},
        "no memory pattern": {"memory_pattern": False},
        "optimization extended": {"optimization": "extended"},
        "optimization basic": {"optimization": "basic"},
        "denormals as zero": {"session": {"session.set_denormal_as_zero": "1"}},
        "no prepacking": {"session": {"session.disable_prepacking": "1"}},
        "dynamic block 4": {"session": {"session.dynamic_block_base": "4"}},
    }
    return variants


def sweep_options(
    path: Path,
    *,
    threads: int,
    cores: int,
    providers: Sequence[str],
    input_npy: Path | None,
    seconds: float,
    session: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    variants: Mapping[str, Json] | None = None,
) -> Json:
    """Each option alone against the target's settings, then anew the best one, and all that were better together.

    Returns `rows` with the speed-up of each; `best`, the `options` to set with their `settings`, and as `python` to
    copy; and `checked`, their speed-up as measured anew. Of the best single one and all together, that is taken which
    is the faster one then, among those that are better beyond doubt; where neither is, none, and `checked` says how
    near it came. Raises ProfileError.
    """
    tried = dict(option_variants(threads=threads, cores=cores) if variants is None else variants)
    names, plain = list(tried), "as the target says"
    groups = [names[start : start + _GROUP] for start in range(0, len(names), _GROUP)]
    entries: Json = dict((session or {}).get("session", {}))

    def whole(variant: Json) -> Json:
        """A variant's entries stand beside the target's own, and do not replace them."""
        own = variant.get("session")
        return variant if own is None else {**variant, "session": {**entries, **own}}

    how: Json = {"threads": threads, "providers": providers, "input_npy": input_npy, "shapes": shapes}
    how["session"] = session
    how |= {"processes": PROCESSES, "narrow_enough": _NARROW, "what": f"{path.name} by session option"}
    share = seconds / (len(groups) + 1)
    rows: list[Json] = []
    for group in groups:
        settings = {name: whole(tried[name]) for name in group}
        measured = measure_latency(dict.fromkeys([plain, *group], path), **how, settings=settings, seconds=share)
        rows += [{"option": name, "settings": tried[name], **_row(measured, plain, name)} for name in group]
    rows.sort(key=lambda row: -row["speedup"])
    better = [row for row in rows if row["speedup_ci95"][0] > 1]
    # Wins among many may be luck, and options may undo each other: what is to be copied is measured anew.
    anew = {row["option"]: ([row["option"]], row["settings"]) for row in better[:1]}
    joined, together = _joined(better)
    if len(joined) > 1:
        anew["together"] = (joined, together)
    options, chosen, checked = [], {}, None
    if anew:
        settings = {name: whole(variant) for name, (_, variant) in anew.items()}
        measured = measure_latency(dict.fromkeys([plain, *anew], path), **how, settings=settings, seconds=share)
        found = {name: _row(measured, plain, name) for name in anew}
        held = [name for name, row in found.items() if row["speedup_ci95"][0] > 1]
        best = max(held or found, key=lambda name: found[name]["speedup"])
        checked = found[best]
        options, chosen = anew[best] if held else ([], {})
    measured_with = {**(session or {}), **whole(chosen)}
    return {
        "rows": rows,
        "best": {"options": options, "settings": chosen, "python": python_settings(measured_with, threads, providers)},
        "checked": checked,
    }


def _joined(better: Sequence[Json]) -> tuple[list[str], Json]:
    """Options that go together, the best first, and their settings; of two that set the same thing, the better one."""
    options: list[str] = []
    chosen: Json = {}
    for row in better:
        if not set(row["settings"]) & (set(chosen) - {"session"}):
            entries = {**row["settings"].get("session", {}), **chosen.get("session", {})}
            chosen |= row["settings"] | ({"session": entries} if entries else {})
            options.append(row["option"])
    return options, chosen


def python_settings(settings: Mapping[str, Any], threads: int, providers: Sequence[str]) -> str:
    """A measurement's settings, but for its CPUs, as the lines of Python that a user copies."""
    lines = [
        "options = onnxruntime.SessionOptions()",
        f"options.intra_op_num_threads = {settings.get('threads', threads)}",
    ]
    if not settings.get("arena", True):
        lines.append("options.enable_cpu_mem_arena = False")
    if not settings.get("memory_pattern", True):
        lines.append("options.enable_mem_pattern = False")
    level = settings.get("optimization", "all")
    if level != "all":
        name = "ORT_DISABLE_ALL" if level == "disabled" else f"ORT_ENABLE_{level.upper()}"
        lines.append(f"options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.{name}")
    if settings.get("execution") == "parallel":
        lines.append("options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL")
        lines.append(f"options.inter_op_num_threads = {settings['inter_op_threads']}")
    entries = settings.get("session", {}).items()
    lines += [f'options.add_session_config_entry("{key}", "{value}")' for key, value in entries]
    own = settings.get("provider_options") or [{}] * len(providers)
    named = [(name, dict(extra)) if extra else name for name, extra in zip(providers, own, strict=True)]
    lines.append(f'session = onnxruntime.InferenceSession("model.onnx", options, providers={named!r})')
    return "\n".join(lines)


def _row(measured: LatencyMeasurement, plain: str, name: str) -> Json:
    ratio, median = measured.ratio(plain, name), measured.percentile(name, 50)
    return {
        "latency_ms_p50": median.value,
        "latency_ms_p50_ci95": [median.low, median.high],
        "speedup": ratio.ratio,
        "speedup_ci95": [ratio.low, ratio.high],
    }
