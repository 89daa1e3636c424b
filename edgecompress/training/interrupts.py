"""Ctrl-C at a place where nothing is lost: the step in hand is finished first.

What enters: SIGINT. What leaves: a flag that a loop asks for between two steps. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from edgecompress import console


@dataclass
class Interrupt:
    """`requested` turns true at the first Ctrl-C."""

    requested: bool = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C only sets the flag; the second raises KeyboardInterrupt as usual."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        console.warn("interrupted: finishing the step and saving; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
