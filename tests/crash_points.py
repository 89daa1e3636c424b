"""A run killed at chosen writes, and gone on with: `python tests/crash_points.py --points 100`.

A point is the Nth call, within a step, that changes the file system below the run: opening for writing, fsync, rename,
mkdir, unlink, rmdir, and a commit to a search's study. The process is killed there (SIGKILL: no handler, no `finally`),
before the call, after it, or at an fsync with only half of the file's bytes on the disk. Then the same step is done
again by another process. One process imports everything and forks one for each step, so that a point costs no start of
Python. Points are counted, not timed, so a seed names the same ones again.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxscript  # noqa: F401  (what the exporter imports late is imported once, before the forks)
import torch
import torch._dynamo
import torch.onnx
from safetensors import safe_open
from sqlalchemy.engine.default import DefaultDialect

import edgecompress.searching.search_run  # noqa: F401  (Optuna, for the same reason)
from edgecompress import pipeline
from edgecompress.machine import architecture
from edgecompress.run_directory import sha256_of
from edgecompress.searching.order import SearchOrder
from edgecompress.settings.target import load_target
from tiny_run import TARGET

RECIPE = """
data: {name: digits, max_train_samples: 64}
model: {name: resnet8, arguments: {width: 16}}
stages:
  - {id: dense, kind: train, epochs: 1, warmup_epochs: 0}
  - {id: pruned, kind: prune, channel_ratio: 0.5, epochs: 1, epochs_between: 0, warmup_epochs: 0}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}
"""
SEARCHED = """
data: {name: digits, max_train_samples: 64}
model: {name: resnet8, arguments: {width: 16}}
stages:
  - {id: dense, kind: train, epochs: 1, warmup_epochs: 0}
  - {id: pruned, kind: prune, channel_ratio: {search: [0.25, 0.5]}, epochs: 1, epochs_between: 0, warmup_epochs: 0}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}
