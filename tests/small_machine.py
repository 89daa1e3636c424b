"""Commands where disk, files or memory run out for real: `unshare -rm python tests/small_machine.py`, or with --short.

In a mount namespace of its own a small file system is filled to a chosen number of bytes, or mounted read-only, and a
process is given few open files or little memory. Each command must end with one message and its exit code, leave what
was finished before, and, given again where there is room, leave the same bytes as one that never met a limit. One
process imports everything and forks one for each command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from crash_points import exact_files, faults_of, forked
from edgecompress import cli, console
from edgecompress.machine import architecture
from edgecompress.threads import check_every_start
from tiny_run import RECIPE, TARGET

DISK_BYTES = 64 << 20
APPLY_SHARES = (0.0, 0.4, 0.95)  # of what a whole run takes: so much is free
EXPORT_SHARES = (0.0, 0.5, 1.2)  # of the largest exported file; an older export is there for all but the last
OPEN_FILES = (0, 1, 2)  # more than are open at the start
MEMORY_MB = (4, 8, 12, 16, 24, 32, 40, 48, 64, 96)  # more than are mapped at the start
COMMAND_SECONDS = 300  # a command that has not ended by then never would


@dataclass
class Cases:
    """What was tried in a folder, and what of it was not as it should be."""

    folder: Path
    tried: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def command(self, *words: str | Path, limit: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Exit code and output of a command in a process of its own, under a limit; code -1 where it did not end."""
        answer, log = self.folder / "answer.json", self.folder / "log.txt"
        answer.unlink(missing_ok=True)

        def work() -> None:
            torch.set_num_threads(1)
            console._settings = console._Settings()
            with answer.open("w") as stream:  # opened before the limit
                signal.alarm(COMMAND_SECONDS)
                check_every_start()  # as the command line does
                limit()
                result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=True)
                resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1:] * 2)
                unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
                error = "".join(traceback.format_exception(result.exception)) if unexpected else None
                json.dump({"code": result.exit_code, "err": result.stderr, "exception": error}, stream)

        status = forked(work, log)
        if status != 0 or not answer.is_file():
            return {"code": -1, "err": log.read_text()[-2000:], "exception": f"wait status {status}"}
        return dict(json.loads(answer.read_text()))

    def refused(self, case: str, answer: dict[str, Any], words: str, *, code: int = 1) -> None:
        """Note what a command said that met a limit, and whether that was one message with its exit code."""
        said = answer["err"].partition("error: ")[2].strip()
        self.tried[case] = said or f"{answer}"[-1500:]
        if answer["code"] != code or answer["exception"] is not None:
            self.faults.append(f"{case}: exit code {answer['code']}, {answer['exception']}: {answer['err'][-1500:]}")
        elif answer["err"].count("error: ") != 1 or "Traceback" in answer["err"] or words not in said:
            self.faults.append(f"{case}: said {answer['err'][-1500:]}")

    def enough_or_refused(self, case: str, answer: dict[str, Any], words: str) -> None:
        """The same where the limit may have left enough."""
        if answer["code"] == 0:
            self.tried[case] = "was enough"
        else:
            self.refused(case, answer, words)

    def works(self, case: str, answer: dict[str, Any]) -> None:
        if answer["code"] != 0:
            self.faults.append(f"{case}: {answer}")

    def whole(self, case: str, run: Path, new: dict[str, str], earlier: dict[str, str] | None = None) -> None:
        """Every file under a final name is whole, as run.json says, the earlier or the new one; none is lost."""
        self.faults += [f"{case}: {fault}" for fault in faults_of(run)]
        hidden = [p.name for p in run.rglob(".*")]
        self.faults += [f"{case}: left {name}" for name in hidden]
        found, before = exact_files(run), earlier or {}
        for name, digest in found.items():
            if digest not in (before.get(name), new.get(name)):
                self.faults.append(f"{case}: {name} is neither the earlier file nor the new one")
        self.faults += [f"{case}: {name} was lost" for name in before if name not in found]


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def fill(disk: Path, *, free_bytes: float) -> Path:
    """Take all of a disk but so many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    system = os.statvfs(disk)
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, system.f_bavail * system.f_frsize - int(free_bytes)))
    return filler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one case of a full and the cases of a read-only disk")
    short = parser.parse_args().short
    with tempfile.TemporaryDirectory() as scratch:
        cases = Cases(Path(scratch).resolve())
        try_all(cases, short=short)
    print(json.dumps({"tried": cases.tried, "faults": cases.faults}, indent=2))
    return 1 if cases.faults else 0


def try_all(cases: Cases, *, short: bool) -> None:
    folder = cases.folder
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    recipe, target, disk = folder / "tiny.yaml", folder / "here.yaml", folder / "disk"
    recipe.write_text(RECIPE)
    target.write_text(TARGET.format(architecture=architecture()))
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk))
    try:
        applied, exported, again = (folder / name for name in ("applied", "exported", "again"))
        export = ("--target", target, "--int8", "--no-gate")
        cases.works("apply", cases.command("apply", recipe, "--target", target, "--output", applied, "--no-gate"))
        shutil.copytree(applied, exported)
        cases.works("export", cases.command("export", exported, *export, "--softmax"))
        shutil.copytree(exported, again)
        cases.works("export again", cases.command("export", again, *export))
        try_full_disk(cases, recipe, target, (applied, exported, again), short=short)
        try_read_only(cases, recipe, target, exported)
        if not short:  # what libraries do where they get nothing depends on the moment
            try_few_files(cases, target, (exported, again), OPEN_FILES)
            try_little_memory(cases, recipe, target, (exported, again), MEMORY_MB)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def try_full_disk(cases: Cases, recipe: Path, target: Path, states: tuple[Path, Path, Path], *, short: bool) -> None:
    applied, exported, again = states
    disk, run = cases.folder / "disk", cases.folder / "disk" / "run"
    apply = ("apply", recipe, "--target", target, "--output", run, "--no-gate")
    needed = sum(path.stat().st_size for path in applied.rglob("*") if path.is_file())
    for share in APPLY_SHARES[1:2] if short else APPLY_SHARES:
        case = f"apply, {share:.0%} of what it needs is free"
        filler = fill(disk, free_bytes=share * needed)
        cases.refused(case, cases.command(*apply), "No space left on device")
        cases.whole(case, run, exact_files(applied))
        filler.unlink()
        cases.works(f"{case}, again with room", cases.command(*apply, "--resume"))
        if exact_files(run) != exact_files(applied):
            cases.faults.append(f"{case}: repeated, not the same bytes")
        shutil.rmtree(run)
    largest = max(path.stat().st_size for path in (exported / "export").iterdir())
    for share in EXPORT_SHARES[1:2] if short else EXPORT_SHARES:
        first = applied if share > 1 else exported
        case = f"{'first export' if share > 1 else 'export over an older one'}, {share:.1f} of its largest file is free"
        shutil.copytree(first, run)
        filler = fill(disk, free_bytes=share * largest)
        answer = cases.command("export", run, "--target", target, "--int8", "--no-gate")
        cases.refused(case, answer, "No space left on device")
        cases.whole(case, run, exact_files(again), exact_files(first))
        filler.unlink()
        cases.works(f"{case}, again", cases.command("export", run, "--target", target, "--int8", "--no-gate"))
        if exact_files(run) != exact_files(again):
            cases.faults.append(f"{case}: repeated, not the same bytes")
        shutil.rmtree(run)


def try_read_only(cases: Cases, recipe: Path, target: Path, exported: Path) -> None:
    disk, run = cases.folder / "disk", cases.folder / "disk" / "run"
    shutil.copytree(exported, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    mount("-o", "remount,ro", str(disk))
    new = ("apply", recipe, "--target", target, "--output", disk / "new", "--no-gate")
    cases.refused("apply into a read-only folder", cases.command(*new), "choose another", code=2)
    for words in (["export", run, "--target", target, "--no-gate"], ["report", run, "--target", target]):
        answer = cases.command(*words)
        cases.refused(f"{words[0]} of a run in a read-only folder", answer, "make it writable")
    cases.works("verify of a run in a read-only folder", cases.command("verify", run))
    mount("-o", "remount,rw", str(disk))
    if {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} != before:
        cases.faults.append("read-only: files changed")
    cases.works("report of a run in a folder that is writable again", cases.command("report", run, "--target", target))
    shutil.rmtree(run)


def try_few_files(cases: Cases, target: Path, states: tuple[Path, Path], limits: Sequence[int]) -> None:
    run, (exported, again) = cases.folder / "few", states

    def limit(more: int) -> None:
        open_now = len(os.listdir("/proc/self/fd")) - 1  # without the listing's own
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    for more in limits:
        shutil.copytree(exported, run)
        words = ("export", run, "--target", target, "--int8", "--no-gate")
        answer = cases.command(*words, limit=lambda more=more: limit(more))  # type: ignore[misc]
        case = f"export with {more} more open files"
        cases.enough_or_refused(case, answer, "Too many open files")
        cases.whole(case, run, exact_files(again), exact_files(exported))
        shutil.rmtree(run)


def try_little_memory(
    cases: Cases, recipe: Path, target: Path, states: tuple[Path, Path], limits: Sequence[int]
) -> None:
    run, (exported, again) = cases.folder / "little", states

    def limit(more: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (more << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

    for more in limits:
        for command in ("apply", "export"):
            words = ["export", run, "--target", target, "--int8", "--no-gate"]
            if command == "apply":
                words = ["apply", recipe, "--target", target, "--output", run, "--no-gate"]
            else:
                shutil.copytree(exported, run)
            answer = cases.command(*words, limit=lambda more=more: limit(more))  # type: ignore[misc]
            case = f"{command} with {more} MB of memory"
            cases.enough_or_refused(case, answer, "not enough memory")
            if run.is_dir():
                cases.whole(case, run, exact_files(again), None if command == "apply" else exact_files(exported))
                shutil.rmtree(run)


if __name__ == "__main__":
    sys.exit(main())
