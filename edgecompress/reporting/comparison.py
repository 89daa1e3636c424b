"""Several runs or targets in, what sets them apart out: each figure with its difference to the first, and one sentence.

What enters: run directories, each with the targets it was profiled on. What leaves: one JSON-able document, from which
the pages of `compare` are rendered. What cannot be compared (other images, other machines) is said, not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgecompress.errors import ConfigurationError
from edgecompress.reporting import summary, value_text
from edgecompress.reporting.accuracy_pairs import Right, paired_difference, pairing_text, right_answers, same_images
from edgecompress.reporting.differences import SAME_WITHIN, Difference, accuracy_difference, size_ratio, time_ratio
from edgecompress.reporting.fact_rows import command_text, run_words
from edgecompress.reporting.figures import figures_of, latency_trade_off, size_trade_off
from edgecompress.reporting.report_facts import report_document
from edgecompress.reporting.summary import Json, section
from edgecompress.reporting.value_text import number
from edgecompress.reporting.variants import name_of, pair, variants
from edgecompress.run_directory import RunDirectory, is_plain_name, reading_documents

_LEAVES_SHOWN = 40
_BUSY = 0.05  # a fixed loop that differs this much between two runs: the machine was not the same


@dataclass(frozen=True)
class Candidate:
    """One run on one target: its documents, and the row of the model that ships."""

    name: str
    run: RunDirectory
    target: str
    manifest: Json
    profile: Json
    report: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def shipped(self) -> dict[str, Any]:
        """The last finished stage, with what was measured of its file."""
        finished = [row for row in self.rows if row.get("status") in ("complete", None)]
        return finished[-1] if finished else {}

    @property
    def model(self) -> Json:
        return section(self.profile, "models", summary.shipped_model(self.profile))


def comparison_document(runs: Sequence[RunDirectory], target: str | None = None) -> dict[str, Any]:
    """Everything that the comparison's pages say, as JSON.

    Each run counts once for every target that it was profiled on, or once for `target`. Raises ConfigurationError
    where fewer than two are left, and RunError for what is no run, or holds files that cannot be understood.
    """
    with reading_documents(*runs):
        return _comparison(runs, target)


def _comparison(runs: Sequence[RunDirectory], target: str | None) -> dict[str, Any]:
    candidates = _candidates(runs, target)
    if len(candidates) < 2:
        raise ConfigurationError(
            "compare: give at least two runs, or one that was profiled on two targets; "
            f"here is {candidates[0].name if candidates else 'none'}"
        )
    metrics = [_metric_row(metric, candidates) for metric in _METRICS]
    known = [row for row in metrics if any(cell["value"] is not None for cell in row["cells"])]
    return {
        "title": f"{len(candidates)} models compared",
        "reference": candidates[0].name,
        "sentence": _sentence(known, candidates),
        "notes": _notes(candidates),
        "candidates": [_candidate(candidate) for candidate in candidates],
        "metrics": known,
        "figures": _figures(candidates),
        "recipe_differences": _recipe_differences(candidates),
        "commands": [{"name": c.name, "text": command_text(*run_words(c.manifest, c.target))} for c in candidates],
    }


def _candidates(runs: Sequence[RunDirectory], target: str | None) -> list[Candidate]:
    found = []
    for run in runs:
        manifest = run.read_manifest()
        measured = sorted(path.stem for path in (run.path / "profile").glob("*.json"))
        found += [(run, name, manifest) for name in ([target] if target else measured or manifest.get("targets") or [])]
    several = len({name for _, name, _ in found}) > 1
    paths = [run.path.resolve().name for run, _, _ in found]
    candidates: list[Candidate] = []
    for (run, name, manifest), own in zip(found, paths, strict=True):
        profile = run.read_profile(name) or {}
        # Runs of one name in two folders are told apart by their whole path.
        places = {str(other.path.resolve()) for other, _, _ in found if other.path.resolve().name == own}
        called = value_text.printable(own if len(places) == 1 else run.path, limit=60)
        candidates.append(
            Candidate(
                name=f"{called} on {name}" if several else called,
                run=run,
                target=name,
                manifest=manifest,
                profile=profile,
                report=report_document(run, name),
                rows=variants(summary.stage_rows(manifest), profile),
            )
        )
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"compare: {twice} was given twice; give each run once")
    return candidates


@dataclass(frozen=True)
class Found:
    """A figure of one candidate, with its interval, and for accuracy which images were right, where that was kept."""

    value: float | None
    interval: list[float] | None
    right: Right | None = None


# What is compared: a key, how to say it, how to find it with its interval, and how two of them differ.
@dataclass(frozen=True)
class Metric:
    """One figure: `words` are those for a better and a worse one, `budget` what to call a shortage of it."""

    key: str
    label: str
    budget: str
    find: Callable[[Candidate], Found]
    differ: Callable[[Found, Found], Difference]
    words: tuple[str, str]
    by_points: bool = False
    decides: bool = True


def _latency(name: str) -> Callable[[Candidate], Found]:
    def find(candidate: Candidate) -> Found:
        latency = section(candidate.model, "latency_ms")
        return Found(number(latency.get(name)), pair(latency.get(f"{name}_ci95")))

    return find


def _of_model(key: str) -> Callable[[Candidate], Found]:
    return lambda candidate: Found(number(candidate.model.get(key)), pair(candidate.model.get(f"{key}_range")))


def _of_stage(key: str) -> Callable[[Candidate], Found]:
    return lambda candidate: Found(number(candidate.shipped.get(key)), pair(candidate.shipped.get(f"{key}_ci95")))


def _accuracy(candidate: Candidate) -> Found:
    found, stage = _of_stage("accuracy")(candidate), str(candidate.shipped.get("id", ""))
    return replace(found, right=right_answers(candidate.run, stage) if is_plain_name(stage) else None)


def _ends(found: Found) -> tuple[float, Sequence[float]]:
    assert found.value is not None
    return found.value, found.interval or [found.value, found.value]


def _by_time(reference: Found, other: Found) -> Difference:
    return time_ratio(*_ends(reference), *_ends(other))


def _by_size(reference: Found, other: Found) -> Difference:
    assert reference.value is not None
    assert other.value is not None
    return size_ratio(reference.value, other.value, reference.interval or (), other.interval or ())


def _by_points(reference: Found, other: Found) -> Difference:
    """Image by image where both kept their answers; who calls this has seen that the images are the same."""
    if reference.right is not None and other.right is not None and len(reference.right) == len(other.right):
        return paired_difference(reference.right, other.right)
    return accuracy_difference(*_ends(reference), *_ends(other))


_METRICS = (
    Metric("accuracy", "Accuracy", "accuracy", _accuracy, _by_points, ("more", "less"), by_points=True),
    Metric("latency_ms_p50", "Latency, median", "latency", _latency("p50"), _by_time, ("faster", "slower")),
    Metric(
        "latency_ms_p90",
        "Latency, 90th percentile",
        "latency",
        _latency("p90"),
        _by_time,
        ("faster", "slower"),
        decides=False,
    ),
    Metric("size_bytes", "File size", "size", _of_model("size_bytes"), _by_size, ("smaller", "larger")),
    Metric(
        "size_bytes_compressed",
        "File size, compressed",
        "size",
        _of_model("size_bytes_compressed"),
        _by_size,
        ("smaller", "larger"),
        decides=False,
    ),
    Metric("peak_rss_bytes", "Peak memory", "memory", _of_model("peak_rss_bytes"), _by_size, ("less", "more")),
    Metric("load_ms", "Load time", "load time", _of_model("load_ms"), _by_size, ("faster", "slower"), decides=False),
    Metric("macs", "MACs", "compute", _of_stage("macs"), _by_size, ("fewer", "more"), decides=False),
    Metric("params", "Parameters", "parameters", _of_stage("params"), _by_size, ("fewer", "more"), decides=False),
)


def _metric_row(metric: Metric, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """A figure of every candidate, each but the first with its difference to the first where both are known."""
    found = [metric.find(candidate) for candidate in candidates]
    cells = []
    for index, own in enumerate(found):
        comparable = index > 0 and _comparable(metric, found[0], found[index], candidates[0], candidates[index])
        difference = metric.differ(found[0], found[index]) if comparable else None
        cells.append(
            {
                "value": own.value,
                "ci95": own.interval,
                "text": value_text.quantity_text(own.value, metric.key),
                "difference": None if difference is None else difference.to_dict(),
                "difference_text": "reference" if index == 0 else _difference_text(metric, difference),
                "images_text": None if difference is None or not difference.paired else pairing_text(difference.paired),
            }
        )
    winners = _winners(metric, found, candidates) if metric.decides else None
    return {
        "key": metric.key,
        "label": metric.label,
        "budget": metric.budget,
        "cells": cells,
        "best": None if winners is None else [candidates[k].name for k in winners],
        "margin": _margin(metric, found, winners) if winners is not None else None,
    }


def _comparable(metric: Metric, one: Found, other: Found, first: Candidate, second: Candidate) -> bool:
    if one.value is None or other.value is None or (not metric.by_points and (one.value <= 0 or other.value <= 0)):
        return False
    return not metric.by_points or same_images(first.manifest, second.manifest)


def _winners(metric: Metric, found: Sequence[Found], candidates: Sequence[Candidate]) -> list[int] | None:
    """Who is best: those that the best one does not beat beyond doubt. None where something cannot be compared."""
    every = range(len(found))
    if not all(_comparable(metric, found[0], found[k], candidates[0], candidates[k]) for k in every):
        return None
    best = (max if metric.by_points else min)(every, key=lambda k: found[k].value or 0.0)
    return [k for k in every if k == best or metric.differ(found[k], found[best]).better != "this"]


def _margin(metric: Metric, found: Sequence[Found], winners: Sequence[int]) -> str | None:
    """By how much a single best one is ahead of the next, in words; None where several share the place."""
    if len(winners) != 1:
        return None
    best = winners[0]
    others = [k for k in range(len(found)) if k != best]
    next_one = (max if metric.by_points else min)(others, key=lambda k: found[k].value or 0.0)
    return _difference_text(metric, metric.differ(found[next_one], found[best]))


def _difference_text(metric: Metric, difference: Difference | None) -> str:
    if difference is None:
        return value_text.MISSING
    better, worse = metric.words
    if metric.by_points:
        low, high = value_text.points_text(difference.low), value_text.points_text(difference.high)
        return f"{value_text.points_text(difference.value)} points [{low}, {high}]"
    value, low_end, high_end = difference.value, difference.low, difference.high
    if max(abs(low_end - 1), abs(high_end - 1)) <= SAME_WITHIN:
        return "the same"
    word = better
    if value < 1:
        value, low_end, high_end, word = 1 / value, 1 / high_end, 1 / low_end, worse
    ends = "" if low_end == high_end else f" [{value_text.number_text(low_end)}, {value_text.number_text(high_end)}]"
    return f"{value_text.number_text(value)} times {word}{ends}"


def _sentence(metrics: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate]) -> str:
    """Which is better for which budget, in one plain sentence."""
    wins: dict[str, list[str]] = {}
    ties, open_ones = [], []
    for row in metrics:
        if row["best"] is None:
            if row["key"] in ("accuracy", "latency_ms_p50", "size_bytes", "peak_rss_bytes"):
                open_ones.append(row["budget"])
        elif len(row["best"]) == 1:
            wins.setdefault(row["best"][0], []).append(f"{row['budget']} ({row['margin']})")
        elif len(row["best"]) == len(candidates):
            ties.append(row["budget"])
        else:
            wins.setdefault(" or ".join(row["best"]), []).append(row["budget"])
    parts = []
    if len(wins) == 1 and not open_ones:
        ((name, reasons),) = wins.items()
        parts.append(f"{name} is better for {_listed(reasons)}")
    else:
        parts += [
            f"take {name} where {_listed(reasons)} count{'s' * (len(reasons) == 1)}" for name, reasons in wins.items()
        ]
    if ties:
        parts.append(f"no difference in {_listed(ties)} was found")
    if ties:
        parts += _yet(metrics, candidates, ties=ties, all_tied=not wins)
    if open_ones:
        parts.append(f"{_listed(open_ones)} cannot be compared")
    text = "; ".join(parts)
    if not text:
        return "Nothing was measured that could be compared."
    begins_with_a_name = len(wins) == 1 and not open_ones
    return f"{text}." if begins_with_a_name else f"{text[:1].upper()}{text[1:]}."


def _yet(
    metrics: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate], *, ties: Sequence[str], all_tied: bool
) -> list[str]:
    """What differs beyond doubt where the sentence says that nothing does: figures that decide nothing by themselves.

    They count where their own budget is among the `ties`, and all of them where nothing else tells two models apart.
    """
    decide = {metric.key for metric in _METRICS if metric.decides}
    rows = [row for row in metrics if row["key"] not in decide and (all_tied or row["budget"] in ties)]
    parts = []
    for index, candidate in enumerate(candidates):
        apart = [
            f"{row['label']} ({row['cells'][index]['difference_text']})"
            for row in rows
            if (row["cells"][index]["difference"] or {"better": "neither"})["better"] != "neither"
        ]
        if apart:
            parts.append(f"yet {candidate.name} differs from {candidates[0].name} in {_listed(apart)}")
    return parts


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _notes(candidates: Sequence[Candidate]) -> list[str]:
    """What makes a comparison mean less than it seems."""
    notes = []
    first = candidates[0]
    for other in candidates[1:]:
        named = f"{first.name} and {other.name}"
        if not same_images(first.manifest, other.manifest):
            notes.append(f"{named} were tested on other images, so their accuracies are not compared.")
        elif any(_accuracy(candidate).right is None for candidate in (first, other)):
            notes.append(
                f"{named} were tested on the same images, but one of them did not keep which it got right, so their "
                "accuracies are compared like those of other images, with a wider interval; a new run narrows it."
            )
        if not (first.profile.get("measured") and other.profile.get("measured")):
            continue
        machines = [section(c.profile, "device").get("summary") for c in (first, other)]
        if machines[0] != machines[1]:
            notes.append(f"Latencies of {named} come from two machines: {machines[0]}; {machines[1]}.")
            continue
        loops = [number(section(c.profile, "noise").get("reference_ms")) for c in (first, other)]
        if loops[0] and loops[1] and abs(loops[1] / loops[0] - 1) > _BUSY:
            change = value_text.change_text(loops[0], loops[1], less="faster", more="slower")
            notes.append(
                f"The machine itself was {change} when {other.name} was measured than for {first.name} (by its fixed "
                "loop); measure both again when it is idle, or side by side: edgecompress profile a.onnx b.onnx."
            )
        threads = [section(c.profile, "method").get("threads") for c in (first, other)]
        if threads[0] != threads[1]:
            notes.append(f"{first.name} was measured with {threads[0]} thread(s), {other.name} with {threads[1]}.")
    unmeasured = [c.name for c in candidates if not c.profile.get("measured")]
    if unmeasured:
        notes.append(f"No latency was measured for {_listed(unmeasured)}.")
    return list(dict.fromkeys(notes))


def _candidate(candidate: Candidate) -> dict[str, Any]:
    decision = candidate.report["decision"]
    return {
        "name": candidate.name,
        "run": str(candidate.run.path),
        "target": candidate.target,
        "verdict": decision["verdict"],
        "label": decision["label"],
        "first": next(iter([*decision["notes"], *decision["reasons"]]), ""),
        "budgets": decision["budgets"],
        "stage": value_text.printable(candidate.shipped.get("id", value_text.MISSING), limit=40),
        "accuracy_split": candidate.shipped.get("accuracy_split"),
        "samples": candidate.shipped.get("samples"),
    }


def _figures(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Both trade-offs with every variant of every candidate; a colour and a mark a candidate, named by its number."""
    rows = [
        {**row, "label": f"{k}: {name_of(row)}", "series": f"{k}: {candidate.name}", "color": k - 1}
        for k, candidate in enumerate(candidates, 1)
        for row in candidate.rows
    ]
    return figures_of(latency_trade_off(rows), size_trade_off(rows))


def _recipe_differences(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Every setting of the resolved recipes that is not the same in all."""
    leaves = [dict(_leaves(section(candidate.manifest, "recipe"))) for candidate in candidates]
    keys = list(dict.fromkeys(key for own in leaves for key in own))
    rows = [
        {
            "setting": value_text.printable(key, limit=80),
            "values": [value_text.printable(own.get(key, value_text.MISSING), limit=60) for own in leaves],
        }
        for key in keys
        if len({repr(own.get(key)) for own in leaves}) > 1
    ]
    return {"rows": rows[:_LEAVES_SHOWN], "hidden": max(0, len(rows) - _LEAVES_SHOWN)}


def _leaves(value: object, place: str = "") -> list[tuple[str, object]]:
    """Dotted places with their values; stages go by their ids."""
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{place}.{key}".lstrip("."))]
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        named = [(str(item.get("id") or k), item) for k, item in enumerate(value)]
        return [leaf for key, item in named for leaf in _leaves(item, f"{place}.{key}")]
    return [(place, value)]