"""
TRIALS = 2
EXACT = ("*.safetensors", "*.onnx", "*.npy", "*.tar.gz")  # equal to the uninterrupted run's, byte for byte
BEFORE, AFTER, TORN = "before", "after", "half written"


@dataclass(frozen=True)
class Point:
    """Where a step is killed: at its `call`th change of the file system, and how."""

    step: str
    call: int
    what: str
    how: str

    def __str__(self) -> str:
        return f"{self.step}: {self.how} change {self.call} ({self.what})"


@dataclass(frozen=True)
class Step:
    """A command that is killed and repeated, and the step whose files it starts from; "" for none."""

    start: str
    work: Callable[[Path], object]


def steps(folder: Path) -> dict[str, Step]:
    """All steps, in an order in which each comes after the one that it starts from."""
    target, recipe = str(folder / "here.yaml"), str(folder / "tiny.yaml")
    order = SearchOrder(
        source=str(folder / "searched.yaml"),
        overrides=(),
        target=load_target("arm64" if architecture() == "x86_64" else "x86"),  # not this machine: nothing is timed
        max_accuracy_drop=0.9,
        minimize="latency",
        trials=TRIALS,
        seconds=None,
        storage=None,
        cache=None,
        warm_starts=(),
        command="edgecompress search",
    )
    found: dict[str, Step] = {}

    def then(name: str, work: Callable[[Path], object], start: str | None = None) -> None:
        found[name] = Step(list(found)[-1] if start is None else start, work)

    def profile(run: Path) -> object:
        return pipeline.profile(run, target=target, seconds=0.1, thoroughness="quick")

    then("apply", lambda run: pipeline.apply(recipe, target=target, output=run, resume=True), start="")
    then("export", lambda run: pipeline.export(run, target=target, int8=True))
    then("profile", profile)
    then("profile again", profile)
    then("sensitivity", lambda run: pipeline.sensitivity(run, target=target, images=16, timed=False))
    then("debug-int8", lambda run: pipeline.debug_int8(run, target=target, images=16, worst=1))
    then("report", lambda run: pipeline.report(run, target=target))
    then("bundle", lambda run: pipeline.bundle(run, target=target, output=None, preprocessing_inside=True))
    then("export again", lambda run: pipeline.export(run, target=target, int8=True, softmax=True))
    then("bundle again", lambda run: pipeline.bundle(run, target=target, output=None, preprocessing_inside=False))
    then("search", lambda run: pipeline.search(order, output=run, resume=True), start="")
    return found


def forked(work: Callable[[], object], log: Path) -> int:
    """Do `work` in a process of its own; returns its wait status. What it prints is in `log`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            with log.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
                try:
                    work()
                    code = 0
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def watch_changes(below: Path, act: Callable[[str, Callable[[], Any], Path | None], Any]) -> None:
    """Replace, in this process, what changes files below a folder by `act(name, the call, the file of an fsync)`."""

    def inside(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and Path(os.path.abspath(os.fspath(path))).is_relative_to(below)

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **words: Any) -> Any:
            relative_to_folder = words.get("dir_fd") is not None  # how shutil.rmtree removes what is in a folder
            if not relative_to_folder and not any(inside(argument) for argument in arguments[:2]):
                return real(*arguments, **words)
            return act(name, lambda: real(*arguments, **words), None)

        setattr(os, name, call)

    for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
        wrap(name)
    real_fsync, real_open = os.fsync, builtins.open

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        act("fsync", lambda: real_fsync(descriptor), path) if inside(path) else real_fsync(descriptor)

    def opened(file: Any, mode: str = "r", *arguments: Any, **words: Any) -> Any:
        if not inside(file) or not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **words)
        return act("open", lambda: real_open(file, mode, *arguments, **words), None)

    real_commit = DefaultDialect.do_commit

    def commit(self: Any, connection: Any) -> None:
        act("commit", lambda: real_commit(self, connection), None)

    DefaultDialect.do_commit = commit  # type: ignore[method-assign]
    os.fsync = fsync
    builtins.open = io.open = opened  # type: ignore[assignment]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(point: Point, run: Path, work: Callable[[Path], object]) -> None:
    """Do a step until `point`, where this process ends."""
    seen = 0

    def act(name: str, call: Callable[[], Any], synced: Path | None) -> Any:
        nonlocal seen
        seen += 1
        if seen != point.call:
            return call()
        if point.how == TORN and synced is not None:
            os.truncate(synced, synced.stat().st_size // 2)
        try:
            if point.how == AFTER:
                call()
        finally:  # a removal of what is not there raises
            die()

    watch_changes(run, act)
    work(run)


def counted(run: Path, work: Callable[[Path], object], found: Path) -> None:
    """Do a step to its end and write the names of its changes into `found`."""
    names: list[str] = []

    def act(name: str, call: Callable[[], Any], synced: Path | None) -> Any:
        names.append(name)
        return call()

    watch_changes(run, act)
    work(run)
    found.write_text(json.dumps(names))


def faults_of(run: Path) -> Iterator[str]:
    """What a run must never show, however it ended: half of a file under a final name, a hash that does not hold."""
    for path in sorted(run.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        try:
            read_whole(path)
        except Exception as error:  # every format has errors of its own; each is a file that is not whole
            yield f"{path.relative_to(run)}: {type(error).__name__}: {str(error)[:200]}"
    for one, artifacts in artifacts_of(run).items():
        for name, digest in artifacts.items():
            if not (run / one / name).is_file():
                yield f"{one}/run.json names {name}, which is not there"
            elif sha256_of(run / one / name) != digest:
                yield f"{one}/run.json gives another sha256 of {name}"


def artifacts_of(run: Path) -> dict[str, dict[str, str]]:
    """What each run.json below a folder names: that of a run, or those of a search's trials."""
    found = (path for path in sorted(run.rglob("run.json")) if "bundle" not in path.parts)
    return {p.parent.relative_to(run).as_posix(): json.loads(p.read_text()).get("artifacts", {}) for p in found}


def read_whole(path: Path) -> None:
    """Raises what a reader of the format raises where the file is not whole."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            json.loads(line)
    elif path.suffix == ".sqlite3":
        with closing(sqlite3.connect(path)) as database:
            if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise ValueError("SQLite finds it damaged")
    elif path.suffix == ".onnx":
        onnx.checker.check_model(onnx.load(path))
    elif path.suffix == ".npy":
        np.load(path, allow_pickle=False)
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                tensors.get_tensor(name)
    elif path.suffix == ".gz":
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    archive.extractfile(member).read()  # type: ignore[union-attr]


def exact_files(run: Path) -> dict[str, str]:
    """sha256 of the files whose bytes are promised, by name. Bundles hold times only in the run that they name."""
    found = (path for pattern in EXACT for path in run.rglob(pattern))
    whole = (p for p in found if not any(part.startswith(".") for part in p.relative_to(run).parts))
    return {p.relative_to(run).as_posix(): sha256_of(p) for p in sorted(whole)}


def finished_trials(run: Path) -> dict[str, str]:
    """sha256 of run.json of the trials that search.json calls complete: one that ran twice has another."""
    document = json.loads((run / "search.json").read_text()) if (run / "search.json").is_file() else {"trials": []}
    complete = [trial for trial in document["trials"] if trial["status"] == "complete"]
    return {trial["run"]: sha256_of(run / trial["run"] / "run.json") for trial in complete}


def trials_of(run: Path) -> list[Any]:
    """What is promised of a search's trials whenever it was killed: which there are, how they ended, their settings."""
    if not (run / "search.json").is_file():
        return []
    return [[t["id"], t["status"], t["settings"]] for t in json.loads((run / "search.json").read_text())["trials"]]


def try_point(point: Point, folder: Path, work: Callable[[Path], object], start: Path, whole: Path) -> list[str]:
    """Kill one step, look, repeat it, look again; returns what was wrong."""
    run, log = folder / "run", folder / "log.txt"
    shutil.rmtree(run, ignore_errors=True)
    if start.is_dir():
        shutil.copytree(start, run)
    status = forked(lambda: killed_at(point, run, work), log)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return [f"was not killed: {log.read_text()[-500:]}"]
    faults = [f"after the kill: {text}" for text in faults_of(run)]
    finished = finished_trials(run)
    if forked(lambda: work(run), log) != 0:
        return [*faults, f"cannot be repeated: {log.read_text()[-700:]}"]
    faults += [f"after repeating: {text}" for text in faults_of(run)]
    now, then = exact_files(run), exact_files(whole)
    if point.step == "apply":  # later steps start from the uninterrupted run, so their start times are equal
        now, then = ({k: v for k, v in files.items() if not k.endswith(".gz")} for files in (now, then))
    names = sorted({*now, *then})
    faults += [f"not as in the uninterrupted run: {name}" for name in names if now.get(name) != then.get(name)]
    listed, expected = ({(a, b) for a, names in artifacts_of(p).items() for b in names} for p in (run, whole))
    faults += [f"artifacts differ by {'/'.join(name)}" for name in sorted(listed ^ expected)]
    faults += [f"trial {name} was repeated" for name in sorted(finished.items() - finished_trials(run).items())]
    if trials_of(run) != trials_of(whole):
        faults.append(f"trials: {trials_of(run)} where {trials_of(whole)} were expected")
    return faults


def points_of(step: str, changes: list[str]) -> list[Point]:
    found = []
    for call, what in enumerate(changes, start=1):
        found += [Point(step, call, what, how) for how in (BEFORE, AFTER, *([TORN] if what == "fsync" else []))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        document = run_points(Path(scratch).resolve(), arguments.points, arguments.seed)
    print(json.dumps(document, indent=2))
    return 1 if document["faults"] else 0


def run_points(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill at `count` points, as many of each step as of any other, chosen by seed; returns what was done and found."""
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    tempfile.tempdir = str(folder / "temporary")  # what a killed command leaves there goes with the folder
    Path(tempfile.tempdir).mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "searched.yaml").write_text(SEARCHED)
    (folder / "here.yaml").write_text(TARGET.format(architecture=architecture()))
    run, found, log = folder / "run", folder / "changes.json", folder / "log.txt"
    states = {"": folder / "states" / "none"}
    possible: dict[str, list[Point]] = {}
    works = steps(folder)
    for step, how in works.items():
        shutil.rmtree(run, ignore_errors=True)
        if how.start:
            shutil.copytree(states[how.start], run)
        if forked(lambda work=how.work: counted(run, work, found), log) != 0:  # type: ignore[misc]
            raise RuntimeError(f"{step}: fails where nothing is killed:\n{log.read_text()}")
        states[step] = folder / "states" / hashlib.sha256(step.encode()).hexdigest()[:8]
        shutil.copytree(run, states[step])
        possible[step] = points_of(step, json.loads(found.read_text()))
    generator = random.Random(seed)
    shuffled = [generator.sample(points, len(points)) for points in possible.values()]
    chosen = [point for turn in itertools.zip_longest(*shuffled) for point in turn if point is not None][:count]
    faults: dict[str, list[str]] = {}
    for number, point in enumerate(chosen, start=1):
        how = works[point.step]
        wrong = try_point(point, folder, how.work, states[how.start], states[point.step])
        print(f"{number}/{len(chosen)} {point}: {'; '.join(wrong) or 'as it should be'}", file=sys.stderr, flush=True)
        if wrong:
            faults[str(point)] = wrong
    return {
        "possible": {step: len(points) for step, points in possible.items()},
        "killed": Counter(point.step for point in chosen),
        "points": [str(point) for point in chosen],
        "faults": faults,
    }


if __name__ == "__main__":
    sys.exit(main())
