"""Parity: do the exported files give the answers that PyTorch gave, on the images that are reported?

What enters: PyTorch's logits (float and int8) and the two ONNX files. What leaves: the content of parity.json, with
what failed in words. Agreement alone can be won by a constant model, so predictions that never change
fail whatever they agree with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress import console
from edgecompress.data import PreparedSplit
from edgecompress.errors import ParityError
from edgecompress.export import INPUT_NAME, OUTPUT_NAME, open_session
from edgecompress.preprocessing import Preprocessing
from edgecompress.recipe import Gates

Logits = NDArray[np.float32]
_BATCH_SIZE = 32


def sqnr_db(reference: Logits, quantized: Logits) -> float:
    """Signal-to-quantization-noise ratio of logits, in dB: 10 log10(sum(r**2) / sum((r - q)**2)).

    Both arrays are [samples, classes]. Infinite when they are equal. Raises ParityError when the reference is all zero.
    """
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    noise = float(np.sum((reference.astype(np.float64) - quantized) ** 2))
    if not np.isfinite(signal + noise):
        raise ParityError("the logits hold NaN or infinity; their ratio means nothing")
    if signal == 0.0:
        raise ParityError("the reference logits are all zero; the model computes nothing")
    return float("inf") if noise == 0.0 else 10.0 * float(np.log10(signal / noise))


def top1_agreement(left: Logits, right: Logits) -> float:
    """Fraction of rows [samples, classes] whose largest entry is at the same place."""
    return float(np.mean(left.argmax(axis=1) == right.argmax(axis=1)))


def run_onnx(path: Path, split: PreparedSplit, preprocessing: Preprocessing, indices: NDArray[np.int64]) -> Logits:
    """Logits [samples, classes] of an ONNX file for the images at `indices`."""
    import torch

    session = open_session(path)
    collected: list[Logits] = []
    with console.progress(f"running {path.name}", len(indices)) as advance:
        for images, _ in split.batches(_BATCH_SIZE, indices=torch.from_numpy(indices)):
            batch = preprocessing.normalize(images).numpy()
            collected.append(session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0])
            advance(len(images))
    return np.concatenate(collected)


def compare_float(torch_logits: Logits, onnx_logits: Logits, gates: Gates) -> dict[str, Any]:
    """PyTorch against ONNX, both fp32: the `onnx_fp32` part of parity.json, with its `checks`."""
    _require_finite(torch_logits, "PyTorch")
    _require_finite(onnx_logits, "the fp32 ONNX file")
    difference = float(np.abs(torch_logits - onnx_logits).max())
    relative = difference / max(float(np.abs(torch_logits).max()), 1e-12)
    agreement = top1_agreement(torch_logits, onnx_logits)
    checks = [
        _at_most(
            "fp32_max_relative_diff",
            relative,
            gates.fp32_max_relative_diff,
            f"fp32 ONNX differs from PyTorch by {relative:.2e} of the largest logit",
        ),
        _at_least(
            "fp32_min_top1_agreement",
            agreement,
            gates.fp32_min_top1_agreement,
            f"fp32 ONNX agrees with PyTorch on {agreement:.2%} of predictions",
        ),
    ]
    return {
        "max_abs_diff": difference,
        "max_relative_diff": relative,
        "top1_agreement": agreement,
        "passed": all(check["passed"] for check in checks),
        "checks": checks,
    }


def compare_int8(
    float_logits: Logits, int8_logits: Logits, torch_int8_logits: Logits, labels: NDArray[np.int64], gates: Gates
) -> dict[str, Any]:
    """int8 ONNX against fp32 ONNX and against int8 PyTorch: the `onnx_int8` part of parity.json."""
    _require_finite(float_logits, "the fp32 ONNX file")
    _require_finite(torch_int8_logits, "int8 PyTorch")
    _require_finite(int8_logits, "the int8 ONNX file")
    agreement = top1_agreement(float_logits, int8_logits)
    torch_agreement = top1_agreement(torch_int8_logits, int8_logits)
    checks = [
        _at_least(
            "int8_min_top1_agreement",
            agreement,
            gates.int8_min_top1_agreement,
            f"int8 ONNX agrees with fp32 ONNX on {agreement:.2%} of predictions",
        ),
        _at_least(
            "torch_int8_min_top1_agreement",
            torch_agreement,
            gates.torch_int8_min_top1_agreement,
            f"int8 ONNX agrees with int8 PyTorch on {torch_agreement:.2%} of predictions; on a CPU without VNNI "
            "this is what saturating 8-bit weights look like",
        ),
    ]
    return {
        "top1_agreement": agreement,
        "sqnr_db": sqnr_db(float_logits, int8_logits),
        "accuracy_fp32": float(np.mean(float_logits.argmax(axis=1) == labels)),
        "accuracy_int8": float(np.mean(int8_logits.argmax(axis=1) == labels)),
        "torch_int8_top1_agreement": torch_agreement,
        "torch_int8_max_abs_diff": float(np.abs(torch_int8_logits - int8_logits).max()),
        "passed": all(check["passed"] for check in checks),
        "checks": checks,
    }


def _at_most(gate: str, value: float, limit: float, sentence: str) -> dict[str, Any]:
    text = f"{sentence} (at most {limit:g}, gates.{gate})."
    return {"gate": gate, "value": value, "limit": limit, "passed": value <= limit, "sentence": text}


def _at_least(gate: str, value: float, limit: float, sentence: str) -> dict[str, Any]:
    text = f"{sentence} (at least {limit:g}, gates.{gate})."
    return {"gate": gate, "value": value, "limit": limit, "passed": value >= limit, "sentence": text}


def constant_predictions(logits: Logits) -> bool:
    """Whether every image gets the same answer, so that agreement proves nothing."""
    return len(np.unique(logits.argmax(axis=1))) < 2


def class_changes(
    float_logits: Logits, int8_logits: Logits, labels: NDArray[np.int64], class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Accuracy per class before and after int8, and how many of its images changed their answer."""
    before, after = float_logits.argmax(axis=1), int8_logits.argmax(axis=1)
    rows = []
    for label in np.unique(labels):
        chosen = labels == label
        rows.append(
            {
                "name": class_names[int(label)],
                "samples": int(chosen.sum()),
                "accuracy_fp32": float(np.mean(before[chosen] == label)),
                "accuracy_int8": float(np.mean(after[chosen] == label)),
                "flips": int(np.sum(before[chosen] != after[chosen])),
            }
        )
    return rows


def _require_finite(logits: Logits, what: str) -> None:
    if not np.isfinite(logits).all():
        raise ParityError(f"{what} gives NaN or infinity on {int((~np.isfinite(logits)).any(axis=1).sum())} images")
