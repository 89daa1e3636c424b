"""Whether to ship: a profile and the gates in, one verdict with its reasons out.

What enters: the profile's document, the target's budgets, the gates that were missed. What leaves: `ship`,
`hold` or `inconclusive`, with reasons in plain sentences. A budget on what varies from process to process counts as
missed only when the whole interval lies beyond it; where the interval straddles the budget, or nothing could be
measured, the answer is `inconclusive`, because a coin toss that stops a release helps nobody. Size and accuracy are
judged by their values: the same file gives the same answers on the same images every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgecompress.measure.profiling import NOISY_FRACTION, faster_than_target
from edgecompress.settings.gates import allows_drop
from edgecompress.settings.target import Target

_SAME_ACCURACY = 5e-5  # a drop that two decimals of a point would show as 0.00
Json = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """`missed` holds those reasons that are missed gates or budgets; any of them makes the verdict `hold`."""

    verdict: Literal["ship", "hold", "inconclusive"]
    reasons: list[str]
    missed: list[str]


@dataclass
class _Findings:
    first: list[str] = field(default_factory=list)
    slower: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


def decide(profile: Json, *, target: Target, gates_missed: Sequence[str], accuracy_drop: float | None) -> Verdict:
    """Judge a profile against a target's budgets.

    `gates_missed` are sentences about missed parity or accuracy gates; `accuracy_drop` is a fraction against
    the recipe's first model, None where it was not measured. The model judged is int8 where there is one.
    Reasons come in order of weight: int8 that is slower than fp32 first of all, whatever the target allows, then that
    the machine measured is faster than the target, a model that was not found to be faster than the first one, or int8
    than fp32, then what was missed, what is in doubt, what holds, and last that the machine was busy, which is in the
    intervals and decides nothing.
    """
    findings = _Findings()
    name = "int8" if "int8" in profile["models"] else "fp32"
    _remark_on_the_way_from_the_baseline(name, profile, findings)
    _judge_speedup(profile, target, findings)
    findings.missed += gates_missed
    _judge_accuracy(target, accuracy_drop, findings)
    _judge_costs(name, profile, target, findings)
    return _verdict(findings)


def _verdict(findings: _Findings) -> Verdict:
    verdict: Literal["ship", "hold", "inconclusive"] = "ship"
    if findings.missed:
        verdict = "hold"
    elif findings.doubts:
        verdict = "inconclusive"
    by_weight = (
        *(findings.slower, findings.first, findings.remarks, findings.missed),
        *(findings.doubts, findings.met, findings.cautions),
    )
    reasons = dict.fromkeys(text for texts in by_weight for text in texts)  # what is slower may be missed too
    return Verdict(verdict, list(reasons), list(findings.missed))


def judge_budgets(name: str, profile: Json, *, target: Target) -> Verdict:
    """Judge one file alone against a target's budgets of size, time and memory; nothing is asked of its accuracy."""
    findings = _Findings()
    _judge_costs(name, profile, target, findings)
    return _verdict(findings)


def _judge_costs(name: str, profile: Json, target: Target, findings: _Findings) -> None:
    model = profile["models"][name]
    _judge_size(name, model, target, findings)
    if profile["measured"]:
        machine = (profile.get("device") or {}).get("machine")
        faster = faster_than_target(target, machine) if machine else None
        findings.first += [faster] if faster else []
        _judge_intervals(name, model, target, findings, crowded=_crowded(profile))
    else:
        why = "; ".join(profile["not_measured_because"]) or "the target is not at hand"
        findings.doubts.append(f"Latency, load time and memory were not measured: {why}.")
    _caution_about_noise(profile, findings)


def _judge_speedup(profile: Json, target: Target, findings: _Findings) -> None:
    """The budget alone decides; whether int8 is called faster or slower is between its interval and 1."""
    speedup = profile["int8_speedup"]
    if "int8" not in profile["models"] or speedup["ratio"] is None:
        return
    low, high = speedup["ci95"]
    budget = target.budgets.min_int8_speedup
    least = 0.0 if budget is None else budget  # every speed meets it
    finding = "was not found to be faster"
    if low > 1:
        finding = "is faster"
    elif high < 1:
        finding = "is slower"
    weakness = ", but not by enough" if low > 1 and high < least else ""
    text = (
        f"Int8 {finding} than fp32{weakness}: fp32 takes {_times(speedup['ratio'])} times as long as int8 "
        f"(95 % interval {_times(low)} to {_times(high)})"
    )
    text += "" if budget is None else f"; the target asks for at least {budget:g}"
    if low < least <= high:
        text += ", which lies within the interval"
    text += "."
    if high < 1:  # the target may allow it, and still it must not go unsaid
        findings.slower.append(text)
    if high < least:
        findings.missed.append(text)
    elif low < least:
        findings.doubts.append(text)
    else:
        (findings.met if low > 1 else findings.remarks).append(text)


def _remark_on_the_way_from_the_baseline(name: str, profile: Json, findings: _Findings) -> None:
    """How much faster than the first model: no budget asks for it, but everybody does."""
    speedup = profile.get("end_to_end_speedup") or {}
    if speedup.get("ratio") is None:
        return
    low, high = speedup["ci95"]
    measured = (
        f"the baseline takes {_times(speedup['ratio'])} times as long (95 % interval {_times(low)} to {_times(high)})"
    )
    subject = name.capitalize()
    if low > 1:
        findings.met.append(f"{subject} is faster than the baseline: {measured}.")
    elif high < 1:
        findings.remarks.append(f"{subject} is slower than the baseline: {measured}.")
    else:
        findings.remarks.append(f"{subject} was not found to be faster than the baseline: {measured}.")


