"""What the steps of a run share: the resolved recipe, the data, the manifest's entries.

What enters: a run directory. What leaves: its recipe and data opened again, and changes to run.json. The
manifest is the only memory between commands, so `export` after `apply` sees what `run` would have seen.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecompress.data.run_data import ImageData
from edgecompress.errors import DataError, ModelError, RunError
from edgecompress.models.checkpoint import Checkpoint, load_checkpoint
from edgecompress.models.complexity import compressed_size_bytes, measure_complexity
from edgecompress.models.weights import NEW_HEAD
from edgecompress.run_directory import RIGHT_FILE, Json, RunDirectory, atomic_path, read_array
from edgecompress.settings.configuration import apply_overrides, validate
from edgecompress.settings.named_code import require_all_named
from edgecompress.settings.recipe import INITIAL_ID, QuantizeStage, Recipe
from edgecompress.training.confidence import calibration_of
from edgecompress.training.evaluate import accuracy, wilson_interval

INITIAL = INITIAL_ID
"""Folder of the model as the recipe gave it, when no stage trains it from scratch."""


def recipe_of(manifest: Json, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a run was made with, with overrides on top.

    Raises ConfigurationError, and RunError where run.json names code that the user has not.
    """
    require_all_named(manifest["recipe"], where="run.json: recipe")
    return validate(Recipe, apply_overrides(manifest["recipe"], overrides), source="run.json: recipe")


def recipe_document(recipe: Recipe) -> Json:
    """The resolved recipe as it is stored in run.json."""
    return recipe.model_dump(mode="json")


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of the resolved recipe, whatever file and overrides it came from."""
    return hashlib.sha256(json.dumps(recipe_document(recipe), sort_keys=True).encode()).hexdigest()


def last_float_id(recipe: Recipe) -> str:
    """The stage whose model is exported as fp32: the last that is not quantize, or the initial model."""
    trained = [stage.id for stage in recipe.stages if not isinstance(stage, QuantizeStage)]
    return trained[-1] if trained else INITIAL


def require_trained_head(recipe: Recipe, new_head: str | None, data: ImageData) -> None:
    """Raises ModelError where `new_head`, the note of a head without weights, is of a model that no stage trains.

    Its answers would be chance, and int8 would be compared with that.
    """
    if new_head is None or recipe.trains:
        return
    fix = "set model.num_classes to theirs" if data.has_class_index else "give data.class_index"
    raise ModelError(
        f"model: {new_head.removeprefix(NEW_HEAD)}, so the head would be new and no stage trains it; add a train stage "
        f"(`edgecompress init` writes one), or, where the images are of some of the weights' classes, {fix}"
    )


def load_float(run: RunDirectory, recipe: Recipe) -> Checkpoint:
    """The float model to export. Raises RunError when its stage is not complete."""
    folder = run.stage(last_float_id(recipe))
    if not (folder / "model.json").is_file():
        raise RunError(f"{run.path}: stage {folder.name} is not complete; go on with: edgecompress apply --resume")
    return load_checkpoint(folder)


def require_same_data(manifest: Json, data: ImageData) -> None:
    """Raises DataError when the images are not those that the run was made with."""
    recorded = manifest.get("data", {}).get("fingerprint")
    if recorded != data.fingerprint:
        raise DataError(
            f"data: the images have changed since the run was made (fingerprint {data.fingerprint[:12]}, "
            f"run.json says {str(recorded)[:12]}); start a new run, or restore the data"
        )


def report_indices(data: ImageData, recipe: Recipe) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The images that parity is checked on: all of the report split, or a seeded choice of gates.max_samples."""
    total = len(data.splits[data.report_split])
    if total <= recipe.gates.max_samples:
        return np.arange(total, dtype=np.int64)
    generator = np.random.default_rng(recipe.data.split_seed & 0xFFFF_FFFF_FFFF_FFFF)  # takes no negative numbers
    return np.sort(generator.choice(total, size=recipe.gates.max_samples, replace=False)).astype(np.int64)


def save_answers(run: RunDirectory, stage_id: str, logits: Tensor, labels: Tensor) -> None:
    """Keep a stage's logits on the report split, float32 [samples, classes], and which of them are right.

    Parity need not run the stage again, and `compare` holds runs against each other image by image.
    """
    right = (logits.argmax(dim=1) == labels).numpy()
    for name, array in (("logits.npy", logits.numpy().astype(np.float32)), (RIGHT_FILE, right)):
        with atomic_path(run.stage(stage_id) / name) as temporary, temporary.open("wb") as stream:
            np.save(stream, array)


def load_logits(run: RunDirectory, stage_id: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of a stage on the report split. Raises RunError."""
    path = run.stage(stage_id) / "logits.npy"
    logits: np.ndarray[Any, np.dtype[np.float32]] = read_array(path)
    if logits.dtype != np.float32 or logits.ndim != 2:
        raise RunError(f"{path}: holds no logits (float32 [samples, classes]); run the recipe again")
    return logits


def evaluation_entry(logits: Tensor, labels: Tensor, split: str) -> Json:
    """Accuracy with its interval and the error of the model's confidence, as run.json records them."""
    value = accuracy(logits, labels)
    answers = np.unique(logits.numpy().argmax(axis=1)).tolist()
    return {
        "accuracy": value,
        "accuracy_split": split,
        "accuracy_ci95": list(wilson_interval(value, len(labels))),
        "ece": calibration_of(logits.numpy(), labels.numpy())["ece"],
        "samples": len(labels),
        "constant_class": answers[0] if len(answers) == 1 else None,
    }


def cost_entry(run: RunDirectory, checkpoint: Checkpoint, stage_id: str, example: Tensor) -> Json:
    """Parameters, MACs, zeros and bytes of a saved stage."""
    complexity = measure_complexity(checkpoint.module, example)
    weights = run.stage(stage_id) / "model.safetensors"
    return {
        "params": complexity.params,
        "macs": complexity.macs,
        "sparsity": complexity.sparsity,
        "size_bytes": weights.stat().st_size,
        "size_bytes_compressed": compressed_size_bytes(weights),
    }


def record_decision(manifest: Json, what: str, value: Any, why: str, *, stage: str | None = None) -> None:
    """Add a decision, or replace the one of the same name. `stage` is the stage whose result depends on it.

    A stage records again what it finds recorded, so that every decision behind its result is called its own.
    """
    others = [d for d in manifest.setdefault("decisions", []) if d["what"] != what]
    made_by = {} if stage is None else {"stage": stage}
    manifest["decisions"] = [*others, {"what": what, "value": value, "why": why, **made_by}]


def decision_of(manifest: Json, what: str) -> Json | None:
    """A recorded decision: `value` and `why`; None where nothing was decided yet."""
    return next((d for d in manifest.get("decisions", []) if d["what"] == what), None)


def seed_everything(seed: int) -> None:
    """Seed torch and numpy's legacy generator, which torchvision and timm draw from when they initialize."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
