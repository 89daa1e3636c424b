"""Candidates are the best ones by brute force; the choice keeps to the limits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from edgecompress.int8.placement import (
    LayerCost,
    Limits,
    _best_forms,
    candidates,
    choose,
    first_accurate,
    front,
)

COSTS = [
    LayerCost("stem", 1.0, 2.0, 0.3, 0.5),
    LayerCost("a", 1.0, 0.5, 0.3, 0.1),
    LayerCost("b", 1.0, 0.9, 0.3, 2.0),
    LayerCost("c", 1.0, 0.4, 0.3, 0.1),
    LayerCost("fixed", 0.2, 0.1, 0.3, 0.0, may_be_int8=False),
    LayerCost("head", 3.0, 1.0, 0.3, 0.2),
]


def total(forms: tuple[bool, ...], price: float) -> float:
    cost = sum(c.int8_cost + price * c.noise if form else c.float_cost for c, form in zip(COSTS, forms, strict=True))
    return cost + sum(c.change_cost for c, left, right in zip(COSTS, forms, forms[1:], strict=False) if left != right)


@pytest.mark.parametrize("price", [0.0, 0.1, 0.5, 2.0])
def test_the_search_along_the_layers_finds_the_best_of_all_placements(price: float) -> None:
    allowed = [forms for forms in itertools.product((False, True), repeat=len(COSTS)) if not forms[4]]
    best = min(allowed, key=lambda forms: total(forms, price))
    found = tuple(_best_forms(COSTS, price=price, change_factor=1.0, int8_factor=1.0))
    assert total(found, price) == pytest.approx(total(best, price))
    assert not found[4]


def test_candidates_trade_cost_for_noise() -> None:
    found = candidates(COSTS, by_noise=True)
    assert found[0].float_layers == ("stem",)
    assert found[0].cost == pytest.approx(2.0 * 0 + 1.0 + 0.3 + 0.5 + 0.9 + 0.4 + 0.3 + 0.2 + 0.3 + 1.0)
    assert any("b" in candidate.float_layers and "head" not in candidate.float_layers for candidate in found)
    assert len({candidate.float_layers for candidate in found}) == len(found)
    assert all(len(candidate.float_layers) < 5 for candidate in found), "full float is no int8 model"
    assert [c.cost for c in found] == sorted(c.cost for c in found)


def test_a_change_of_form_that_costs_too_much_keeps_layers_together() -> None:
    costs = [LayerCost(str(i), 1.0, 0.9 if i % 2 else 1.05, 5.0) for i in range(6)]
    assert len(set(_best_forms(costs, price=0.0, change_factor=1.0, int8_factor=1.0))) == 1


@pytest.mark.parametrize("first", range(6))
def test_bisection_finds_the_first_that_is_accurate(first: int) -> None:
    asked: list[int] = []
    ordered = candidates(COSTS, by_noise=True)[:5]

    def is_accurate(candidate: Any) -> bool:
        asked.append(ordered.index(candidate))
        return ordered.index(candidate) >= first

    assert first_accurate(ordered, is_accurate) == min(first, len(ordered))
    assert len(asked) <= 3


def trial(name: str, *, speedup: float | None, agreement: float, drop: float = 0.0, size: int = 100) -> dict[str, Any]:
    interval = None if speedup is None else [speedup - 0.02, speedup + 0.02]
    document = {"id": name, "speedup": speedup, "speedup_ci95": interval, "agreement": agreement}
    return document | {"accuracy_drop": drop, "size_bytes": size, "predicted": 1.0}


FULL = trial("full", speedup=0.8, agreement=0.93, size=100)
FAST = trial("fast", speedup=1.2, agreement=0.94, size=300)
EXACT = trial("exact", speedup=1.1, agreement=0.99, size=200)
SLOW = trial("slow", speedup=0.9, agreement=1.0, size=150)
LIMITS = Limits(max_accuracy_drop=0.01, min_agreement=0.98)


def test_the_fastest_that_is_accurate_enough_is_chosen() -> None:
    chosen, why = choose([FULL, FAST, EXACT, SLOW], limits=LIMITS, optimize="latency", needs_speed=True)
    assert chosen is EXACT
    assert "accurate enough" in why
    loose = Limits(None, None)
    assert choose([FULL, FAST, EXACT, SLOW], limits=loose, optimize="latency", needs_speed=True)[0] is FAST
    assert choose([FULL, FAST, EXACT, SLOW], limits=LIMITS, optimize="size", needs_speed=False)[0] is SLOW


def test_where_nothing_will_do_full_int8_is_written_and_the_reason_said() -> None:
    chosen, why = choose([FULL, SLOW], limits=LIMITS, optimize="latency", needs_speed=True)
    assert chosen is FULL
    assert "none of 1 placements that are accurate enough is as fast as fp32" in why
    chosen, why = choose([FULL, FAST], limits=LIMITS, optimize="latency", needs_speed=True)
    assert chosen is FULL
    assert "none of 2 placements is accurate enough" in why


def test_an_accuracy_drop_beyond_the_limit_is_not_accurate() -> None:
    assert not LIMITS.met_by(EXACT | {"accuracy_drop": 0.02})
    assert LIMITS.met_by(EXACT | {"accuracy_drop": 0.01})


def sure(name: str, agreement: list[float], *, speedup: float = 1.2) -> dict[str, Any]:
    document = trial(name, speedup=speedup, agreement=sum(agreement) / 2)
    return document | {"agreement_ci95": agreement, "accuracy_drop_ci95": [-0.01, 0.005]}


@pytest.mark.parametrize(
    ("agreement", "drop", "answer"),
    [
        ([0.985, 0.995], [-0.01, 0.01], "met"),
        ([0.97, 0.99], [-0.01, 0.01], "inconclusive"),
        ([0.985, 0.995], [0.0, 0.02], "inconclusive"),
        ([0.95, 0.97], [-0.01, 0.005], "missed"),
        ([0.97, 0.99], [0.011, 0.02], "missed"),
    ],
)
def test_an_interval_that_holds_the_limit_leaves_it_open(
    agreement: list[float], drop: list[float], answer: str
) -> None:
    document = sure("x", agreement) | {"accuracy_drop_ci95": drop}
    assert LIMITS.judge(document) == answer
    assert Limits(None, None).judge(document) == "met"


def test_what_is_accurate_beyond_doubt_goes_before_what_is_faster() -> None:
    fast, certain = sure("fast", [0.97, 0.995], speedup=1.4), sure("certain", [0.985, 0.999], speedup=1.1)
    assert LIMITS.met_by(fast), "its numbers alone would do"
    chosen, why = choose([FULL, fast, certain], limits=LIMITS, optimize="latency", needs_speed=True)
    assert (chosen["id"], "inconclusive" in why) == ("certain", False)
    chosen, why = choose([FULL, fast], limits=LIMITS, optimize="latency", needs_speed=True)
    assert (chosen["id"], "inconclusive" in why) == ("fast", True)


def test_the_front_holds_what_nothing_beats() -> None:
    assert [row["id"] for row in front([FULL, FAST, EXACT, SLOW])] == ["fast", "exact", "slow"]


def test_without_another_placement_to_try_that_is_said() -> None:
    chosen, why = choose([FULL], limits=LIMITS, optimize="latency", needs_speed=True)
    assert chosen is FULL
    assert "promises nothing" in why
