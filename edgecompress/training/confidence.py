"""How far a model's confidence can be believed: expected calibration error, and what it is made of.

What enters: logits and labels. What leaves: bins of images by confidence with the accuracy in each, and the error of
Guo et al., "On Calibration of Modern Neural Networks", 2017. A device that acts on a threshold of confidence acts
otherwise where int8 moved it, even if every answer stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
Floats = NDArray[np.floating[Any]]


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities of logits [samples, classes], in double precision."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True).astype(np.float64))
    probabilities: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def calibration_of(logits: Floats, labels: NDArray[np.int64], *, bins: int = BINS) -> dict[str, Any]:
    """Expected calibration error with its bins, ready for JSON.

    `ece` is the mean over all images of the gap between confidence and accuracy in their bin, a fraction; the bins have
    equal width and go from 0 to 1, each one open at its lower end. Bins without images are left out.
    """
    probabilities = softmax(logits)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for index in range(bins):
        chosen = place == index
        count = int(chosen.sum())
        if count:
            rows.append(
                {
                    "confidence": float(confidence[chosen].mean()),
                    "accuracy": float(right[chosen].mean()),
                    "samples": count,
                }
            )
    gaps = sum(row["samples"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    return {
        "ece": float(gaps / max(1, len(labels))),
        "mean_confidence": float(confidence.mean()) if len(labels) else None,
        "bins": rows,
    }
