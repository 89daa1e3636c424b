"""Every error the tool raises on purpose, and the exit code each one ends with.

    EdgeCompressError
    ├── InputError                  exit 2: something the user gave cannot be used
    │   ├── ConfigurationError      a recipe, a target or an override, all faults at once
    │   ├── DataError               a data set that is missing, empty or inconsistent
    │   ├── ModelError              an unknown model, or a checkpoint that does not fit it
    │   └── RunError                no run, an unfinished run, or a run that would be overwritten
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
