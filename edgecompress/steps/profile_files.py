"""`profile model.onnx [other.onnx ...]`: any ONNX files side by side on a target, the first one as the reference.

What enters: files, ours or not, and a target. What leaves: one document with the same keys for every file, the ratios
against the first, and the target's budgets judged for each. No recipe stands behind a bare file, so nothing is said of
accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecompress.measure.explanation import Depth
from edgecompress.measure.measuring import STANDARD
from edgecompress.measure.model_files import ModelFile, Shapes, name_files, open_files
from edgecompress.measure.profiling import measure_side_by_side, speedup
from edgecompress.measure.verdict import judge_budgets
from edgecompress.settings.target import Target

Json = dict[str, Any]
# Of a bare file nobody knows whether it is right, so it is never said to be ready to ship.
_STATUS = {"ship": "met", "hold": "missed", "inconclusive": "open"}


def profile_files(
    paths: Sequence[Path],
    *,
    target: Target,
    seconds: float,
    depth: Depth,
    thoroughness: str = STANDARD,
    shapes: Shapes | None = None,
) -> Json:
    """Measure ONNX files side by side; returns the document, with `missed`, the budgets that any of them misses.

    `reference` names the first file, and `ratios` [name] says how many times as long it takes as each other file.
    `budgets` [name] has `status` ("met", "missed" or "open") and `reasons`; `latency_ms` and all else stands under
    `models`, with the same keys for each. Raises ModelError for a file that cannot be measured, and
    ProfileError.
    """
    named = name_files(paths)
    files = open_files(named, shapes or {})
    document, latency = measure_side_by_side(
        named,
        target=target,
        input_npy=None,
        seconds=seconds,
        depth=depth,
        thoroughness=thoroughness,
        explained=list(named),
        shapes={name: file.sizes for name, file in files.items()},
        batches={name: file.batch for name, file in files.items()},
    )
    first, *others = named
    nothing: Json = {"ratio": None, "ci95": None}
    document["reference"] = first
    document["ratios"] = {name: dict(nothing) if latency is None else speedup(latency, first, name) for name in others}
    for name, file in files.items():
        batch = {"batch": file.images, "batch_is_fixed": file.batch is not None}
        document["models"][name] |= {"file": str(file.path), "inputs": list(file.inputs), **batch}
    document["notes"] += _notes(files)
    verdicts = {name: judge_budgets(name, document, target=target) for name in named}
    document["budgets"] = {
        name: {"status": _STATUS[verdict.verdict], "reasons": verdict.reasons} for name, verdict in verdicts.items()
    }
    document["missed"] = [text for verdict in verdicts.values() for text in verdict.missed]
    document["target_facts"] = target.model_dump(mode="json")
    return document


def _notes(files: Mapping[str, ModelFile]) -> list[str]:
    notes = []
    for name, file in files.items():
        if len(file.inputs) > 1:
            made = ", ".join(f"{entry['name']} {entry['type']} {entry['shape']}" for entry in file.inputs)
            notes.append(f"{name} takes {len(file.inputs)} inputs, all made up at random: {made}.")
        if file.batch not in (None, 1):
            notes.append(f"{name} runs {file.batch} images at a time: its latency and MACs are for all of them.")
    images = {file.images for file in files.values()}
    if len(images) > 1:
        notes.append(
            "The files run different numbers of images at a time: their ratios compare inferences, not images."
        )
    return notes
