"""Rounds of export and profile in one process, by the Python API: `python tests/soak.py --rounds 200`.

Prints memory, open files, threads and child processes after every round. Ends with 1 where memory grows by more than
5 % after the tenth round, or a file, a thread or a process is left. Every tenth round measures as `profile --quick`
does; the others start fewer measuring processes, since what those hold ends with them: it is this process that must not
grow.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

import edgecompress
from edgecompress.machine import architecture
from edgecompress.measure import explanation, measuring
from tiny_run import RECIPE, TARGET

SETTLED = 10  # rounds after which nothing may grow
MOST_GROWTH = 0.05


def state() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    process = psutil.Process()
    return {
        "rss_bytes": process.memory_info().rss,
        "files": len(os.listdir("/proc/self/fd")) - 1,
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "temporary": len(os.listdir(tempfile.gettempdir())),
    }


@contextmanager
def few_processes() -> Iterator[None]:
    """One process to load each file, one for all latencies, none for the machine's peaks."""
    least = measuring.Thoroughness(seconds=0.1, narrow_enough=10.0, processes=1)
    with (
        mock.patch.dict(measuring.THOROUGHNESS, {"quick": least}),
        mock.patch.dict(measuring.measure_fresh.__kwdefaults__, {"processes": 1}),
        mock.patch.object(explanation, "_roofline", return_value=None),
    ):
        yield


def rounds(count: int, folder: Path) -> list[dict[str, int]]:
    """What the process held after each round."""
    (folder / "tiny.yaml").write_text(RECIPE)
    target = folder / "here.yaml"
    target.write_text(TARGET.format(architecture=architecture()))
    run = edgecompress.apply(folder / "tiny.yaml", target=target, output=folder / "run").path
    found = []
    for number in range(1, count + 1):
        started = time.perf_counter()
        edgecompress.export(run, target=target, int8=True)
        if number % 10 == 0:
            edgecompress.profile(run, target=target, seconds=0.1, thoroughness="quick")
        else:
            with few_processes():
                edgecompress.profile(run, target=target, seconds=0.1, thoroughness="quick", sweep="none")
        found.append(state())
        words = ", ".join(f"{key} {value}" for key, value in found[-1].items())
        print(f"{number}/{count}: {words} ({time.perf_counter() - started:.1f} s)", file=sys.stderr, flush=True)
    return found


def faults_of(found: list[dict[str, int]]) -> list[str]:
    """What grew after the tenth round, or after the first third of fewer rounds."""
    first = found[min(SETTLED, max(1, len(found) // 3)) - 1]
    last = found[-1]
    growth = last["rss_bytes"] / first["rss_bytes"] - 1
    faults = [f"memory grew by {growth:.1%}"] if growth > MOST_GROWTH else []
    names = ("files", "threads", "children", "temporary")
    return faults + [f"{name}: {first[name]}, at the end {last[name]}" for name in names if last[name] > first[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = str(Path(scratch) / "temporary")
        Path(tempfile.tempdir).mkdir()
        found = rounds(arguments.rounds, Path(scratch))
    faults = faults_of(found)
    settled: Any = found[SETTLED - 1] if len(found) > SETTLED else None
    print(json.dumps({"rounds": len(found), "after_10": settled, "last": found[-1], "faults": faults}, indent=2))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