def _caution_about_noise(profile: Json, findings: _Findings) -> None:
    noise = profile.get("noise")
    if not noise:
        return
    causes = []
    if noise["reference_spread"] > NOISY_FRACTION:
        causes.append(f"a fixed loop varied by {100 * noise['reference_spread']:.0f} %")
    unsteady = noise["processes"] - noise["steady_processes"]
    if unsteady:
        causes.append(f"{unsteady} of {noise['processes']} processes were not steady after their warm-up")
    shares = noise.get("on_cpu_share") or {}
    if _crowded(profile):
        causes.append(f"inferences had the CPU for {100 * min(shares.values()):.0f} % of their time")
    if causes:
        busy = noise["reference_spread"] > NOISY_FRACTION or _crowded(profile)
        where = "on a busy machine" if busy else "at an unsteady speed"
        findings.cautions.append(
            f"Measured {where}: {' and '.join(causes)}; the intervals include it. Measure again when idle."
        )


def _crowded(profile: Json) -> bool:
    """Whether other processes took the CPU away from inferences while they were timed."""
    shares = (profile.get("noise") or {}).get("on_cpu_share") or {}
    return bool(shares) and min(shares.values()) < 1 - NOISY_FRACTION


def _judge_accuracy(target: Target, drop: float | None, findings: _Findings) -> None:
    budget = target.budgets.max_accuracy_drop
    if budget is None:
        return
    if drop is None:
        findings.doubts.append(f"The accuracy drop is not known; the target allows {_points(budget)}.")
    elif not allows_drop(budget, drop):
        findings.missed.append(f"Accuracy drops by {_points(drop)}; the target allows {_points(budget)}.")
    else:
        change = f"drops by {_points(drop)}" if drop > 0 else f"rises by {_points(-drop)}"
        change = "stays the same" if abs(drop) < _SAME_ACCURACY else change
        findings.met.append(f"Accuracy {change}; the target allows a drop of {_points(budget)}.")


def _judge_size(name: str, model: Json, target: Target, findings: _Findings) -> None:
    budget = target.budgets.size_bytes
    if budget is None:
        return
    text = f"The {name} file has {_megabytes(model['size_bytes'])}; the target allows {_megabytes(budget)}."
    (findings.missed if model["size_bytes"] > budget else findings.met).append(text)


def _judge_intervals(name: str, model: Json, target: Target, findings: _Findings, *, crowded: bool) -> None:
    budgets = target.budgets
    latency = model["latency_ms"]
    latencies = (("p50", budgets.latency_ms_p50), ("p90", budgets.latency_ms_p90), ("p99", budgets.latency_ms_p99))
    quantities: list[tuple[str, Any, Any, float | None, Callable[[float], str], str]] = [
        (f"Latency ({share})", latency.get(share), latency.get(f"{share}_ci95"), budget, _milliseconds, "95 % interval")
        for share, budget in latencies
    ]
    for label, key, limit, unit in (
        ("Peak memory", "peak_rss_bytes", budgets.peak_rss_bytes, _megabytes),
        ("Load time", "load_ms", budgets.load_ms, _milliseconds),
        ("The first inference", "first_inference_ms", budgets.first_inference_ms, _milliseconds),
        ("Cold start (load and first inference)", "cold_start_ms", budgets.cold_start_ms, _milliseconds),
    ):
        quantities.append((label, model.get(key), model.get(f"{key}_range"), limit, unit, "range"))
    least, most = model.get("peak_rss_bytes_range") or (0, 0)
    if target.memory_bytes is not None and most > target.memory_bytes:
        peak, memory = _megabytes(model["peak_rss_bytes"]), _megabytes(target.memory_bytes)
        text = f"Peak memory of {name} is {peak} (range {_megabytes(least)} to {_megabytes(most)})"
        beyond = findings.missed if least > target.memory_bytes else findings.doubts
        beyond.append(f"{text}; the whole device has {memory}.")
    # Where other processes took the CPU away, the clock alone cannot tell that the model is too slow.
    alone = latency.get("on_cpu_p50") if crowded else None
    for what, value, interval, budget, show, kind in quantities:
        if budget is None:
            continue
        if value is None:
            findings.doubts.append(f"{what} could not be measured on this system; the target allows {show(budget)}.")
            continue
        low, high = interval
        text = (
            f"{what} of {name} is {show(value)} ({kind} {show(low)} to {show(high)}); the target allows {show(budget)}"
        )
        if low > budget and what.startswith("Latency") and alone is not None and alone <= budget:
            findings.doubts.append(f"{text}. By median it had the CPU for {show(alone)} only: measure when idle.")
        elif low > budget:
            findings.missed.append(f"{text}.")
        elif high > budget:
            findings.doubts.append(f"{text}, which lies within the {kind}.")
        else:
            findings.met.append(f"{text}.")


def _times(ratio: float) -> str:
    """Two decimals, and a third where they would hide on which side of 1 it lies."""
    text = f"{ratio:.2f}"
    return f"{ratio:.3f}" if text == "1.00" and ratio != 1 else text


def _points(fraction: float) -> str:
    return f"{fraction * 100:.2f} points"


def _megabytes(size: float) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size < 1e7 else f"{size / 1e6:.1f} MB"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
