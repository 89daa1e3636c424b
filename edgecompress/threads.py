"""Threads that begin, or an error at once.

`threading.Thread.start` waits for the new thread to begin, for ever where it had no memory to, an open fault of CPython
(https://github.com/python/cpython/issues/140746). So a thread is started only where memory for its beginning was there
a moment before. What runs on a device (edgecompress/device) has only the standard library, and does without.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_USUAL_STACK_BYTES = 8 << 20
_BEGINNING_BYTES = 16 << 20  # beside the stack: what Python makes for a thread, and the allocator's first pieces


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
    """From now on every `threading.Thread` of this process, a library's too, is checked so before it is started."""
    start = threading.Thread.start
    if start.__module__ == __name__:
        return

    def checked(thread: threading.Thread) -> None:
        _check_memory()
        start(thread)

    setattr(threading.Thread, "start", checked)  # noqa: B010  # mypy refuses to assign to a method


def _check_memory() -> None:
    try:
        mmap.mmap(-1, _stack_bytes() + _BEGINNING_BYTES).close()
    except OSError as error:
        raise MemoryError from error


def _stack_bytes() -> int:
    """Address space of a new thread's stack: Python's own setting, else the limit of the main thread's, as on Linux."""
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0] if resource is not None else -1
    usual = limit if 0 < limit < 1 << 40 else _USUAL_STACK_BYTES
    return threading.stack_size() or usual
