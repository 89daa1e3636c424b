from __future__ import annotations

import mmap
import subprocess
import sys
import threading
from typing import NoReturn

import pytest

from edgecompress.errors import MachineError, machine_faults
from edgecompress.threads import start_thread, thread_pool

# Each limit in a process of its own; one that waits for ever is ended by its alarm.
UNDER_LIMITS = """
import os, resource, signal
from collections import Counter
from edgecompress.threads import thread_pool

def work(more):
    signal.alarm(20)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, -1))
    try:
        with thread_pool(3, "test") as pool:
            answers = list(pool.map(abs, range(3)))
    except MemoryError:
        os._exit(1)
    os._exit(0 if answers == [0, 1, 2] else 2)

def outcome(more):
    child = os.fork()
    if child == 0:
        try:
            work(more)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print(sorted(Counter(outcome(more) for more in [*range(0, 64 << 20, 1 << 20), *range(8 << 20, 9 << 20, 1 << 13)])))
"""


# What a library does: it starts a thread of its own where memory has run out.
LIBRARY = """
import mmap, sys, threading
from edgecompress import cli

def full(*_):
    raise OSError(12, "Cannot allocate memory")

def work():
    mmap.mmap = full
    threading.Thread(target=print, args=("ran",)).start()

cli.app = work
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space is Linux's")
def test_threads_begin_or_memory_is_said_to_be_missing_but_nobody_waits_for_ever() -> None:
    done = subprocess.run([sys.executable, "-c", UNDER_LIMITS], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[0, 1]", done.stderr[-2000:]


def test_where_memory_is_missing_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    calls: list[int] = []

    def third_time(*words: int) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(12, "Cannot allocate memory")
        return real(*words)

    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", third_time)
    with pytest.raises(MachineError, match="not enough memory"), machine_faults():
        thread_pool(4, "test")
    for thread in threading.enumerate():
        if thread.name.startswith("test"):
            thread.join(timeout=10)
    assert len(calls) == 3
    assert threading.active_count() == before


def test_a_thread_without_memory_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> NoReturn:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    ran: list[int] = []
    with pytest.raises(MemoryError):
        start_thread(ran.append, 1)
    assert ran == []


def test_on_the_command_line_a_librarys_thread_without_memory_is_not_started_either() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: not enough memory; end other programs")
    assert done.stderr.count("\n") == 1


def test_a_thread_does_its_work() -> None:
    ran: list[int] = []
    start_thread(ran.append, 1).join(timeout=10)
    assert ran == [1]
