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
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit
from edgecompress.errors import ParityError
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, open_session
from edgecompress.exporting.significance import SIGNIFICANT, images_needed, mcnemar, p_of_drop
from edgecompress.machine import architecture, has_vnni
from edgecompress.run_directory import read_json
from edgecompress.settings.recipe import Gates
from edgecompress.settings.target import INT8_ACTIVATIONS_KEY, Target

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


def run_onnx(
    path: Path, split: PreparedSplit, preprocessing: Preprocessing, indices: NDArray[np.int64], *, target: Target
) -> Logits:
    """Logits [samples, classes] of an ONNX file for the images at `indices`, by the graph that the target runs."""
    import torch

    session = open_session(path, target=target)
    collected: list[Logits] = []
    with console.progress(f"running {path.name}", len(indices)) as advance:
        for images, _ in split.batches(_BATCH_SIZE, indices=torch.from_numpy(indices)):
            batch = preprocessing.normalize(images).numpy()
            collected.append(session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0])
            advance(len(images))
    return np.concatenate(collected)


def largest_differences(reference: Logits, other: Logits) -> tuple[float, float]:
    """The largest difference of two arrays of logits, and its share of the reference's largest logit."""
    difference = float(np.abs(reference - other).max())
    return difference, difference / max(float(np.abs(reference).max()), 1e-12)


