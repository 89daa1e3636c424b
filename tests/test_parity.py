"""Parity numbers against ones worked out by hand, and what decides `passed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgecompress.errors import ParityError
from edgecompress.exporting import parity
from edgecompress.exporting.parity import (
    cause_of_difference,
    class_changes,
    compare_float,
    compare_int8,
    constant_predictions,
    sqnr_db,
    top1_agreement,
    worst_class,
)
from edgecompress.settings.recipe import Gates
from edgecompress.settings.target import load_target

GATES = Gates(
    fp32_max_relative_diff=1e-3,
    fp32_min_top1_agreement=0.9,
    int8_min_top1_agreement=0.75,
    torch_int8_min_top1_agreement=0.9,
)


def logits(*answers: int, classes: int = 4, size: float = 10.0) -> np.ndarray:
    """One row an image, with the largest entry at its answer."""
    rows = np.zeros((len(answers), classes), dtype=np.float32)
    rows[np.arange(len(answers)), answers] = size
    return rows


def test_sqnr_of_hand_numbers() -> None:
    reference = np.array([[3.0, 4.0]], dtype=np.float32)  # 25
    assert sqnr_db(reference, np.array([[3.0, 3.5]], dtype=np.float32)) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(reference, 2 * reference) == pytest.approx(0.0)
    assert sqnr_db(reference, np.zeros_like(reference)) == pytest.approx(0.0)
    assert sqnr_db(reference, -reference) == pytest.approx(10 * np.log10(1 / 4))
    assert sqnr_db(reference, reference) == float("inf")
    assert sqnr_db(1e-3 * reference, 1e-3 * np.array([[3.0, 3.5]], dtype=np.float32)) == pytest.approx(20.0, rel=1e-4)


def test_sqnr_sums_over_images_in_float64() -> None:
    reference = np.ones((200_000, 4), dtype=np.float32) * np.float32(1e-3)
    reference[0] = 1e4
    quantized = reference.copy()
    quantized[1:] = 0
    expected = 10 * np.log10((4e8 + 199_999 * 4e-6) / (199_999 * 4e-6))
    assert sqnr_db(reference, quantized) == pytest.approx(expected, rel=1e-5)


def test_all_zero_reference_means_nothing() -> None:
    with pytest.raises(ParityError, match="all zero"):
        sqnr_db(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_sqnr_of_values_that_are_not_finite_means_nothing(bad: float, position: int) -> None:
    pair = [logits(0, 1), logits(0, 1)]
    pair[position][1, 2] = bad
    with pytest.raises(ParityError, match="NaN or infinity"):
        sqnr_db(*pair)


def test_agreement_counts_rows() -> None:
    assert top1_agreement(logits(0, 1, 2, 3), logits(0, 1, 2, 0)) == 0.75
    assert top1_agreement(logits(0, 1), 100 * logits(0, 1)) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("position", "who"), [(0, "PyTorch"), (1, "the fp32 ONNX file")])
def test_float_logits_that_are_not_finite_are_refused(bad: float, position: int, who: str) -> None:
    pair = [logits(0, 1, 2), logits(0, 1, 2)]
    pair[position][1:, 0] = bad
    with pytest.raises(ParityError, match=f"{who} gives NaN or infinity on 2 images"):
        compare_float(pair[0], pair[1], GATES)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("position", "who"), [(0, "the fp32 ONNX file"), (1, "the int8 ONNX file"), (2, "int8 PyTorch")]
)
def test_int8_logits_that_are_not_finite_are_refused(bad: float, position: int, who: str) -> None:
    three = [logits(0, 1, 2) for _ in range(3)]
    three[position][0, 3] = bad
    with pytest.raises(ParityError, match=f"{who} gives NaN or infinity on 1 images"):
        compare_int8(three[0], three[1], three[2], np.array([0, 1, 2]), GATES)


@pytest.mark.parametrize(("shift", "passed"), [(0.0, True), (0.0099, True), (0.0101, False)])
def test_float_difference_decides(shift: float, passed: bool) -> None:
    wanted = logits(0, 1, 2, 3)
    got = wanted.copy()
    got[2, 1] = -shift
    result = compare_float(wanted, got, GATES)
    assert result["max_abs_diff"] == pytest.approx(shift)
    assert result["max_relative_diff"] == pytest.approx(shift / 10)
    assert result["top1_agreement"] == 1.0
    assert result["passed"] is passed
    assert [check["passed"] for check in result["checks"]] == [passed, True]


def flipped(answers: np.ndarray, count: int) -> np.ndarray:
    changed = answers.copy()
    changed[:count] = (changed[:count] + 1) % 4
    return changed


@pytest.mark.parametrize(("changes", "passed"), [(10, True), (11, False)])
def test_float_agreement_decides(changes: int, passed: bool) -> None:
    answers = np.arange(100) % 4
    gates = GATES.model_copy(update={"fp32_max_relative_diff": 10.0})
    result = compare_float(logits(*answers), logits(*flipped(answers, changes)), gates)
    assert result["top1_agreement"] == pytest.approx(1 - changes / 100)
    assert result["passed"] is passed
    failed = [check["gate"] for check in result["checks"] if not check["passed"]]
    assert failed == ([] if passed else ["fp32_min_top1_agreement"])


@pytest.mark.parametrize(
    ("changes", "torch_changes", "failed"),
    [
        (0, 0, []),
        (25, 0, []),
        (26, 0, ["int8_min_top1_agreement"]),
        (0, 10, []),
        (0, 11, ["torch_int8_min_top1_agreement"]),
        (30, 30, ["int8_min_top1_agreement", "torch_int8_min_top1_agreement"]),
    ],
)
def test_int8_agreements_decide(changes: int, torch_changes: int, failed: list[str]) -> None:
    answers = np.arange(100) % 4
    int8 = flipped(answers, changes)
    torch_int8 = int8.copy()
    torch_int8[-torch_changes or 100 :] = (torch_int8[-torch_changes or 100 :] + 2) % 4
    result = compare_int8(logits(*answers), logits(*int8), logits(*torch_int8), answers, GATES)
    assert result["top1_agreement"] == pytest.approx(1 - changes / 100)
    assert result["torch_int8_top1_agreement"] == pytest.approx(1 - torch_changes / 100)
    assert result["accuracy_fp32"] == 1.0
    assert result["accuracy_int8"] == pytest.approx(1 - changes / 100)
    assert result["torch_int8_max_abs_diff"] == (10.0 if torch_changes else 0.0)
    # Each change moves 10 from one class to another: twice the square of a row.
    noise = 2 * changes / 100
    assert result["sqnr_db"] == pytest.approx(-10 * np.log10(noise) if changes else float("inf"))
    assert [check["gate"] for check in result["checks"] if not check["passed"]] == failed
    assert result["passed"] is (not failed)


def test_sentences_name_the_number_the_limit_and_the_gate() -> None:
    answers = np.arange(100) % 4
    result: dict[str, Any] = compare_int8(
        logits(*answers), logits(*flipped(answers, 40)), logits(*answers), answers, GATES, cause="; why"
    )
    sentences = [check["sentence"] for check in result["checks"]]
    assert "60.00%" in sentences[0]
    assert "at least 0.75, gates.int8_min_top1_agreement" in sentences[0]
    assert "of predictions; why (at least" in sentences[1]


def test_the_cause_of_a_difference_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def cause(activations: str, bits: int, target: str, *, vnni: bool) -> str:
        monkeypatch.setattr(parity, "architecture", lambda: "x86_64")
        monkeypatch.setattr(parity, "has_vnni", lambda: vnni)
        return cause_of_difference(activations=activations, weight_bits=bits, target=load_target(target))

    assert cause("uint8", 8, "x86", vnni=True) == cause("uint8", 7, "x86", vnni=False) == ""
    assert cause("int8", 8, "rpi4", vnni=True) == ""
    assert "no VNNI, without which 8-bit weights saturate" in cause("uint8", 8, "x86", vnni=False)
    assert cause("int8", 8, "rpi4", vnni=False).endswith("(not on the target)")
    assert "session.qdqisint8allowed" in cause("int8", 8, "x86", vnni=True)


def test_accuracies_are_against_the_labels() -> None:
    labels = np.array([0, 1, 2, 0])
    result = compare_int8(logits(0, 1, 2, 3), logits(0, 1, 3, 3), logits(0, 1, 3, 3), labels, GATES)
    assert (result["accuracy_fp32"], result["accuracy_int8"]) == (0.75, 0.5)


@pytest.mark.parametrize(
    ("make", "constant"),
    [
        (lambda: logits(2, 2, 2), True),
        (lambda: np.zeros((5, 3), np.float32), True),
        (lambda: logits(2), True),
        (lambda: np.array([[1.0, 5.0], [-3.0, 9.0]], np.float32), True),
        (lambda: logits(2, 2, 1), False),
    ],
)
def test_predictions_that_never_change_are_noticed(make: Callable[[], np.ndarray], constant: bool) -> None:
    assert constant_predictions(make()) is constant


def test_class_changes_by_hand() -> None:
    labels = np.array([3, 0, 0, 0, 3, 1])
    before, after = logits(3, 0, 0, 2, 1, 1), logits(3, 0, 2, 0, 2, 1)
    names = ("name", "samples", "accuracy_fp32", "accuracy_int8", "flips", "lost", "won", "p_value")
    rows = class_changes(before, after, labels, ("ant", "bee", "cat", "dog"))
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("ant", 3, pytest.approx(2 / 3), pytest.approx(2 / 3), 2, 1, 1, 0.75),
        ("bee", 1, 1.0, 1.0, 0, 0, 0, 1.0),
        ("dog", 2, 0.5, 0.5, 1, 0, 0, 1.0),
    ]
    assert rows[0].keys() == set(names)


def test_mcnemar_stands_beside_the_accuracies() -> None:
    labels = np.zeros(8, dtype=np.int64)
    before, after = logits(*[0] * 8), logits(*[0] * 3, *[1] * 5)
    found = compare_int8(before, after, after, labels, GATES)
    assert found["mcnemar"] == {"lost": 5, "won": 0, "p_value": 2 / 32}


def _dropped(samples: int, lost: int, classes: int = 2) -> dict[str, Any]:
    """One class of which `lost` images are lost, and others that stay as they are."""
    labels = np.concatenate([np.zeros(samples, np.int64), np.repeat(np.arange(1, classes), 4)])
    before = logits(*labels, classes=classes)
    answers = labels.copy()
    answers[:lost] = 1
    names = tuple(f"class{i}" for i in range(classes))
    return worst_class(class_changes(before, logits(*answers, classes=classes), labels, names), GATES)


def test_a_class_fails_only_where_its_drop_is_more_than_chance() -> None:
    (check,) = _dropped(30, 6)["checks"]
    assert (check["gate"], check["passed"]) == ("max_class_accuracy_drop", False)
    assert check["value"] == pytest.approx(0.2)
    assert "Class class0 loses 20.0 points by int8 on 30 images" in check["sentence"]
    # One in five as well, but of ten images: two may be lost by chance.
    few = _dropped(10, 2)
    assert few["checks"][0]["passed"]
    assert (few["drop"], few["p_value"]) == (pytest.approx(0.2), 0.25)
    assert few["images_needed"] == 30  # six lost: 1 / 64 is below 5 % / 2, five lost would not be
    assert "may be chance" in few["sentence"]
    assert "30 images" in few["sentence"]
    # Significant, but within the gate.
    assert _dropped(400, 20)["checks"][0]["passed"]
    # The more classes, the stronger the evidence that one of them needs.
    assert _dropped(30, 6, classes=4)["checks"][0]["passed"]


def test_no_class_that_loses_is_said_so() -> None:
    assert _dropped(10, 0)["sentence"] == "No class loses accuracy by int8."
