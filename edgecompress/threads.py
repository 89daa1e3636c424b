"""Threads that begin, or an error at once.

`threading.Thread.start` waits for the new thread to begin, for ever where it had no memory to, an open fault of CPython
(https://github.com/python/cpython/issues/140746). So the tool starts its threads here, and only where memory for their
beginning was there a moment before; the command line holds those that libraries start to the same.
"""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Address space that a thread takes before it has done anything: its stack, 8 MB on Linux, and what Python makes for it.
_BEGINNING_BYTES = 24 << 20


def start_thread(work: Callable[..., object], *arguments: object) -> threading.Thread:
    """Run `work` beside everything else; the process does not wait for it at its end. Raises MemoryError."""
    _check_memory()
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def thread_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads have all begun, so that none begins while others take the memory. Raises MemoryError."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    all_begun = threading.Event()
    try:
        for _ in range(workers):  # a pool starts a thread for each task that finds none waiting
            _check_memory()
            pool.submit(all_begun.wait)
    except BaseException:
        pool.shutdown(wait=False)
        raise
    finally:
        all_begun.set()
    return pool


def check_every_start() -> None:
    """From now on every thread of this process, whoever starts it, begins or raises MemoryError."""
    start = threading.Thread.start

    @functools.wraps(start)
    def checked(thread: threading.Thread) -> None:
        _check_memory()
        start(thread)

    setattr(threading.Thread, "start", checked)  # noqa: B010  # mypy refuses to assign to a method


def _check_memory() -> None:
    try:
        mmap.mmap(-1, _BEGINNING_BYTES).close()
    except OSError as error:
        raise MemoryError from error
