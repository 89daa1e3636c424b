"""Every error the tool raises on purpose, and the exit code each one ends with.

    EdgeCompressError
    ├── InputError                  exit 2: something the user gave cannot be used
    │   ├── ConfigurationError      a recipe, a target or an override, all faults at once
    │   ├── DataError               a data set that is missing, empty or inconsistent
    │   ├── ModelError              an unknown model, or a checkpoint that does not fit it
    │   └── RunError                no run, an unfinished run, or a run that would be overwritten
    ├── MachineError                exit 1: disk, memory or open files that the machine did not give
    └── StageError                  exit 1: a stage began and could not finish
        ├── TrainingError           a loss that is not finite, nothing to train
        ├── EvaluationError         logits that are not finite
        ├── PruningError            a prune stage that removed nothing, or too much
        ├── QuantizationError       a model that cannot be quantized or captured
        ├── ExportError             an ONNX file that the checker or the runtime refuses
        ├── ParityError             outputs that cannot be compared
        └── ProfileError            a measurement that could not be made

A missed gate is not an error: the work is done, and the command ends with `EXIT_GATE_MISSED`.
Each message says where the fault is, what it is, and how to mend it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_OK = 0
EXIT_STAGE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_GATE_MISSED = 3


class EdgeCompressError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code: int = EXIT_STAGE_FAILED


class InputError(EdgeCompressError):
    """Something the user gave cannot be used; nothing was started."""

    exit_code = EXIT_BAD_INPUT


class ConfigurationError(InputError):
    """A recipe, a target or an override with faults; the message lists every one of them."""


class DataError(InputError):
    """A data set that is missing, empty or inconsistent with its class index."""


class ModelError(InputError):
    """An unknown model, or a checkpoint that does not fit the model."""


class RunError(InputError):
    """A run directory that is missing, unfinished or would be overwritten."""


class StageError(EdgeCompressError):
    """A stage began and could not finish; what earlier stages made is kept."""


class TrainingError(StageError):
    """Training could not go on (for instance a loss that is not finite)."""


class EvaluationError(StageError):
    """A model whose logits are not finite, so that nothing can be said of its accuracy."""


class PruningError(StageError):
    """A prune stage that removed nothing, or would have removed everything."""


class QuantizationError(StageError):
    """A model that cannot be captured, calibrated or converted to int8."""


class ExportError(StageError):
    """An ONNX file that the checker or the runtime refuses."""


class ParityError(StageError):
    """Outputs that cannot be compared."""


class ProfileError(StageError):
    """A measurement that could not be made."""


class MachineError(EdgeCompressError):
    """The machine did not give what the work needs: disk, memory, open files. What was finished before is kept."""


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, then give the same command again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit (ulimit -n), or end other programs"),
    errno.ENOMEM: "end other programs, raise the limit, or use a smaller batch or model",
    errno.EIO: "the disk may be failing: look at the system's log, then give the same command again",
}
# What libraries that are not written in Python say of the same faults, in errors of their own.
_FOREIGN_WORDS = {
    **dict.fromkeys(("No space left on device", "os error 28"), errno.ENOSPC),
    "PytorchStreamWriter failed writing": errno.EIO,
    **dict.fromkeys(("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory"), errno.ENOMEM),
    **dict.fromkeys(("could not create a primitive", "could not create a memory"), errno.ENOMEM),  # oneDNN
    **dict.fromkeys(("Failed to allocate memory", "can't start new thread"), errno.ENOMEM),
    "error return without exception set": errno.ENOMEM,  # the interpreter, of a library that could not allocate
    **dict.fromkeys(("Too many open files", "os error 24"), errno.EMFILE),
}
# Whatever a step was at, these are no fault of its input: they are said even where it made an error of its own of them.
_ALWAYS_SAID = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


@contextmanager
def machine_faults() -> Iterator[None]:
    """Within the block, what the machine refuses is a MachineError that says what, where, and what to do."""
    try:
        yield
    except Exception as error:  # each library has exceptions of its own, with no base but this
        found = machine_fault(error)
        if found is None:
            raise
        raise found from error


def machine_fault(error: BaseException) -> MachineError | None:
    """What the machine refused where that is what an error, or one that it was made of, is about; else None."""
    if isinstance(error, MachineError):
        return error
    for depth, one in enumerate(_with_causes(error)):
        found = None if isinstance(one, EdgeCompressError) else _fault_in(one)
        if found is not None and (depth == 0 or found[0] in _ALWAYS_SAID):
            return MachineError(found[1])
    return None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _fault_in(error: BaseException) -> tuple[int, str] | None:
    """Its number and the sentence about it; None where an error is not about the machine."""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0, "mend that, then give the same command again")
        return error.errno or 0, f"{place}{error.strerror or error}; {remedy}"
    if isinstance(error, MemoryError):
        return errno.ENOMEM, f"not enough memory; {_REMEDIES[errno.ENOMEM]}"
    for line in str(error).splitlines():
        for words, number in _FOREIGN_WORDS.items():
            if words in line:
                what = "not enough memory: " if number == errno.ENOMEM else ""
                return number, f"{what}{line.strip()[:300]}; {_REMEDIES[number]}"
    return None
