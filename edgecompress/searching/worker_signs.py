"""How the workers of a search know of each other that they live: locks where they share a folder, beats where not.

What enters: the search's folder of locks, and what an attempt carries in the storage. What leaves: whether the worker
of an attempt is dead. The system releases a lock with the process that holds it, so a free one is proof at once; a beat
that no longer changes is none before this worker has watched it for a while.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any, TextIO

BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0  # a worker elsewhere that has not written for so long is taken for dead
_UNSEEN_SECONDS = 600.0  # one that neither holds a lock nor ever wrote may only just have begun, on a slow machine


class WorkerSigns:
    """What this worker shows of itself, and what it sees of the others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._beats: dict[int, tuple[Any, float, float]] = {}  # the beat, since when, and when it was looked at
        self._own = folder / f"worker-{os.getpid()}-{time.monotonic_ns()}"
        self._alive = self.hold(self._own.name)

    def close(self) -> None:
        """This worker is at work no longer."""
        self._own.unlink(missing_ok=True)
        self._alive.close()

    def hold(self, name: str) -> TextIO:
        """A lock that nobody can find before it is held, and that the system releases with this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        hidden = self.folder / f".{name}-{os.getpid()}"
        stream = hidden.open("w")
        fcntl.flock(stream, fcntl.LOCK_EX)
        hidden.replace(self.folder / name)
        return stream

    def is_dead(self, attempt: int, beat: Any, *, all_are_here: bool) -> bool:
        """Whether the worker of a running attempt is dead; `beat` is its last one, `all_are_here` that every worker
        shares this folder."""
        path = self.folder / str(attempt)
        if path.is_file():
            return _is_free(path)
        # Between two instructions of its worker: before it is locked. That worker may be one of those that live.
        if all_are_here and all(_is_free(other) for other in self.folder.glob("worker-*") if other != self._own):
            return True
        return self._is_silent(attempt, beat)

    def _is_silent(self, attempt: int, beat: Any) -> bool:
        """Whether a worker wrote no beat in a minute in which this one kept looking: whoever was away itself, because
        it trained or the machine stood still, has seen nothing."""
        now = time.monotonic()
        known, since, looked = self._beats.get(attempt, (beat, now, now))
        if known != beat or now - looked > _SILENT_SECONDS / 4:
            since = now
        self._beats[attempt] = (beat, since, now)
        return bool(now - since > (_UNSEEN_SECONDS if beat is None else _SILENT_SECONDS))


def _is_free(path: Path) -> bool:
    """Whether no living process holds a lock."""
    try:
        with path.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
