"""Ship, hold or inconclusive: one case for each way a profile can lie against a budget."""

from __future__ import annotations

from typing import Any

import pytest

from edgecompress.measure.verdict import Verdict, decide
from edgecompress.settings.gates import accuracy_gate
from edgecompress.settings.target import Target, load_target


def profile(
    *,
    ratio: tuple[float, float, float] = (2.0, 1.9, 2.1),
    p90: tuple[float, float, float] = (5.0, 4.8, 5.2),
    **changes: Any,
) -> dict[str, Any]:
    model = {
        "latency_ms": {
            **{"p50": 4.0, "p50_ci95": [3.9, 4.1], "p99": 9.0, "p99_ci95": [7.0, 12.0]},
            **{"p90": p90[0], "p90_ci95": [p90[1], p90[2]]},
        },
        "size_bytes": 4_000_000,
        "peak_rss_bytes": 90_000_000,
        "peak_rss_bytes_range": [89_000_000, 91_000_000],
        "load_ms": 30.0,
        "load_ms_range": [28.0, 33.0],
        "first_inference_ms": 6.0,
        "first_inference_ms_range": [5.5, 6.5],
        "cold_start_ms": 36.0,
        "cold_start_ms_range": [34.0, 39.0],
    }
    document = {
        "measured": True,
        "not_measured_because": [],
        "models": {"fp32": {**model, "size_bytes": 16_000_000}, "int8": {**model, **changes}},
        "int8_speedup": {"ratio": ratio[0], "ci95": [ratio[1], ratio[2]]},
    }
    return document


def judge(
    document: dict[str, Any], *, gates: tuple[str, ...] = (), drop: float | None = 0.004, **budgets: Any
) -> Verdict:
    target = Target.model_validate({"name": "t", "architecture": "x86_64", "budgets": budgets})
    return decide(document, target=target, gates_missed=list(gates), accuracy_drop=drop)


def test_everything_met_ships_and_says_why() -> None:
    verdict = judge(profile(), size_bytes=5_000_000, latency_ms_p90=6.0, max_accuracy_drop=0.02)
    assert verdict.verdict == "ship"
    assert verdict.missed == []
    text = " ".join(verdict.reasons)
    for expected in ("2.00 times", "1.90 to 2.10", "4.00 MB", "5.00 MB", "5 ms", "6 ms", "0.40 points", "2.00 points"):
        assert expected in text


def test_slower_int8_is_said_first_and_holds() -> None:
    verdict = judge(profile(ratio=(0.8, 0.78, 0.82)), gates=("Parity was missed.",), size_bytes=1_000_000)
    assert verdict.verdict == "hold"
    assert verdict.reasons[0].startswith("Int8 is slower than fp32")
    assert verdict.missed[1] == "Parity was missed."
    assert len(verdict.missed) == 3


@pytest.mark.parametrize(("isa", "said"), [(["avx2", "avx512_vnni"], True), (["avx2"], False)])
def test_a_machine_faster_than_the_target_is_said_before_all(isa: list[str], said: bool) -> None:
    measured = profile() | {"device": {"machine": {"isa": isa}}}
    found = decide(measured, target=load_target("x86-avx2"), gates_missed=["Parity is broken."], accuracy_drop=0.0)
    assert ("this one has it, so int8 may be faster here" in found.reasons[0]) is said


def test_slower_int8_that_the_target_allows_is_still_said_first() -> None:
    verdict = judge(profile(ratio=(0.9, 0.88, 0.92)), min_int8_speedup=0.5)
    assert verdict.verdict == "ship"
    assert verdict.reasons[0].startswith("Int8 is slower than fp32")


SPEEDS = ((0.5, 0.45, 0.55), (0.9, 0.85, 0.95), (1.0, 0.95, 1.05), (1.1, 1.05, 1.15), (1.6, 1.5, 1.7))


