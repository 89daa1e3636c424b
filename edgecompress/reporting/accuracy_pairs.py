"""Two runs in, whether they were judged on the same images out, and how their answers differ image by image.

What enters: manifests, and which images each run's stage got right. What leaves: the difference of accuracies with an
interval and an exact test that count only the images on which the two disagree, as they must where the images are the
same: most errors are shared, so independent samples would need far more images to tell as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from edgecompress.errors import RunError
from edgecompress.exporting.significance import SIGNIFICANT, mcnemar
from edgecompress.reporting.differences import Difference
from edgecompress.reporting.summary import section
from edgecompress.run_directory import RIGHT_FILE, RunDirectory, read_array
from edgecompress.training.evaluate import paired_drop_interval

Right = np.ndarray[Any, np.dtype[np.bool_]]


def same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two manifests' accuracies are of the same images, whatever either was trained on."""
    a, b = section(one, "data"), section(other, "data")
    if a.get("report_split") != b.get("report_split"):
        return False
    key = "report_fingerprint" if a.get("report_fingerprint") and b.get("report_fingerprint") else "fingerprint"
    return a.get(key) == b.get(key)


def right_answers(run: RunDirectory, stage_id: str) -> Right | None:
    """Which reported images a stage got right, bool [samples]; None for a run that did not keep it. Raises RunError."""
    path = run.stage(stage_id) / RIGHT_FILE
    if not path.is_file():
        return None
    right: Right = read_array(path)
    if right.dtype != np.bool_ or right.ndim != 1 or not len(right):
        raise RunError(f"{path}: holds no answers (bool [samples]); run the recipe again")
    return right


def paired_difference(reference: Right, other: Right) -> Difference:
    """Other less reference, in points, on the same images in the same order.

    The interval is Agresti and Min's (2005), the test McNemar's exact one. Only where both say so is one better.
    """
    low, high = (-end for end in reversed(paired_drop_interval(torch.from_numpy(reference), torch.from_numpy(other))))
    test = mcnemar(reference, other)
    better: Literal["this", "reference", "neither"] = "neither"
    if test.p_value < SIGNIFICANT and not low <= 0 <= high:
        better = "this" if low > 0 else "reference"
    value = (test.won - test.lost) / len(reference)
    paired = {"samples": len(reference), **test.to_dict()}
    return Difference(100 * value, 100 * low, 100 * high, better, paired)


def pairing_text(paired: Mapping[str, Any]) -> str:
    """What the images say, in words."""
    p_value = paired["p_value"]
    shown = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    return f"of {paired['samples']:,} images {paired['won']} won and {paired['lost']} lost, {shown}"
