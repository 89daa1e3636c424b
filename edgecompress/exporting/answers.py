"""Answers inside the exported files: probabilities by softmax, and the likeliest classes, behind the logits.

What enters: files of an export and what was asked for. What leaves: the same files with more outputs, the logits still
the first, and the proof that the outputs are what numpy makes of the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgecompress.errors import ConfigurationError
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, check_file, open_session
from edgecompress.exporting.parity_variants import Subset
from edgecompress.exporting.preprocessing_graph import add_answers, describe_signature
from edgecompress.run_directory import Json, atomic_path
from edgecompress.settings.target import Target

LIMIT = 1e-5
"""Largest difference of a probability from numpy's: float32 and a sum over the classes."""

_BATCH = 32


@dataclass(frozen=True)
class Answers:
    """Which outputs stand behind the logits."""

    softmax: bool = False
    top_k: int | None = None

    def __bool__(self) -> bool:
        return self.softmax or self.top_k is not None

    @property
    def outputs(self) -> list[str]:
        """Their names, in the order of the file."""
        likeliest = ["top_k_probabilities", "top_k_indices"] if self.top_k is not None else []
        return [*(["probabilities"] if self.softmax else []), *likeliest]

    def require_fitting(self, classes: int) -> None:
        """Raises ConfigurationError for more classes than there are."""
        if self.top_k is not None and not 1 <= self.top_k <= classes:
            raise ConfigurationError(f"--top-k {self.top_k}: the model has {classes} classes; give 1 to {classes}")


LOGITS_ALONE = Answers()


def append_answers(path: Path, answers: Answers) -> None:
    """Add the outputs to a file, in place. Raises ExportError."""
    model = onnx.load(path)
    add_answers(model.graph, softmax=answers.softmax, top_k=answers.top_k)
    describe_signature(model)
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        check_file(temporary)


def compare_answers(
    files: Mapping[str, Path], subset: Subset, answers: Answers, *, whole_images: bool, target: Target
) -> Json:
    """The outputs of each file against its logits: the `answers` part of parity.json.

    The classes are right where each has the probability that stands beside it and no other class has more: equal
    probabilities may come in either order.
    """
    document: Json = {"samples": len(subset), "outputs": answers.outputs, "top_k": answers.top_k}
    checks: list[Json] = []
    for precision, path in files.items():
        feeds: Iterable[NDArray[Any]] = subset.whole() if whole_images else subset.normalized(_BATCH)
        difference = _largest_difference(path, feeds, answers, target)
        sentence = f"{precision}'s answers differ from those of its logits by {difference:.2e} at most"
        check = {"gate": "answers", "value": difference, "limit": LIMIT, "passed": difference <= LIMIT}
        checks.append(check | {"sentence": f"{sentence} (the limit is {LIMIT:g})."})
        document[precision] = {"max_abs_diff": difference, "passed": check["passed"]}
    worst = max(checks, key=lambda check: float(check["value"]))
    return document | {"passed": bool(worst["passed"]), "checks": [worst]}


def _largest_difference(path: Path, feeds: Iterable[NDArray[Any]], answers: Answers, target: Target) -> float:
    session = open_session(path, target=target, threads=1)
    largest = 0.0
    for batch in feeds:
        found = session.run([OUTPUT_NAME, *answers.outputs], {INPUT_NAME: batch})
        given = dict(zip([OUTPUT_NAME, *answers.outputs], found, strict=True))
        expected = _softmax(given[OUTPUT_NAME])
        pairs = [(given["probabilities"], expected)] if answers.softmax else []
        if answers.top_k is not None:
            likeliest = given["top_k_probabilities"]
            pairs.append((likeliest, -np.sort(-expected, axis=1)[:, : answers.top_k]))
            pairs.append((likeliest, np.take_along_axis(expected, given["top_k_indices"], axis=1)))
        largest = max(largest, *(float(np.abs(one - other).max()) for one, other in pairs))
    return largest


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float64)