@pytest.mark.parametrize(
    ("budget", "verdicts"),
    [
        (None, ("ship", "ship", "ship", "ship", "ship")),
        (0.9, ("hold", "inconclusive", "ship", "ship", "ship")),
        (1.0, ("hold", "hold", "inconclusive", "ship", "ship")),
        (1.1, ("hold", "hold", "hold", "inconclusive", "ship")),
    ],
)
def test_the_budget_alone_decides_on_speed(budget: float | None, verdicts: tuple[str, ...]) -> None:
    found = [judge(profile(ratio=ratio), min_int8_speedup=budget) for ratio in SPEEDS]
    assert tuple(verdict.verdict for verdict in found) == verdicts
    assert all(len(verdict.reasons) == 1 for verdict in found)


@pytest.mark.parametrize("budget", [None, 0.5, 0.9, 1.0, 1.1, 2.0])
@pytest.mark.parametrize(
    ("ratio", "finding"),
    [
        *[(SPEEDS[0], "is slower"), (SPEEDS[1], "is slower"), (SPEEDS[2], "was not found to be faster")],
        *[(SPEEDS[3], "is faster"), (SPEEDS[4], "is faster")],
    ],
)
def test_speed_is_called_what_its_interval_allows(
    budget: float | None, ratio: tuple[float, float, float], finding: str
) -> None:
    (said,) = judge(profile(ratio=ratio), min_int8_speedup=budget).reasons
    assert said.startswith(f"Int8 {finding} than fp32")
    assert (", but not by enough" in said) == (budget is not None and ratio[1] > 1 and ratio[2] < budget)


@pytest.mark.parametrize("end_to_end", [(0.8, 0.7, 0.9), (1.0, 0.9, 1.1)])
def test_nothing_comes_before_a_slower_int8(end_to_end: tuple[float, float, float]) -> None:
    against = {"ratio": end_to_end[0], "ci95": list(end_to_end[1:])}
    document = profile(ratio=(0.9, 0.85, 0.95)) | {"end_to_end_speedup": against}
    for budget in (None, 0.5, 0.9, 1.0):
        verdict = judge(document, gates=("Parity was missed.",), min_int8_speedup=budget)
        assert verdict.reasons[0].startswith("Int8 is slower than fp32")


def test_faster_but_not_by_enough_holds() -> None:
    verdict = judge(profile(ratio=(1.3, 1.25, 1.35)), min_int8_speedup=1.5)
    assert verdict.verdict == "hold"
    assert "not by enough" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((5.0, 4.8, 5.2), "ship"), ((6.0, 5.8, 6.2), "inconclusive"), ((7.0, 6.8, 7.2), "hold")],
)
def test_latency_against_its_budget(interval: tuple[float, float, float], expected: str) -> None:
    assert judge(profile(p90=interval), latency_ms_p90=6.0).verdict == expected


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ({"size_bytes": 3_999_999}, "hold"),
        ({"size_bytes": 4_000_000}, "ship"),
        ({"peak_rss_bytes": 80_000_000}, "hold"),
        ({"peak_rss_bytes": 90_500_000}, "inconclusive"),
        ({"load_ms": 20}, "hold"),
        ({"load_ms": 40}, "ship"),
        ({"first_inference_ms": 5}, "hold"),
        ({"max_accuracy_drop": 0.003}, "hold"),
        ({"max_accuracy_drop": 0.02}, "ship"),
    ],
)
def test_other_budgets(budgets: dict[str, float], expected: str) -> None:
    assert judge(profile(), **budgets).verdict == expected


@pytest.mark.parametrize(
    ("end_to_end", "place", "expected"),
    [
        ((3.4, 3.3, 3.5), 1, "Int8 is faster than the baseline: the baseline takes 3.40 times as long (95 % interval"),
        ((0.8, 0.7, 0.9), 0, "Int8 is slower than the baseline: the baseline takes 0.80 times as long"),
        ((1.0, 0.9, 1.1), 0, "Int8 was not found to be faster than the baseline: the baseline takes 1.00 times"),
    ],
)
def test_the_way_from_the_baseline_is_said_and_decides_nothing(
    end_to_end: tuple[float, float, float], place: int, expected: str
) -> None:
    document = profile() | {"end_to_end_speedup": {"ratio": end_to_end[0], "ci95": list(end_to_end[1:])}}
    verdict = judge(document, gates=("Parity was missed.",))
    assert verdict.reasons[place].startswith(expected)
    assert verdict.missed == ["Parity was missed."]
    assert judge(document).verdict == "ship"


