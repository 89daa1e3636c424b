"""McNemar's exact test against sums by hand and against scipy, and the number of images that settles a case."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from edgecompress.exporting.significance import images_needed, mcnemar, p_of_drop, p_of_mean


def test_by_hand() -> None:
    before = np.array([True] * 6 + [False] * 4)
    after = np.array([True] * 2 + [False] * 4 + [True] + [False] * 3)
    found = mcnemar(before, after)
    assert (found.lost, found.won) == (4, 1)
    assert found.p_value == pytest.approx(2 * (1 + 5) / 32)
    assert p_of_drop(4, 1) == pytest.approx((1 + 5) / 32)


def test_no_change_is_no_evidence() -> None:
    same = np.array([True, False, True])
    assert mcnemar(same, same).p_value == 1.0


@given(st.integers(0, 400), st.integers(0, 400))
def test_agrees_with_the_binomial_test(lost: int, won: int) -> None:
    before = np.array([True] * lost + [False] * won)
    if lost + won:
        assert mcnemar(before, ~before).p_value == pytest.approx(binomtest(lost, lost + won).pvalue, rel=1e-9)
        one_sided = binomtest(lost, lost + won, alternative="greater").pvalue
        assert p_of_drop(lost, won) == pytest.approx(one_sided, rel=1e-9)


def test_many_images_do_not_overflow() -> None:
    assert 0 < p_of_drop(5200, 4800) < 1e-4


def test_images_needed() -> None:
    assert p_of_drop(4, 0) > 0.05 > p_of_drop(5, 0)
    assert images_needed(40, 4, 0, level=0.05) == 50
    needed = images_needed(40, 4, 1, level=0.01)
    assert needed is not None
    assert p_of_drop(round(4 * needed / 40), round(needed / 40)) < 0.02
    assert images_needed(40, 2, 2, level=0.05) is None
    assert images_needed(10_000_000, 1, 0, level=1e-9) is None


def test_the_paired_z_test_against_its_definition() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1.0, 500)
    z = differences.mean() / (differences.std(ddof=1) / np.sqrt(500))
    assert p_of_mean(differences) == pytest.approx(1 - NormalDist().cdf(z))
    assert p_of_mean(-differences) == pytest.approx(NormalDist().cdf(z))
    assert p_of_mean(np.zeros(500)) == p_of_mean(np.zeros(0)) == p_of_mean(differences[:99]) == 1.0
