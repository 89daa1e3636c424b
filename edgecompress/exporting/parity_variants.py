"""Parity in other settings: batches, threads, no optimizer, ORT format, and preprocessing inside the file.

What enters: exported files, and a seeded choice of the images that parity was checked on with the logits it found.
What leaves: parts of parity.json, each with its checks. The files are the same, so their answers should be too; a
choice of images is enough, since what goes wrong here goes wrong for most of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgecompress import console
from edgecompress.data.images import PreparedSplit
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, open_session
from edgecompress.exporting.parity import Logits, at_least, at_most, largest_differences, require_finite, top1_agreement
from edgecompress.settings.recipe import Gates
from edgecompress.settings.target import Target

Json = dict[str, Any]
_BATCH = 8
REFERENCE = "batches of 32, all threads, optimized"


@dataclass(frozen=True)
class Variant:
    """One way to run a file; `threads` 0 uses every core."""

    batch: int
    threads: int
    optimize: bool

    def to_dict(self) -> Json:
        threads = self.threads if self.threads else "all"
        return {"batch": self.batch, "threads": threads, "graph_optimization": "all" if self.optimize else "none"}

    @property
    def text(self) -> str:
        threads = "one thread" if self.threads == 1 else "all threads"
        return f"batch {self.batch}, {threads}, {'optimized' if self.optimize else 'not optimized'}"


VARIANTS = (Variant(1, 1, True), Variant(_BATCH, 0, True), Variant(_BATCH, 0, False))


@dataclass(frozen=True)
class Subset:
    """A choice of the compared images: `positions` [n] among them, and the images prepared, uint8 [n, C, H, W]."""

    split: PreparedSplit
    preprocessing: Preprocessing
    indices: NDArray[np.int64]
    positions: NDArray[np.int64]
    prepared: torch.Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def normalized(self, batch: int) -> Iterable[NDArray[np.float32]]:
        """The images as a plain file reads them."""
        for start in range(0, len(self), batch):
            yield self.preprocessing.normalize(self.prepared[start : start + batch]).numpy()

    def whole(self) -> Iterable[NDArray[np.uint8]]:
        """The images as they come, one at a time, as a file with preprocessing inside reads them."""
        for position in self.positions:
            yield self.split.whole_image(int(self.indices[position]))[None]


def choose_subset(
    split: PreparedSplit, preprocessing: Preprocessing, indices: NDArray[np.int64], *, samples: int, seed: int
) -> Subset:
    """A seeded choice of at most `samples` of the images at `indices`."""
    generator = np.random.default_rng(seed & 0xFFFF_FFFF_FFFF_FFFF)  # takes no negative numbers
    count = min(samples, len(indices))
    positions = np.sort(generator.choice(len(indices), size=count, replace=False)).astype(np.int64)
    batches = split.batches(count, indices=torch.from_numpy(indices[positions]))
    return Subset(split, preprocessing, indices, positions, torch.cat([images for images, _ in batches]))


def run_feeds(
    path: Path, feeds: Iterable[NDArray[Any]], *, total: int, target: Target, variant: Variant = VARIANTS[1]
) -> Logits:
    """Logits [samples, classes] of a file, .onnx or .ort, for batches in turn."""
    session = open_session(path, target=target, threads=variant.threads, optimize=variant.optimize)
    collected: list[Logits] = []
    with console.progress(f"running {path.name}, {variant.text}", total) as advance:
        for batch in feeds:
            collected.append(session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0])
            advance(len(batch))
    return np.concatenate(collected)


def compare_variants(
    path: Path, subset: Subset, reference: Logits, gates: Gates, *, precision: str, target: Target
) -> Json:
    """A plain file in every variant against `reference`, the logits of its usual run on the same images.

    For int8, running without the optimizer computes the layers in float between the same roundings: it is held to
    `int8_min_top1_agreement`, the others to what an equal computation must reach.
    """
    rows: list[Json] = []
    checks: list[Json] = []
    for variant in VARIANTS:
        logits = run_feeds(path, subset.normalized(variant.batch), total=len(subset), target=target, variant=variant)
        row, own = _compare(f"{precision} with {variant.text}", reference, logits, gates, precision=precision)
        if precision == "int8" and not variant.optimize:
            row["note"] = "layers in float between the same roundings"
            own = [_agreement("int8_min_top1_agreement", row, gates, f"{precision} with {variant.text}")]
        passed = all(check["passed"] for check in own)
        rows.append({**variant.to_dict(), **row, "passed": passed})
        checks += own
    return {
        "samples": len(subset),
        "against": REFERENCE,
        "runs": rows,
        "passed": all(row["passed"] for row in rows),
        "checks": _worst(checks, f"{precision}_runs"),
    }


def compare_ort_format(
    files: dict[str, Path],
    references: dict[str, Logits],
    subset: Subset,
    gates: Gates,
    *,
    whole_images: bool,
    target: Target,
) -> Json:
    """Each .ort file against the ONNX file it was made from; `whole_images` where preprocessing is inside both."""
    document: Json = {"samples": len(subset)}
    checks: list[Json] = []
    for precision, path in files.items():
        feeds = subset.whole() if whole_images else subset.normalized(_BATCH)
        logits = run_feeds(path, feeds, total=len(subset), target=target)
        row, own = _compare(
            path.name, references[precision], logits, gates, precision=precision, against="its ONNX file"
        )
        document[precision] = {"file": path.name, "size_bytes": path.stat().st_size, **row}
        document[precision]["passed"] = all(check["passed"] for check in own)
        checks += own
    return document | {"passed": all(check["passed"] for check in checks), "checks": _worst(checks, "ort_format")}


def compare_with_preprocessing(
    files: dict[str, Path],
    references: dict[str, Logits],
    subset: Subset,
    labels: NDArray[np.int64],
    gates: Gates,
    *,
    target: Target,
) -> tuple[Json, dict[str, Logits]]:
    """Files with their preprocessing inside, on the images as they come, against the Python pipeline.

    `references` are the logits of PyTorch (fp32) and of the plain int8 file on the same images, prepared by PIL;
    `labels` are theirs. Returns the `with_preprocessing` part of parity.json and the files' logits.

    fp32 must give the same answers. int8 must be as close to fp32 as the plain int8 file is: one grey level in a few
    pixels of ten thousand, which fp32 does not feel, moves activations over the edges of int8's steps, and an image
    between two classes gets the other one. So its answers against the plain file's are recorded and not judged.
    """
    sizes = np.array([image.shape[1:3] for image in subset.whole()])
    side = subset.preprocessing.input_size
    kept = subset.preprocessing.crop_fraction == 1.0
    document: Json = {
        "samples": len(subset),
        "images_resized": int(np.sum((sizes != side).any(axis=1))) if kept else len(subset),
        "smallest_image": sizes[sizes.prod(axis=1).argmin()].tolist(),
        "largest_image": sizes[sizes.prod(axis=1).argmax()].tolist(),
    }
    checks: list[Json] = []
    found: dict[str, Logits] = {}
    for precision, path in files.items():
        logits = found[precision] = run_feeds(
            path, subset.whole(), total=len(subset), target=target, variant=Variant(1, 0, True)
        )
        reference = references[precision]
        require_finite(logits, f"the {precision} file with preprocessing inside")
        difference, relative = largest_differences(reference, logits)
        row: Json = {
            "top1_agreement": top1_agreement(reference, logits),
            "max_abs_diff": difference,
            "max_relative_diff": relative,
            "accuracy_python": float(np.mean(reference.argmax(axis=1) == labels)),
            "accuracy_in_graph": float(np.mean(logits.argmax(axis=1) == labels)),
        }
        if precision == "int8":
            floats = references["fp32"].argmax(axis=1)
            close, close_plain = logits.argmax(axis=1) == floats, reference.argmax(axis=1) == floats
            row |= {
                "fp32_agreement": float(np.mean(close)),
                "fp32_agreement_plain": float(np.mean(close_plain)),
                "lost": int(np.sum(close_plain & ~close)),
                "won": int(np.sum(close & ~close_plain)),
            }
            check = _as_close_as_plain(row, len(subset), gates)
        else:
            what = f"{precision} with preprocessing inside"
            check = _agreement("preprocessing_min_top1_agreement", row, gates, what, against="the Python pipeline")
        document[precision] = {**row, "passed": check["passed"]}
        checks.append(check)
    main = document["fp32"]
    document |= {key: main[key] for key in ("top1_agreement", "max_abs_diff", "max_relative_diff")}
    passed = all(check["passed"] for check in checks)
    return document | {"passed": passed, "checks": _worst(checks, "inside")}, found


def _as_close_as_plain(row: Json, samples: int, gates: Gates) -> Json:
    """Whether int8 with preprocessing inside agrees with fp32 as often as the plain file, but for the gate's share.

    Both answered the same images, so what chance does is known from those where only one of them agrees: the
    difference's standard error is sqrt(lost + won) / samples (McNemar), and 1.64 of them are one-sided 95 %.
    """
    gate = "preprocessing_min_top1_agreement"
    chance = 1.64 * math.sqrt(row["lost"] + row["won"]) / samples
    limit = row["fp32_agreement_plain"] - (1.0 - getattr(gates, gate)) - chance
    sentence = (
        f"int8 with preprocessing inside agrees with fp32 on {row['fp32_agreement']:.2%} of predictions, the plain "
        f"int8 file on {row['fp32_agreement_plain']:.2%} ({row['lost']} lost, {row['won']} won of {samples})"
    )
    return at_least(gate, row["fp32_agreement"], round(limit, 6), sentence)


def _compare(
    what: str, reference: Logits, logits: Logits, gates: Gates, *, precision: str, against: str = "its usual run"
) -> tuple[Json, list[Json]]:
    """Two runs of one model: figures, and the checks that an equal computation must pass."""
    require_finite(logits, what)
    difference, relative = largest_differences(reference, logits)
    row = {
        "top1_agreement": top1_agreement(reference, logits),
        "max_abs_diff": difference,
        "max_relative_diff": relative,
    }
    if precision == "int8":
        return row, [_agreement("torch_int8_min_top1_agreement", row, gates, what, against=against)]
    sentence = f"{what} differs from {against} by {relative:.2e} of the largest logit"
    limit = gates.fp32_max_relative_diff
    return row, [
        at_most("fp32_max_relative_diff", relative, limit, sentence),
        _agreement("fp32_min_top1_agreement", row, gates, what, against=against),
    ]


def _worst(checks: list[Json], scope: str) -> list[Json]:
    """The worst check of each gate, under a name of its own: the same limit, applied to other runs."""
    worst: dict[str, Json] = {}
    for check in checks:
        sign = 1 if "min" in check["gate"].split("_") else -1
        known = worst.get(check["gate"])
        if known is None or sign * check["value"] < sign * known["value"]:
            worst[check["gate"]] = check
    return [{**check, "gate": f"{scope}_{gate}"} for gate, check in worst.items()]


def _agreement(gate: str, row: Json, gates: Gates, what: str, *, against: str = "its usual run") -> Json:
    value = row["top1_agreement"]
    return at_least(gate, value, getattr(gates, gate), f"{what} agrees with {against} on {value:.2%} of predictions")