@pytest.mark.parametrize(
    ("spread", "steady", "expected"),
    [
        (0.426, 9, "Measured on a busy machine: a fixed loop varied by 43 %; the intervals include it."),
        (0.426, 4, "a fixed loop varied by 43 % and 5 of 9 processes were not steady after their warm-up"),
        (0.01, 8, "Measured at an unsteady speed: 1 of 9 processes were not steady"),
    ],
)
def test_a_busy_machine_is_said_last_and_decides_nothing(spread: float, steady: int, expected: str) -> None:
    noise = {"reference_spread": spread, "steady_processes": steady, "processes": 9}
    verdict = judge(profile() | {"noise": noise}, size_bytes=5_000_000)
    assert verdict.verdict == "ship"
    assert expected in verdict.reasons[-1]
    assert verdict.reasons[-1].endswith("Measure again when idle.")
    held = judge(profile() | {"noise": noise}, size_bytes=1_000_000)
    assert (held.verdict, held.missed) == ("hold", ["The int8 file has 4.00 MB; the target allows 1.00 MB."])
    assert expected in held.reasons[-1]


def test_a_quiet_machine_is_not_mentioned() -> None:
    noise = {"reference_spread": 0.01, "steady_processes": 9, "processes": 9}
    assert judge(profile() | {"noise": noise}).reasons == judge(profile()).reasons


@pytest.mark.parametrize(
    ("drop", "expected"), [(0.98 - 0.96, "ship"), (0.0201, "hold"), (0.021, "hold"), (0.019, "ship")]
)
def test_accuracy_is_judged_as_it_was_measured(drop: float, expected: str) -> None:
    """0.98 less 0.96 is a little more than 0.02 in floating point, and no more than the limit."""
    assert judge(profile(), drop=drop, max_accuracy_drop=0.02).verdict == expected
    baseline = {"id": "dense", "accuracy": 0.98}
    assert accuracy_gate(0.98 - drop, baseline, 0.02, "int8").passed == (expected == "ship")


def test_an_accuracy_that_stays_is_no_rise() -> None:
    reasons = judge(profile(), drop=-1e-17, max_accuracy_drop=0.02).reasons
    assert reasons[-1] == "Accuracy stays the same; the target allows a drop of 2.00 points."


def test_missed_gate_holds_whatever_the_budgets() -> None:
    verdict = judge(profile(), gates=("Int8 agrees with fp32 on 90.0 % of images; the gate is 95.0 %.",))
    assert verdict.verdict == "hold"
    assert verdict.missed == ["Int8 agrees with fp32 on 90.0 % of images; the gate is 95.0 %."]


def test_unknown_accuracy_is_in_doubt_only_where_it_matters() -> None:
    assert judge(profile(), drop=None, max_accuracy_drop=0.02).verdict == "inconclusive"
    assert judge(profile(), drop=None).verdict == "ship"


def unmeasured() -> dict[str, Any]:
    document = profile()
    document |= {"measured": False, "not_measured_because": ["target rpi4 is aarch64, this machine is x86_64"]}
    document["int8_speedup"] = {"ratio": None, "ci95": None}
    for model in document["models"].values():
        for key in model:
            if key != "size_bytes":
                model[key] = None
    return document


def test_target_out_of_reach_is_inconclusive_and_no_miss() -> None:
    verdict = judge(unmeasured(), size_bytes=5_000_000, latency_ms_p90=6.0)
    assert verdict.verdict == "inconclusive"
    assert verdict.missed == []
    assert "target rpi4 is aarch64" in verdict.reasons[0]


