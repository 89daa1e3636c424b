"""A cache of stages, by content: what one run computed, another takes over bit for bit.

What enters: a stage's key and its folder in a run. What leaves: the same files in another run, with its decisions and
epochs. An entry is a folder named by the key, written beside its name and renamed, so it is whole or not there; its
files are hashed again before they are used, and one that was damaged is computed anew. Of two processes that want the
same stage at once, the second waits for the first one's result.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgecompress import console
from edgecompress.errors import RunError
from edgecompress.run_directory import Json, RunDirectory, read_json, sha256_of, versioned, write_json
from edgecompress.steps.run_state import record_decision

ENTRY = "entry.json"
_NOT_KEPT = ("result.json", "progress")  # what a run says of itself, and states of fits that are over


class StageCache:
    """Finished stages under `folder`, made when the first one is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise RunError(f"--cache {folder}: is no folder; choose another")

    def entry(self, key: str) -> Path:
        return self.folder / key[:2] / key

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Within the block no other process computes the stage of this key; one that does is waited for."""
        lock = self.folder / "locks" / key
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stream = lock.open("w")
        except OSError as error:
            raise RunError(f"--cache {self.folder}: cannot be written: {error.strerror}; choose another") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.note("another process computes this stage; waiting for its result")
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def restore(self, key: str, run: RunDirectory, stage_id: str) -> Json | None:
        """Put the kept stage into the run, with its decisions and epochs; returns its facts, or None without one."""
        entry = self.entry(key)
        if not (entry / ENTRY).is_file():
            return None
        try:
            document = read_json(entry / ENTRY)
            damaged = [name for name, sha in document["files"].items() if sha256_of(entry / "stage" / name) != sha]
        except (RunError, OSError, KeyError) as error:
            damaged = [str(error)]
        if damaged:
            console.warn(f"{entry}: damaged ({', '.join(damaged)}); the stage is computed again")
            shutil.rmtree(entry, ignore_errors=True)
            return None
        folder = run.stage(stage_id)
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
        for name in document["files"]:
            link_or_copy(entry / "stage" / name, folder / name)
        written = {(line.get("stage"), line.get("phase"), line.get("epoch")) for line in run.read_metrics()}
        for line in document["metrics"]:
            if (line.get("stage"), line.get("phase"), line.get("epoch")) not in written:
                run.append_metrics(line)

        def change(manifest: Json) -> None:
            for decision in document["decisions"]:
                record_decision(manifest, **decision)

        run.update_manifest(change)
        facts: Json = document["facts"]
        return facts | {"cache": {"key": key, "computed_in_seconds": document["seconds"]}}

    def keep(self, key: str, run: RunDirectory, stage_id: str, facts: Json, *, seconds: float) -> None:
        """Keep a finished stage of a run with its decisions, also those that an interrupted attempt made before.

        An entry that is there already stays.
        """
        entry = self.entry(key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        decisions = [row for row in run.read_manifest().get("decisions", []) if row.get("stage") == stage_id]
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=entry.parent))
        try:
            files: dict[str, str] = {}
            source = run.stage(stage_id)
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                name = path.relative_to(source)
                if name.parts[0] in _NOT_KEPT or name.name.startswith("."):
                    continue
                link_or_copy(path, scratch / "stage" / name)
                files[name.as_posix()] = sha256_of(path)
            document: dict[str, Any] = {"key": key, "stage": stage_id, "seconds": seconds, "facts": facts}
            document |= {"decisions": decisions, "files": files}
            document["metrics"] = [line for line in run.read_metrics() if line.get("stage") == stage_id]
            write_json(scratch / ENTRY, versioned(document))
            try:
                scratch.rename(entry)
            except OSError as error:
                if not entry.is_dir():  # else another process was first
                    raise RunError(f"--cache {self.folder}: cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def link_or_copy(source: Path, destination: Path) -> None:
    """One file under two names where the file system can: a run's files are replaced, never changed in place."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
