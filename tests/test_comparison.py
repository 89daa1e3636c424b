"""Comparing runs: differences with intervals that hold, one sentence, and what cannot be compared is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CommandLine
from edgecompress.errors import ConfigurationError, RunError
from edgecompress.reporting.accuracy_pairs import paired_difference
from edgecompress.reporting.comparison import comparison_document
from edgecompress.reporting.differences import accuracy_difference, size_ratio, time_ratio
from edgecompress.run_directory import RunDirectory, read_json, write_json
from edgecompress.training.evaluate import wilson_interval
from report_runs import HOSTILE, MANIFEST, PROFILE, full_run, make_run
from test_report import HtmlPage


def _run(
    path: Path, *, speed: float = 1.0, accuracy: float = 0.975, size: int = 112_480, **manifest: Any
) -> RunDirectory:
    """A run whose int8 model is `speed` times as fast as that of the others."""
    profile, stages = copy.deepcopy(PROFILE), copy.deepcopy(MANIFEST["stages"])
    latency = profile["models"]["int8"]["latency_ms"]
    profile["models"]["int8"]["latency_ms"] = {
        key: [end / speed for end in value] if isinstance(value, list) else value / speed
        for key, value in latency.items()
    }
    profile["models"]["int8"]["size_bytes"] = size
    stages[-1] |= {"accuracy": accuracy, "accuracy_ci95": list(wilson_interval(accuracy, 360))}
    return make_run(path, manifest={"stages": stages, **manifest}, profile=profile)


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        one, other = generator.binomial(300, 0.9) / 300, generator.binomial(300, 0.85) / 300
        found = accuracy_difference(one, wilson_interval(one, 300), other, wilson_interval(other, 300))
        held += found.low <= -5.0 <= found.high
    assert 0.93 <= held / 1000 <= 0.98


def test_a_ratio_of_times_and_of_sizes() -> None:
    found = time_ratio(2.0, [1.9, 2.1], 1.0, [0.98, 1.02])
    assert found.value == pytest.approx(2.0)
    assert 1.85 < found.low < 1.92 < 2.08 < found.high < 2.15
    assert found.better == "this"
    assert time_ratio(1.0, [0.9, 1.1], 1.05, [0.95, 1.15]).better == "neither"
    assert time_ratio(1.0, [0.99, 1.01], 2.0, [1.9, 2.1]).better == "reference"
    assert size_ratio(1000, 1001).better == "neither"
    assert size_ratio(1000, 500).to_dict() == {"value": 2.0, "ci95": [2.0, 2.0], "better": "this"}
    assert size_ratio(100, 90, (80, 120), (85, 95)).better == "neither"


def test_one_sentence_says_which_is_better_for_what(tmp_path: Path) -> None:
    sharp = _run(tmp_path / "sharp", accuracy=0.99)
    small = _run(tmp_path / "small", accuracy=0.90, speed=1.5, size=50_000)
    document = comparison_document([sharp, small])
    assert document["sentence"] == (
        "Take sharp where accuracy (+9.0 points [+5.8, +12.6]) counts; "
        "take small where latency (1.50 times faster [1.48, 1.52]) and size (2.25 times smaller) count; "
        "no difference in memory was found."
    )
    rows = {row["key"]: row for row in document["metrics"]}
    assert rows["accuracy"]["best"] == ["sharp"]
    assert rows["latency_ms_p50"]["cells"][1]["difference"]["better"] == "this"
    assert rows["size_bytes"]["cells"][1]["difference_text"] == "2.25 times smaller"
    assert rows["peak_rss_bytes"]["best"] == ["sharp", "small"]
    labels = [point["label"] for point in document["figures"][1]["points"]]
    assert labels[0].startswith("1: dense")
    assert len(labels) == 6


def _answers(run: RunDirectory, right: Any) -> RunDirectory:
    """The run, with which of its images its last stage got right."""
    folder = run.stage("int8")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "right.npy", np.asarray(right))
    return run


def test_the_same_images_are_compared_one_by_one(tmp_path: Path) -> None:
    before = np.arange(360) < 333
    after = before.copy()
    after[[340, 341, 342, 343, 344, 345, 346, 347, 348]] = True  # 9 won, none lost: p = 2 / 2**9
    one = _answers(_run(tmp_path / "a", accuracy=333 / 360), before)
    other = _answers(_run(tmp_path / "b", accuracy=342 / 360), after)
    row = comparison_document([one, other])["metrics"][0]
    difference = row["cells"][1]["difference"]
    assert difference["paired"] == {"samples": 360, "lost": 0, "won": 9, "p_value": pytest.approx(2 / 2**9)}
    assert difference["value"] == pytest.approx(2.5)
    assert 0 < difference["ci95"][0] < 2.5 < difference["ci95"][1] < 5
    assert row["cells"][1]["images_text"] == "of 360 images 9 won and 0 lost, p = 0.0039"
    assert row["best"] == ["b"]
    apart = accuracy_difference(333 / 360, wilson_interval(333 / 360, 360), 342 / 360, wilson_interval(342 / 360, 360))
    assert apart.better == "neither", "as independent samples the same numbers would tell nothing"
    swapped = comparison_document([other, one])["metrics"][0]["cells"][1]["difference"]
    assert (swapped["paired"]["lost"], swapped["better"]) == (9, "reference")
    assert swapped["ci95"] == pytest.approx([-end for end in reversed(difference["ci95"])])


def test_the_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        kinds = generator.choice(4, size=300, p=[0.85, 0.07, 0.02, 0.06])  # both, the first, the other, none
        found = paired_difference(np.isin(kinds, (0, 1)), np.isin(kinds, (0, 2)))
        held += found.low <= -5.0 <= found.high
    assert 0.93 <= held / 1000 <= 0.98


def test_what_cannot_be_paired_is_said(tmp_path: Path) -> None:
    right = np.arange(360) < 351
    one, other = _answers(_run(tmp_path / "a"), right), _run(tmp_path / "b")
    document = comparison_document([one, other])
    assert document["metrics"][0]["cells"][1]["images_text"] is None
    assert "a and b were tested on the same images, but one of them did not keep" in " ".join(document["notes"])
    assert "paired" not in document["metrics"][0]["cells"][1]["difference"]
    with pytest.raises(RunError, match=r"right\.npy: holds no answers"):
        comparison_document([one, _answers(other, np.zeros(360))])


def test_other_training_images_do_not_matter_for_what_is_reported(tmp_path: Path) -> None:
    data = [MANIFEST["data"] | {"fingerprint": own, "report_fingerprint": "same"} for own in ("few", "many")]
    runs = [_answers(_run(tmp_path / d["fingerprint"], data=d), np.arange(360) < 351) for d in data]
    document = comparison_document(runs)
    assert document["metrics"][0]["cells"][1]["difference"]["paired"]["samples"] == 360
    assert "other images" not in " ".join(document["notes"])


def test_a_difference_within_chance_is_none(tmp_path: Path) -> None:
    document = comparison_document([_run(tmp_path / "a", accuracy=0.975), _run(tmp_path / "b", accuracy=0.97)])
    assert document["sentence"] == "No difference in accuracy, latency, size and memory was found."


def test_the_sentence_covers_what_the_rows_find(tmp_path: Path) -> None:
    a, b = _run(tmp_path / "a"), _run(tmp_path / "b")
    for run, value in ((a, 1.0), (b, 2.6)):
        profile = read_json(run.profile_path("x86"))
        for model in profile["models"].values():
            model["latency_ms"] |= {"p90": value, "p90_ci95": [0.98 * value, 1.02 * value]}
        write_json(run.profile_path("x86"), profile)
    document = comparison_document([a, b])
    (cell,) = [row["cells"][1] for row in document["metrics"] if row["key"] == "latency_ms_p90"]
    assert cell["difference"]["better"] == "reference"
    assert document["sentence"] == (
        "No difference in accuracy, latency, size and memory was found; "
        f"yet b differs from a in Latency, 90th percentile ({cell['difference_text']})."
    )


def test_other_images_and_other_machines_are_said(tmp_path: Path) -> None:
    other = _run(tmp_path / "b", data={**MANIFEST["data"], "fingerprint": "other"})
    profile = json.loads(other.profile_path("x86").read_text())
    profile["device"]["summary"] = "Another CPU"
    write_json(other.profile_path("x86"), profile)
    document = comparison_document([_run(tmp_path / "a"), other])
    assert "accuracy cannot be compared" in document["sentence"].lower()
    assert any("other images" in note for note in document["notes"])
    assert any("two machines" in note for note in document["notes"])
    assert document["metrics"][0]["cells"][1]["difference"] is None


def test_a_machine_that_was_slower_is_said(tmp_path: Path) -> None:
    other = _run(tmp_path / "b")
    profile = json.loads(other.profile_path("x86").read_text())
    profile["noise"]["reference_ms"] *= 1.2
    write_json(other.profile_path("x86"), profile)
    document = comparison_document([_run(tmp_path / "a"), other])
    assert "1.20 times slower when b was measured" in " ".join(document["notes"])


def test_settings_that_differ_are_listed_by_stage(tmp_path: Path) -> None:
    recipe = copy.deepcopy(MANIFEST["recipe"])
    recipe["stages"][1]["channel_ratio"] = 0.25
    document = comparison_document([_run(tmp_path / "a"), _run(tmp_path / "b", recipe=recipe)])
    assert document["recipe_differences"]["rows"] == [
        {"setting": "stages.pruned.channel_ratio", "values": ["0.5", "0.25"]}
    ]


def test_one_run_on_two_targets_is_a_comparison(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="at least two runs"):
        comparison_document([run])
    with pytest.raises(ConfigurationError, match="given twice"):
        comparison_document([run, run])
    write_json(run.profile_path("rpi4"), PROFILE | {"measured": False, "models": {}, "verdict": "inconclusive"})
    document = comparison_document([run])
    assert [candidate["name"] for candidate in document["candidates"]] == ["run on rpi4", "run on x86"]
    assert "No latency was measured for run on rpi4." in document["notes"]


def test_the_command_writes_three_pages_and_prints_one_document(command_line: CommandLine, tmp_path: Path) -> None:
    full_run(tmp_path / "a")
    _run(tmp_path / "b", recipe=MANIFEST["recipe"] | {"description": HOSTILE[0], "name": HOSTILE[1]})
    answer = command_line("compare", "a", "b", "--output", "compared", "--json", "--no-gate")
    assert answer.exit_code == 0, answer
    document = json.loads(answer.stdout)
    written = {path.name for path in (tmp_path / "compared").iterdir()}
    assert written == {"comparison.html", "comparison.md", "comparison.json"}
    assert {key: document[key] for key in document if key != "pages"} == json.loads(
        (tmp_path / "compared" / "comparison.json").read_text(encoding="utf-8")
    )
    page = HtmlPage((tmp_path / "compared" / "comparison.html").read_text(encoding="utf-8"))
    assert HOSTILE[0] in page.text
    assert not page.open
    assert set(page.labels) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "Which is better?" in (tmp_path / "compared" / "comparison.md").read_text(encoding="utf-8")
    command_line("compare", "a", "b", "--output", "compared").refusal("holds a comparison already")
    command_line("compare", "a", "--target", "x86").refusal("at least two runs")
    command_line("compare", "a", "nowhere").refusal("not a run directory")
    command_line("compare", "a", "b", "--format", "pdf").refusal("give one of html, md, json")


def test_none_that_may_ship_is_a_missed_gate(command_line: CommandLine, tmp_path: Path) -> None:
    gate = {"gate": "x", "passed": False, "sentence": "Missed.", "target": None}
    _run(tmp_path / "a", gates=[gate])
    _run(tmp_path / "b", gates=[gate])
    assert command_line("compare", "a", "b", "--output", "c", "--format", "md").exit_code == 3
    assert command_line("compare", "a", "b", "--output", "d", "--format", "md", "--no-gate").exit_code == 0