def test_target_out_of_reach_still_holds_what_can_be_known() -> None:
    assert judge(unmeasured(), size_bytes=3_000_000).verdict == "hold"


def test_without_int8_the_float_model_is_judged() -> None:
    document = profile()
    del document["models"]["int8"]
    document["int8_speedup"] = {"ratio": None, "ci95": None}
    verdict = judge(document, size_bytes=5_000_000)
    assert verdict.verdict == "hold"
    assert "fp32 file has 16.0 MB" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("budget", "limit", "expected"),
    [
        *[("latency_ms_p50", 4.2, "ship"), ("latency_ms_p50", 4.05, "inconclusive"), ("latency_ms_p50", 3.8, "hold")],
        *[("latency_ms_p99", 13.0, "ship"), ("latency_ms_p99", 10.0, "inconclusive"), ("latency_ms_p99", 6.0, "hold")],
        *[("cold_start_ms", 40.0, "ship"), ("cold_start_ms", 36.5, "inconclusive"), ("cold_start_ms", 30.0, "hold")],
    ],
)
def test_each_budget_is_judged_by_its_whole_interval(budget: str, limit: float, expected: str) -> None:
    verdict = judge(profile(), **{budget: limit})
    assert verdict.verdict == expected
    assert any(f"{limit:g}" in reason for reason in verdict.reasons)


def test_a_budget_that_could_not_be_measured_is_open() -> None:
    assert judge(profile(cold_start_ms=None), cold_start_ms=50).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("memory", "expected"), [(64_000_000, "hold"), (90_500_000, "inconclusive"), (92_000_000, "ship")]
)
def test_a_model_that_outgrows_the_device_is_not_shipped(memory: int, expected: str) -> None:
    """It takes 89 to 91 MB."""
    small = Target.model_validate({"name": "t", "architecture": "x86_64", "memory_bytes": memory})
    verdict = decide(profile(), target=small, gates_missed=[], accuracy_drop=None)
    assert verdict.verdict == expected
    said = [reason for reason in verdict.reasons if f"the whole device has {memory / 1e6:.1f} MB" in reason]
    assert len(said) == (expected != "ship")


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [
        ((1.003, 1.001, 1.004), "takes 1.003 times as long as int8 (95 % interval 1.001 to 1.004)"),
        ((0.92, 0.85, 0.996), "takes 0.92 times as long as int8 (95 % interval 0.85 to 0.996)"),
        ((1.0, 0.98, 1.02), "takes 1.00 times as long as int8 (95 % interval 0.98 to 1.02)"),
    ],
)
def test_an_end_beside_one_is_shown_beside_one(ratio: tuple[float, float, float], shown: str) -> None:
    end_to_end = {"ratio": ratio[0], "ci95": list(ratio[1:])}
    verdict = judge(profile(ratio=ratio) | {"end_to_end_speedup": end_to_end}, min_int8_speedup=None)
    assert any(shown in reason for reason in verdict.reasons)
    assert any(shown.replace(" as int8", "") in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("share", "alone", "expected"), [(0.6, 3.0, "inconclusive"), (0.99, 3.0, "hold"), (0.6, 4.5, "hold")]
)
def test_latency_of_a_process_that_had_to_wait_decides_nothing(share: float, alone: float, expected: str) -> None:
    """The clock says 5 ms, the limit is 4 ms; whether the model is too slow depends on how long it had the CPU."""
    document = profile()
    document["models"]["int8"]["latency_ms"] = {**document["models"]["int8"]["latency_ms"], "on_cpu_p50": alone}
    document["noise"] = {
        "reference_spread": 0.01,
        "processes": 5,
        "steady_processes": 5,
        "on_cpu_share": {"fp32": share, "int8": share},
    }
    verdict = judge(document, latency_ms_p90=4.0)
    assert verdict.verdict == expected
    assert any("had the CPU for 60 %" in reason for reason in verdict.reasons) == (share < 0.9)
