"""Texts and tables of results: units, words for better and worse, and widths that fit a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from edgecompress.commands import cli_output
from edgecompress.pipeline import Outcome
from edgecompress.reporting import summary, value_text
from edgecompress.run_directory import RunDirectory

MANIFEST: dict[str, Any] = {
    "baseline": {"id": "dense", "accuracy": 0.9778, "accuracy_split": "test"},
    "stages": [
        {
            "id": "dense",
            "kind": "train",
            "status": "complete",
            "accuracy": 0.9778,
            "accuracy_split": "test",
            "params": 25_557_032,
            "macs": 4_089_184_256,
            "sparsity": 0.0,
            "size_bytes": 102_340_111,
            "seconds": 7512,
        },
        {
            "id": "pruned_" + "x" * 57,
            "kind": "prune",
            "status": "complete",
            "accuracy": 0.9722,
            "accuracy_split": "test",
            "params": 81_402,
            "macs": 812_000,
            "sparsity": 0.5,
            "size_bytes": 338_120,
            "seconds": 34.0,
        },
        {"id": "int8", "kind": "quantize", "status": "failed", "error": "cannot be captured"},
    ],
}
PROFILE: dict[str, Any] = {
    "target": "x86",
    "measured": True,
    "models": {
        "fp32": {
            "latency_ms": {"p50": 0.148, "p90": 0.160},
            "throughput_per_s": 6757.0,
            "size_bytes": 338_120,
            "load_ms": 9.4,
        },
        "int8": {
            "latency_ms": {"p50": 0.079, "p90": 0.085},
            "throughput_per_s": 12658.0,
            "size_bytes": 112_480,
            "load_ms": 12.4,
        },
    },
    "int8_speedup": {"ratio": 1.87, "ci95": [1.81, 1.93]},
    "verdict": "ship",
    "reasons": ["Latency (p90) of int8 is 0.085 ms; the target allows [0.2 ms]."],
}


def _with_baseline(*, int8: bool = True) -> dict[str, Any]:
    baseline = {
        "latency_ms": {"p50": 0.461, "p90": 0.487},
        "throughput_per_s": 2169.0,
        "size_bytes": 1_102_340,
        "size_bytes_compressed": 1_012_000,
        "peak_rss_bytes": 68_300_000,
        "load_ms": 14.4,
        "first_inference_ms": 1.61,
    }
    models = {"baseline": baseline, **PROFILE["models"]}
    if not int8:
        del models["int8"]
    return {**PROFILE, "models": models, "end_to_end_speedup": {"ratio": 5.83, "ci95": [5.71, 5.96]}}


def _printed(table: Table, width: int = 100) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999.6, "1.00 kB"),
        (81_234, "81.2 kB"),
        (999_600, "1.00 MB"),
        (1_500_000_000, "1.50 GB"),
        (None, "-"),
    ],
)
def test_bytes_are_decimal_with_three_digits(value: float | None, expected: str) -> None:
    assert value_text.bytes_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.31234, "0.312"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (3.8e-6, "3.8e-06"),
        (float("nan"), "-"),
        (True, "-"),
        ("x", "-"),
    ],
)
def test_numbers(value: object, expected: str) -> None:
    assert value_text.number_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "100.0 %"), (0.9997, "99.97 %"), (0.975, "97.5 %"), (0.0, "0.0 %"), (0.0002, "0.02 %")],
)
def test_percent_never_rounds_to_a_false_end(value: float, expected: str) -> None:
    assert value_text.percent_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(-0.34, "-0.3"), (0.4, "+0.4"), (-0.03, "-0.03"), (0.0, "0.0"), (None, "-")]
)
def test_points(value: float | None, expected: str) -> None:
    assert value_text.points_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.42, "0.42 s"), (6.2, "6.2 s"), (9.97, "10 s"), (74.2, "74 s"), (200, "3.3 min"), (7512, "2.1 h")],
)
def test_seconds(value: float, expected: str) -> None:
    assert value_text.seconds_text(value) == expected


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        (5.0, "latency_ms_p90", "at most 5 ms"),
        (200_000, "size_bytes", "at most 200 kB"),
        (1.0, "min_int8_speedup", "at least 1x"),
        (0.95, "int8_min_top1_agreement", "at least 95 %"),
        (0.02, "max_accuracy_drop", "at most 2 points"),
        (1e-3, "fp32_max_relative_diff", "at most 0.001"),
        (None, "size_bytes", "-"),
    ],
)
def test_limits_carry_direction_and_unit(value: float | None, name: str, expected: str) -> None:
    assert value_text.limit_text(value, name) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (100, 50, "2.00 times smaller"),
        (50, 100, "2.00 times larger"),
        (1000, 1003, "the same"),
        (0, 5, "-"),
        (None, 5, "-"),
    ],
)
def test_changes_use_the_word_that_fits(before: float | None, after: float, expected: str) -> None:
    assert value_text.change_text(before, after, less="smaller", more="larger") == expected


@pytest.mark.parametrize(
    ("ratio", "interval", "expected"),
    [
        (1.87, [1.81, 1.93], "int8 runs 1.87 times faster"),
        (0.8, [0.77, 0.83], "it takes 1.25 times as long (95 % interval 1.20 to 1.30)"),
        (1.01, [0.98, 1.04], "no difference in speed"),
        (1.5, None, "1.50 times faster"),
    ],
)
def test_speed_is_said_as_its_interval_allows(ratio: float, interval: list[float] | None, expected: str) -> None:
    sentence = summary.speed_sentence({"target": "x86", "int8_speedup": {"ratio": ratio, "ci95": interval}})
    assert sentence is not None
    assert expected in sentence


def test_speed_that_was_not_measured_is_not_said() -> None:
    assert summary.speed_sentence({"int8_speedup": {"ratio": None, "ci95": None}}) is None


def test_stage_rows_compare_with_the_baseline() -> None:
    rows = summary.stage_rows(MANIFEST)
    assert [row["is_baseline"] for row in rows] == [True, False, False]
    assert rows[1]["accuracy_delta_points"] == pytest.approx(-0.56)
    assert rows[2]["accuracy_delta_points"] is None


def test_a_baseline_that_is_no_stage_leads_the_rows() -> None:
    rows = summary.stage_rows({**MANIFEST, "baseline": {"id": "pretrained", "accuracy": 0.99, "accuracy_split": "val"}})
    assert [row["id"] for row in rows][:2] == ["pretrained", "dense"]
    assert rows[1]["accuracy_delta_points"] is None  # val against test says nothing


def test_stages_table_fits_and_shows_what_failed() -> None:
    lines = _printed(summary.stages_table(MANIFEST))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    for fact in ("97.8 %", " base ", "-0.6", "25.6 M", "4.09 G", "102 MB", "2.1 h", "50.0 %", "int8 (failed)"):
        assert fact in text, fact
    row = next(line for line in lines if "dense" in line)
    other = next(line for line in lines if "pruned" in line)
    assert row.index("25.6 M") + len("25.6 M") == other.index("81.4 k") + len("81.4 k")  # right-aligned


def test_stages_table_of_a_usual_run_keeps_its_names_in_80_columns() -> None:
    stages = [
        dict(stage, id=name, seconds=74.0)
        for stage, name in zip(MANIFEST["stages"], ("dense", "pruned", "int8"), strict=True)
    ]
    stages[2] |= stages[1] | {"id": "int8", "kind": "quantize"}
    lines = _printed(summary.stages_table({**MANIFEST, "stages": stages}), width=80)
    assert [line.split()[:2] for line in lines[4:7]] == [["dense", "train"], ["pruned", "prune"], ["int8", "quantize"]]
    assert max(map(len, lines)) <= 80


def test_models_table_fits_and_names_the_change() -> None:
    lines = _printed(summary.models_table(PROFILE))
    assert max(map(len, lines)) <= 100
    rows = {line.split("  ")[0].strip(): line for line in lines}
    assert rows["Latency, median"].split("  ")[-1].strip() == "1.87 times faster"
    assert "1.32 times slower" in rows["Load time"]
    assert "1.87 times more" in rows["Throughput"]
    assert "Peak memory" not in rows  # nobody measured it


def test_models_table_leads_with_the_baseline_where_there_is_one() -> None:
    lines = _printed(summary.models_table(_with_baseline()))
    assert max(map(len, lines)) <= 100
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    expected = ["0.461", "ms", "0.148", "ms", "0.0790", "ms", "5.83x", "faster", "1.87x", "faster"]
    assert rows["Latency, median"][2:] == expected
    narrow = _printed(summary.models_table(_with_baseline()), width=80)
    assert max(map(len, narrow)) <= 80
    for cells in ("0.461 ms", "0.0790 ms", "5.83x faster", "1.87x faster"):
        assert any(cells in line for line in narrow), cells


def test_a_ratio_whose_interval_straddles_one_is_not_called_faster() -> None:
    profile = _with_baseline() | {"int8_speedup": {"ratio": 1.05, "ci95": [0.98, 1.11]}}
    median = next(row for row in summary.model_rows(profile) if row["label"] == "Latency, median")
    assert (median["change"], median["change_from_baseline"]) == ("unclear", "5.83 times faster")


@pytest.mark.parametrize("interval", [[1.0, 1.1], [0.9, 1.0]])
def test_an_interval_that_ends_at_one_shows_no_difference(interval: list[float]) -> None:
    profile = PROFILE | {"int8_speedup": {"ratio": sum(interval) / 2, "ci95": interval}}
    median = next(row for row in summary.model_rows(profile) if row["label"] == "Latency, median")
    assert median["change"] == "unclear"
    assert "no difference in speed" in str(summary.speed_sentence(profile))


@pytest.mark.parametrize(
    ("of_int8", "expected"),
    [([9.9, 12.9], "unclear"), ([11.9, 12.9], "1.32 times slower"), (None, "1.32 times slower")],
)
def test_fresh_processes_that_overlap_are_not_called_slower(of_int8: list[float] | None, expected: str) -> None:
    """fp32 took 9 to 11 ms to load: a file beside itself would differ as much."""
    models = {name: dict(model) for name, model in PROFILE["models"].items()}
    models["fp32"]["load_ms_range"], models["int8"]["load_ms_range"] = [9.0, 11.0], of_int8
    rows = {row["label"]: row for row in summary.model_rows({**PROFILE, "models": models})}
    assert rows["Load time"]["change"] == expected


def test_models_table_without_int8_compares_fp32_with_the_baseline() -> None:
    profile = _with_baseline(int8=False)
    assert [key for key, _ in summary.model_columns(profile)] == ["baseline", "fp32", "change_from_baseline"]
    lines = _printed(summary.models_table(profile), width=80)
    assert any("fp32 against" in line for line in lines)
    assert "int8" not in "\n".join(lines)


def test_speed_is_said_from_the_baseline_and_from_the_same_network() -> None:
    assert summary.speed_sentence(_with_baseline()) == (
        "On x86, int8 runs 5.83 times faster than the baseline (95 % interval 5.71 to 5.96); "
        "int8 runs 1.87 times faster than the same network in fp32 (95 % interval 1.81 to 1.93)."
    )
    alone = _with_baseline(int8=False) | {"int8_speedup": {"ratio": None, "ci95": None}}
    assert summary.speed_sentence(alone) == (
        "On x86, fp32 runs 5.83 times faster than the baseline (95 % interval 5.71 to 5.96)."
    )


def test_tables_of_nothing_print() -> None:
    assert _printed(summary.stages_table({}))
    assert _printed(summary.models_table({}))


def test_verdict_text_keeps_brackets_and_gives_reasons() -> None:
    assert summary.verdict_text(PROFILE) == (
        "Verdict for x86: SHIP\n  - Latency (p90) of int8 is 0.085 ms; the target allows [0.2 ms]."
    )


def test_without_a_measurement_there_is_no_ship() -> None:
    profile = {
        "target": "rpi4",
        "measured": False,
        "not_measured_because": ["this machine is x86_64"],
        "verdict": "ship",
    }
    assert summary.verdict_text(profile) == "Verdict for rpi4: NOT MEASURED\n  - this machine is x86_64"


def test_printable_defuses_and_keeps_what_is_text() -> None:
    assert value_text.printable("\x1b[31m\u202eab\ud800") == "\ufffd[31m\ufffdab\ufffd"
    family = "\U0001f469\u200d\U0001f680 \u05e9\u05dc\u05d5\u05dd"
    assert value_text.printable(family) == family
    assert value_text.printable("x" * 50, limit=10) == "x" * 9 + "\u2026"


@given(st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.none() | st.text(max_size=5))
def test_every_value_has_a_text(value: object) -> None:
    for name in ("size_bytes", "latency_ms", "accuracy", "seconds", "max_accuracy_drop", "anything"):
        assert value_text.quantity_text(value, name)


def test_a_target_that_was_not_at_hand_is_not_called_measured() -> None:
    titles = [
        summary.models_table({"target": "rpi5", "measured": measured, "models": {}}).title for measured in (True, False)
    ]
    assert [str(title) for title in titles] == [
        "Measured on rpi5",
        "Files for rpi5, which was not at hand to measure",
    ]


def test_a_slower_int8_is_a_sentence_of_its_own() -> None:
    profile = {"target": "x86", "int8_speedup": {"ratio": 0.8, "ci95": [0.77, 0.83]}}
    (sentence,) = summary.slower_sentences({}, [profile])
    assert sentence.startswith("int8 is slower than fp32 on x86: fp32 takes 0.800 times as long")
    assert summary.slower_sentences({}, [profile | {"int8_speedup": {"ratio": 0.98, "ci95": [0.9, 1.1]}}]) == []
    placed = {"what": "placement", "value": {"target": "x86", "speedup": 0.8, "speedup_ci95": [0.77, 0.83]}}
    assert summary.slower_sentences({"decisions": [placed]}) == [sentence]
    assert summary.slower_sentences({"decisions": [{"what": "placement", "value": "full"}]}) == []


def test_a_slower_int8_is_the_first_line_of_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    profile = {"target": "x86", "int8_speedup": {"ratio": 0.8, "ci95": [0.77, 0.83]}, "verdict": "hold"}
    cli_output.print_outcome(Outcome(RunDirectory(tmp_path), {"notes": ["a note"]}, profiles={"x86": profile}))
    assert capsys.readouterr().out.splitlines()[0].startswith("int8 is slower than fp32 on x86")
