"""What a training loop needs to go on exactly where it stopped, on disk.

What enters: tensors and counters of a fit. What leaves: the same after a crash. Everything random is drawn from
(seed, epoch, step), so no generator's state is kept. A stage may fit several times (a cut, then finetuning, then the
next cut): each fit is a phase with a file of its own, and a finished phase is read back instead of being repeated, so
that what lies between the phases is computed again from the same weights.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgecompress.errors import RunError
from edgecompress.run_directory import atomic_path

State = dict[str, Any]
_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """The states of one stage's phases, in a folder that goes when the stage is complete."""

    folder: Path

    def phase(self, name: str) -> PhaseState:
        """The state of the phase called `name`, whether or not it began."""
        return PhaseState(self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.pt")

    def clear(self) -> None:
        """Remove every state: the stage's own files hold its result now."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class PhaseState:
    """The saved state of one fit."""

    path: Path

    def save(self, state: State, *, fingerprint: str) -> None:
        """Write the state whole or not at all. `fingerprint` names the settings that it belongs to."""
        with atomic_path(self.path) as temporary:
            torch.save({"version": _VERSION, "fingerprint": fingerprint, "state": state}, temporary)

    def load(self, *, fingerprint: str) -> State | None:
        """The state that was saved, or None where there is none. Raises RunError where it belongs to other settings."""
        if not self.path.is_file():
            return None
        try:
            document = torch.load(self.path, map_location="cpu", weights_only=True)
            version, found, state = document["version"], document["fingerprint"], document["state"]
        except Exception as error:  # a damaged archive fails in torch in many unrelated ways
            raise RunError(
                f"{self.path}: cannot be read ({error}); delete it to begin this part of the stage again"
            ) from error
        if version != _VERSION or found != fingerprint:
            raise RunError(
                f"{self.path}: belongs to other settings, another version or another number of processes, so training "
                "cannot go on from it exactly; delete it to begin this part of the stage again"
            )
        result: State = state
        return result
