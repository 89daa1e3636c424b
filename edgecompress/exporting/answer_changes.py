"""What int8 changed in the answers: confidence, which classes are taken for which, and the images that flipped.

What enters: both files' logits on the reported images, and the images. What leaves: parts of parity.json, and a small
picture of each flipped image that is named there, so that a person can see what the model lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgecompress.data.images import PreparedSplit
from edgecompress.exporting.parity import Logits
from edgecompress.run_directory import atomic_path
from edgecompress.training.confidence import calibration_of, softmax

PICTURES = "flipped"
_CONFUSIONS = 20
_CLASSES, _IMAGES_OF_A_CLASS = 8, 4
_PICTURE_SIZE = 96


def answer_changes(
    float_logits: Logits, int8_logits: Logits, labels: NDArray[np.int64], class_names: Sequence[str]
) -> dict[str, Any]:
    """The parts `calibration` and `confusions` of parity.json, both files side by side.

    A confusion is a class that is answered in place of another; those whose count int8 changed most come first.
    """
    return {
        "calibration": {
            "fp32": calibration_of(float_logits, labels),
            "int8": calibration_of(int8_logits, labels),
        },
        "confusions": _confusions(float_logits.argmax(axis=1), int8_logits.argmax(axis=1), labels, class_names),
    }


def _confusions(
    before: NDArray[np.int64], after: NDArray[np.int64], labels: NDArray[np.int64], class_names: Sequence[str]
) -> dict[str, Any]:
    counts = [
        Counter((int(label), int(answer)) for label, answer in zip(labels, answers, strict=True) if label != answer)
        for answers in (before, after)
    ]
    pairs = [pair for pair in {*counts[0], *counts[1]} if counts[0][pair] != counts[1][pair]]
    most = sorted(pairs, key=lambda pair: (-abs(counts[1][pair] - counts[0][pair]), pair))[:_CONFUSIONS]
    return {
        "changed": len(pairs),
        "rows": [
            {
                "class": class_names[label],
                "answer": class_names[answer],
                "fp32": counts[0][label, answer],
                "int8": counts[1][label, answer],
            }
            for label, answer in most
        ],
    }


def flipped_images(
    float_logits: Logits,
    int8_logits: Logits,
    split: PreparedSplit,
    indices: NDArray[np.int64],
    class_names: Sequence[str],
    folder: Path,
) -> list[dict[str, Any]]:
    """The part `flipped` of parity.json, with a picture of each in `folder`/flipped; those of an earlier export go.

    Of the classes that lost most images, up to four each: those that fp32 had right come first, the surest ahead.
    """
    labels = split.labels.numpy()[indices]
    before, after = softmax(float_logits), softmax(int8_logits)
    answers = before.argmax(axis=1), after.argmax(axis=1)
    flipped = np.flatnonzero(answers[0] != answers[1])
    lost = Counter(int(labels[k]) for k in flipped if answers[0][k] == labels[k])
    chosen: list[int] = []
    for label in sorted({int(labels[k]) for k in flipped}, key=lambda label: (-lost[label], label))[:_CLASSES]:
        own = [int(k) for k in flipped if labels[k] == label]
        own.sort(key=lambda k: (answers[0][k] != labels[k], -before[k].max()))
        chosen += own[:_IMAGES_OF_A_CLASS]
    pictures = _save_pictures(split, indices[chosen], folder / PICTURES)
    return [
        {
            "class": class_names[int(labels[k])],
            "image": int(indices[k]),
            "file": split.file_name(int(indices[k])),
            "picture": f"{PICTURES}/{picture}",
            "fp32": class_names[int(answers[0][k])],
            "fp32_confidence": float(before[k].max()),
            "int8": class_names[int(answers[1][k])],
            "int8_confidence": float(after[k].max()),
            "lost": bool(answers[0][k] == labels[k]),
            "won": bool(answers[1][k] == labels[k]),
        }
        for k, picture in zip(chosen, pictures, strict=True)
    ]


def _save_pictures(split: PreparedSplit, indices: NDArray[np.int64], folder: Path) -> list[str]:
    """Write the prepared images, uint8 [N, C, H, W], at most 96 pixels wide; returns their names."""
    for stale in folder.glob("*.png") if folder.is_dir() else ():
        stale.unlink()
    names: list[str] = []
    for images, _ in split.batches(len(indices), indices=torch.from_numpy(indices)) if len(indices) else ():
        for image in images.numpy():
            name = f"{int(indices[len(names)])}.png"
            picture = Image.fromarray(image[0] if len(image) != 3 else image.transpose(1, 2, 0))
            picture.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder / name) as temporary:
                picture.quantize(64).save(temporary) if picture.mode == "RGB" else picture.save(temporary)
            names.append(name)
    return names
