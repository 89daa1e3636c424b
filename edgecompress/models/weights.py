"""Checkpoints from outside: a file of weights into a module, or one clear reason why not.

What enters: a module and a path. What leaves: the module with its weights, and notes. A checkpoint is data, never
code: only safetensors and state dicts that `torch.load(weights_only=True)` takes are read, and every tensor is
compared before the first is copied, so that a refused checkpoint leaves the module as it was.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from edgecompress.errors import ModelError
from edgecompress.models.finiteness import non_finite_tensor

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
_NAMED_IN_MESSAGES = 5
NEW_HEAD = "head re-initialised: "  # how a note begins that tells of an output layer without weights


def load_checkpoint(module: nn.Module, path: Path, *, allow_new_head: bool) -> list[str]:
    """Load weights into a module, in place, and return what the user should know.

    With `allow_new_head`, a head for another number of classes is left as initialised, with a note. Raises ModelError
    when the file is missing, damaged, holds code or weights that are not finite, or does not fit.
    """
    tensors = _read_tensors(path.expanduser())
    own = module.state_dict()
    shapes = {key: (tuple(tensors[key].shape), tuple(own[key].shape)) for key in own if key in tensors}
    misfits = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    # Counters of batches were added to batch norm later; checkpoints without them are whole.
    missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in own]
    notes: list[str] = []
    if missing or unexpected or misfits:
        head = None if missing or unexpected else head_classes(misfits)
        if head is None:
            raise ModelError(f"{path}: does not fit the model:\n{_mismatches(missing, unexpected, misfits)}")
        theirs, ours = head
        if not allow_new_head:
            raise ModelError(
                f"{path}: the checkpoint's head has {theirs} classes, the model {ours}; set model.num_classes: "
                f"{theirs}, or leave model.num_classes out to train a new head"
            )
        notes.append(f"{NEW_HEAD}the checkpoint has {theirs} classes, the model {ours}")
    fitting = {key: tensor for key, tensor in tensors.items() if key not in misfits}
    wrong = non_finite_tensor(fitting)
    if wrong is not None:
        raise ModelError(f"{path}: '{wrong}' holds values that are not finite; use an earlier checkpoint")
    module.load_state_dict(fitting, strict=False)
    return notes


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(f"model.checkpoint: there is no file {path}; give a .safetensors, .pt or .pth file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path}: not a whole safetensors file ({one_line(error)}); copy it anew") from error
    if path.suffix not in (".pt", ".pth"):
        raise ModelError(f"{path}: a checkpoint is a .safetensors, .pt or .pth file; save the state dict as one")
    if _is_torchscript(path):
        raise ModelError(
            f"{path}: is TorchScript, which holds code, and is refused; save the state dict of the model that it was "
            "made from: torch.save(model.state_dict(), 'weights.pt'), or as safetensors"
        )
    document = _read_pickle(path)
    if isinstance(document, Mapping):
        document = next((document[key] for key in _STATE_DICT_KEYS if isinstance(document.get(key), Mapping)), document)
    if not isinstance(document, Mapping) or not document:
        raise ModelError(f"{path}: holds {type(document).__name__}; expected a state dict of tensors by name")
    if strange := [key for key, value in document.items() if not isinstance(value, torch.Tensor)]:
        raise ModelError(
            f"{path}: '{strange[0]}' is no tensor; expected a state dict, alone or under {', '.join(_STATE_DICT_KEYS)}"
        )
    tensors = {str(key): value for key, value in document.items()}
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of torch.jit.save, known by the table of constants that its code refers to."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
        return False  # damaged, which reading it says


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # torch announces unusual pickle protocols before it refuses or reads the file; either way is handled.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: contains code (pickle) and is refused; save it as safetensors or as a plain state dict: "
            "torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path}: not a PyTorch state dict ({one_line(error)}); save it as safetensors") from error


def head_classes(misfits: Mapping[str, Shapes]) -> tuple[int, int] | None:
    """(classes of the other weights, of the model) when the misfits can only be an output layer's, else None.

    Only first dimensions differ, all by the same pair: a hidden layer's width would show in its readers as well.
    """
    pairs = {(theirs[:1], ours[:1]) for theirs, ours in misfits.values()}
    same_rest = all(theirs[1:] == ours[1:] and theirs and ours for theirs, ours in misfits.values())
    if len(pairs) != 1 or not same_rest:
        return None
    theirs, ours = pairs.pop()
    return theirs[0], ours[0]


def _mismatches(missing: list[str], unexpected: list[str], misfits: dict[str, Shapes]) -> str:
    shaped = [f"{key} {list(theirs)}, the model has {list(ours)}" for key, (theirs, ours) in misfits.items()]
    lines = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped)):
        if names:
            more = f" and {len(names) - _NAMED_IN_MESSAGES} more" if len(names) > _NAMED_IN_MESSAGES else ""
            lines.append(f"  {title}: {'; '.join(names[:_NAMED_IN_MESSAGES])}{more}")
    lines.append("  check model.name and model.arguments against what the checkpoint was trained with")
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An error's text on one line, for use inside a message."""
    return " ".join(str(error).split())[:300] or type(error).__name__
