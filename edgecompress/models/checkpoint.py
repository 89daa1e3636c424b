"""A float stage on disk: how to build the architecture, what was done to it since, and the weights.

What enters: a module with its architecture and pruning history. What leaves: model.json and
model.safetensors, from which exactly that module is made again. No pickled module is ever written or
read: code does not come out of a run directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from edgecompress.errors import ModelError, PruningError, RunError
from edgecompress.models.finiteness import non_finite_tensor
from edgecompress.models.model_building import Architecture, build
from edgecompress.models.model_history import History, history_from_json, history_to_json, replay
from edgecompress.run_directory import atomic_path, read_json, write_text
from edgecompress.settings.named_code import require_named

FORMAT_VERSION = 2
_READABLE = (1, FORMAT_VERSION)  # version 1 knew only cuts of channels


@dataclass(frozen=True)
class Checkpoint:
    """A module and what it takes to make it again."""

    module: nn.Module
    architecture: Architecture
    history: History = ()


def example_input(architecture: Architecture, batch: int = 2) -> torch.Tensor:
    """Zeros of the model's input shape, [batch, C, H, W]."""
    size = architecture.preprocessing.input_size
    return torch.zeros(batch, architecture.preprocessing.channels, size, size)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of model.json."""
    return {
        "format_version": FORMAT_VERSION,
        "architecture": checkpoint.architecture.to_dict(),
        "history": history_to_json(checkpoint.history),
    }


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write model.json and model.safetensors into `folder`."""
    save_weights(checkpoint.module, folder / "model.safetensors")
    write_text(folder / "model.json", json.dumps(describe(checkpoint), indent=2) + "\n")


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the module's state to one safetensors file."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def rebuild(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The module of model.json in its shape but without its weights, and the file's content."""
    description = read_json(folder / "model.json")
    try:
        if description["format_version"] not in _READABLE:
            raise RunError(f"{folder}: format_version {description['format_version']} is newer than {FORMAT_VERSION}")
        architecture = Architecture.from_dict(description["architecture"])
        require_named(architecture.name, where=folder / "model.json")
        history = history_from_json(description["history"])
    except (KeyError, TypeError, ValueError, OverflowError, ModelError) as error:
        raise RunError(f"{folder / 'model.json'}: not a model description: {error!r}") from error
    try:
        module = build(architecture)
        replay(module, example_input(architecture), history)
    except (ModelError, PruningError) as error:
        raise RunError(f"{folder / 'model.json'}: {error}") from error
    return Checkpoint(module.eval(), architecture, history), description


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a float stage back. Raises RunError when the files are damaged or do not fit each other."""
    checkpoint, _ = rebuild(folder)
    try:
        tensors = load_file(folder / "model.safetensors")
        checkpoint.module.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{folder}: weights do not fit model.json: {str(error).splitlines()[0]}") from error
    wrong = non_finite_tensor(tensors)
    if wrong is not None:
        raise RunError(f"{folder / 'model.safetensors'}: '{wrong}' holds NaN or infinity; run the stage again")
    return checkpoint