def compare_float(torch_logits: Logits, onnx_logits: Logits, gates: Gates) -> dict[str, Any]:
    """PyTorch against ONNX, both fp32: the `onnx_fp32` part of parity.json, with its `checks`."""
    require_finite(torch_logits, "PyTorch")
    require_finite(onnx_logits, "the fp32 ONNX file")
    difference, relative = largest_differences(torch_logits, onnx_logits)
    agreement = top1_agreement(torch_logits, onnx_logits)
    checks = [
        at_most(
            "fp32_max_relative_diff",
            relative,
            gates.fp32_max_relative_diff,
            f"fp32 ONNX differs from PyTorch by {relative:.2e} of the largest logit",
        ),
        at_least(
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
    float_logits: Logits,
    int8_logits: Logits,
    torch_int8_logits: Logits,
    labels: NDArray[np.int64],
    gates: Gates,
    *,
    cause: str = "",
) -> dict[str, Any]:
    """int8 ONNX against fp32 ONNX and against int8 PyTorch: the `onnx_int8` part of parity.json.

    `cause` is why the file may differ from PyTorch on this machine, as `cause_of_difference` says it.
    """
    require_finite(float_logits, "the fp32 ONNX file")
    require_finite(torch_int8_logits, "int8 PyTorch")
    require_finite(int8_logits, "the int8 ONNX file")
    was_right, is_right = float_logits.argmax(axis=1) == labels, int8_logits.argmax(axis=1) == labels
    agreement = top1_agreement(float_logits, int8_logits)
    torch_agreement = top1_agreement(torch_int8_logits, int8_logits)
    checks = [
        at_least(
            "int8_min_top1_agreement",
            agreement,
            gates.int8_min_top1_agreement,
            f"int8 ONNX agrees with fp32 ONNX on {agreement:.2%} of predictions",
        ),
        at_least(
            "torch_int8_min_top1_agreement",
            torch_agreement,
            gates.torch_int8_min_top1_agreement,
            f"int8 ONNX agrees with int8 PyTorch on {torch_agreement:.2%} of predictions{cause}",
        ),
    ]
    return {
        "top1_agreement": agreement,
        # A model that answers nothing but zeros is a missed gate (predictions_vary), not a crash.
        "sqnr_db": sqnr_db(float_logits, int8_logits) if float_logits.any() else float("nan"),
        "accuracy_fp32": float(np.mean(was_right)),
        "accuracy_int8": float(np.mean(is_right)),
        "mcnemar": mcnemar(was_right, is_right).to_dict(),
        "torch_int8_top1_agreement": torch_agreement,
        "torch_int8_max_abs_diff": float(np.abs(torch_int8_logits - int8_logits).max()),
        "passed": all(check["passed"] for check in checks),
        "checks": checks,
    }


def compare_with_first(
    first_logits: Logits, int8_logits: Logits, labels: NDArray[np.int64], gates: Gates, *, first: str, target: str
) -> dict[str, Any]:
    """An int8 file that was quantized again for a target, against the recipe's first model on the same images.

    The `onnx_int8_against_first` part of parity.json. `apply` judged another int8 model; its gate says nothing of this
    one. `first` names the stage of the first model.
    """
    before, after = (int(np.sum(logits.argmax(axis=1) == labels)) for logits in (first_logits, int8_logits))
    drop = (before - after) / len(labels)
    check = at_most(
        "max_accuracy_drop",
        drop,
        gates.max_accuracy_drop,
        f"The int8 model quantized again for {target} has accuracy {after / len(labels):.2%}, {drop * 100:.2f} points "
        f"below the {first} model's {before / len(labels):.2%} on the same images",
    )
    return {
        "model": first,
        "accuracy": before / len(labels),
        "accuracy_int8": after / len(labels),
        "accuracy_drop": drop,
        "passed": check["passed"],
        "checks": [check],
    }


def cause_of_difference(*, activations: str, weight_bits: int, target: Target) -> str:
    """Why an int8 file may answer otherwise here than int8 PyTorch, as the end of a sentence; empty where nothing says.

    `activations` and `weight_bits` are those of the int8 scheme.
    """
    if activations == "int8" and not target.fuses_int8_activations:
        return (
            f"; ONNX Runtime leaves int8 activations in float on {target.name}: use uint8, or set "
            f"session.config {INT8_ACTIVATIONS_KEY}: '1' in the target"
        )
    if weight_bits == 8 and architecture() == "x86_64" and not has_vnni():
        where = " (not on the target)" if target.architecture != "x86_64" else ""
        return f"; this CPU shows no VNNI, without which 8-bit weights saturate{where}"
    return ""


def at_most(gate: str, value: float, limit: float, sentence: str) -> dict[str, Any]:
    """A check that a value does not exceed the gate of that name, with its sentence."""
    text = f"{sentence} (at most {limit:g}, gates.{gate})."
    return {"gate": gate, "value": value, "limit": limit, "passed": value <= limit, "sentence": text}


def at_least(gate: str, value: float, limit: float, sentence: str) -> dict[str, Any]:
    """A check that a value reaches the gate of that name, with its sentence."""
    text = f"{sentence} (at least {limit:g}, gates.{gate})."
    return {"gate": gate, "value": value, "limit": limit, "passed": value >= limit, "sentence": text}


def constant_predictions(logits: Logits) -> bool:
    """Whether every image gets the same answer, so that agreement proves nothing."""
    return len(np.unique(logits.argmax(axis=1))) < 2


def only_answer(logits: Logits, class_names: tuple[str, ...]) -> str | None:
    """The class that every image is taken for; None where answers differ."""
    answers = np.unique(logits.argmax(axis=1))
    return class_names[int(answers[0])] if len(answers) == 1 else None


def class_changes(
    float_logits: Logits, int8_logits: Logits, labels: NDArray[np.int64], class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Accuracy per class before and after int8, how many of its images changed their answer, and what that proves.

    `lost` images were right in fp32 and are wrong in int8, `won` the other way round; `p_value` is the chance of such
    a loss where int8 changes nothing for the better or the worse.
    """
    before, after = float_logits.argmax(axis=1), int8_logits.argmax(axis=1)
    rows = []
    for label in np.unique(labels):
        chosen = labels == label
        was_right, is_right = before[chosen] == label, after[chosen] == label
        change = mcnemar(was_right, is_right)
        rows.append(
            {
                "name": class_names[int(label)],
                "samples": int(chosen.sum()),
                "accuracy_fp32": float(np.mean(was_right)),
                "accuracy_int8": float(np.mean(is_right)),
                "flips": int(np.sum(before[chosen] != after[chosen])),
                "lost": change.lost,
                "won": change.won,
                "p_value": p_of_drop(change.lost, change.won),
            }
        )
    return rows


def worst_class(rows: list[dict[str, Any]], gates: Gates) -> dict[str, Any]:
    """The class that int8 costs most, and the gate on it: the `worst_class` part of parity.json, with its `checks`.

    A drop beyond the gate fails only where it is more than chance, at 5 % over all classes together (Bonferroni:
    each of k classes at 5 % / k); where it is not, `images_needed` says how many images would settle it.
    """
    level = SIGNIFICANT / max(1, len(rows))
    drops = [row["accuracy_fp32"] - row["accuracy_int8"] for row in rows]
    proven = [drop if row["p_value"] < level else 0.0 for row, drop in zip(rows, drops, strict=True)]
    limit = gates.max_class_accuracy_drop
    failing = any(drop > limit for drop in proven)
    # What is named is a class that fails, where one does: a larger drop may be one of two images.
    ranked = proven if failing else drops
    row, drop = rows[int(np.argmax(ranked))], drops[int(np.argmax(ranked))]
    named = f"class {row['name']} loses {drop * 100:.1f} points by int8 on {row['samples']} images"
    needed = None
    if drop > limit and not failing:
        needed = images_needed(row["samples"], row["lost"], row["won"], level=level)
        tells = f"about {needed} images of it would tell" if needed else "no number of images would tell at this rate"
        named += f", which may be chance (p = {row['p_value']:.2g}); {tells}"
    return {
        "name": row["name"],
        "samples": row["samples"],
        "drop": drop,
        "p_value": row["p_value"],
        "significance_level": level,
        "images_needed": needed,
        "sentence": f"{named[0].upper()}{named[1:]}." if drop > 0 else "No class loses accuracy by int8.",
        "checks": [at_most("max_class_accuracy_drop", max(0.0, *proven), limit, f"{named[0].upper()}{named[1:]}")],
    }


def without_parity(folder: Path) -> list[str]:
    """A sentence for each model file of an export's folder of which its parity.json says nothing."""
    path = folder / "parity.json"
    known = read_json(path) if path.is_file() else {}
    return [
        f"{name} has no parity record, so nothing proves its answers; export again with --int8."
        for name, part in (("model.onnx", "onnx_fp32"), ("model.int8.onnx", "onnx_int8"))
        if (folder / name).is_file() and part not in known
    ]


def require_finite(logits: Logits, what: str) -> None:
    """Raise ParityError where logits are no numbers."""
    if not np.isfinite(logits).all():
        raise ParityError(f"{what} gives NaN or infinity on {int((~np.isfinite(logits)).any(axis=1).sum())} images")
