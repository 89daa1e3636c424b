"""What a stage's result depends on, as one hash: the name under which a cache keeps it.

What enters: a stage, its recipe, the model that it starts from, data and target. What leaves: a sha256. Whatever may
change the result is in it: settings, seed, images, the weights before and those of teachers, files that the settings
name, the target's facts where something is measured, versions, this package's own code, and the kind of machine. What
cannot change it (the recipe's other stages, where the run lies) is not, so that runs share what they have in common.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgecompress.data.run_data import ImageData
from edgecompress.machine import architecture, isa_features, versions
from edgecompress.models.checkpoint import Checkpoint, describe
from edgecompress.run_directory import Json, RunDirectory, sha256_of
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import QuantizeStage, Recipe, Stage
from edgecompress.settings.target import Target, own_target
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.settings.user_code import is_user_code
from edgecompress.steps.training_context import early_weights_of

FORMAT = 1  # raised when what is kept, or how it is named, changes
# The rooms whose code makes a stage's result: all that a stage's own modules import, and what those import in turn.
_ROOMS = ("data", "exporting", "int8", "measure", "models", "pruning", "settings", "stages", "steps", "training")
_PACKAGE = Path(__file__).resolve().parent.parent


def stage_key(
    stage: Stage,
    *,
    recipe: Recipe,
    run: RunDirectory,
    current: Checkpoint,
    earlier: Mapping[str, Checkpoint],
    data: ImageData,
    target: Target | None,
) -> str:
    """Hex sha256 of all that the result of `stage` depends on; `current` is the model that it starts from."""
    facts: Json = {
        "format": FORMAT,
        "stage": stage.model_dump(mode="json"),
        "seed": recipe.seed,
        "precision": recipe.precision,
        "data": [data.fingerprint, data.num_classes],
        "input": checkpoint_sha256(current),
        "teachers": {name: checkpoint_sha256(earlier[name]) for name in _stages_that_teach(stage)},
        "files": _files_named(stage.model_dump(mode="json")) | _files_named(describe(current)),
        "early": _early_facts(stage, recipe, run),
        "target": _target_facts(stage, target),
        "versions": versions(),
        "code": _code_sha256(),
        "machine": _machine_facts(),
    }
    if isinstance(stage, QuantizeStage):
        manifest = run.read_manifest()
        baseline = str(manifest.get("baseline", manifest["stages"][0])["id"])
        weights = run.stage(baseline) / "model.safetensors"
        facts["judged_against"] = [
            recipe.has_trained_weights,
            recipe.gates.max_accuracy_drop,
            recipe.gates.int8_min_top1_agreement,
            sha256_of(weights) if weights.is_file() else None,
        ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Hash of a model: how it is built, and every number in it."""
    digest = hashlib.sha256(json.dumps(describe(checkpoint), sort_keys=True, default=str).encode())
    for name, tensor in sorted(checkpoint.module.state_dict().items()):
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{whole.dtype}\0{tuple(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stages_that_teach(stage: Stage) -> list[str]:
    teacher = getattr(stage, "teacher", None)
    if not isinstance(teacher, TeacherSettings):
        return []
    return sorted({source.stage for source in teacher.sources if source.stage is not None})


def _early_facts(stage: Stage, recipe: Recipe, run: RunDirectory) -> list[Any]:
    """The early weights that this stage keeps for the next one, or goes back to."""
    early_id, epoch = early_weights_of(recipe, stage.id)
    if early_id is None:
        return []
    path = run.stage(early_id) / "early.safetensors"
    return ["kept", epoch] if epoch is not None else ["read", sha256_of(path) if path.is_file() else None]


def _target_facts(stage: Stage, target: Target | None) -> Json:
    """All of the target where the stage measures on it, or takes its scheme; else what pruning rounds channels to."""
    resolved = target or own_target()
    measures = isinstance(stage, QuantizeStage | FactorizeStage) or (
        isinstance(stage, PruneStage) and stage.latency_ratio is not None
    )
    if not measures:
        return {"channel_multiple": resolved.channel_multiple}
    facts = resolved.model_dump(mode="json", exclude={"description", "sources", "budgets"})
    return facts | {"named": target is not None, "min_int8_speedup": resolved.budgets.min_int8_speedup}


def _files_named(document: Any) -> dict[str, str | None]:
    """Content of every checkpoint and file of the user's own code that settings name, by path."""
    return {str(path): sha256_of(path) if path.is_file() else None for path in _paths_in(document)}


def _paths_in(document: Any) -> Iterator[Path]:
    if isinstance(document, Mapping):
        if document.get("checkpoint"):
            yield Path(str(document["checkpoint"]))
        if is_user_code(str(document.get("name", ""))):
            yield Path(str(document["name"]).rpartition(":")[0])
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            yield from _paths_in(item)


@functools.cache
def _code_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (_PACKAGE / room).rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _machine_facts() -> Json:
    """The kind of machine: another one, or another number of threads, sums in another order."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "architecture": architecture(),
        "isa": isa_features(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
