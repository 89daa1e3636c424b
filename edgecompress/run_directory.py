"""The run directory: every file a run leaves, written whole or not at all.

What enters: results of stages. What leaves: `run.json` and the files it names. A file is written beside
its final name and renamed, so a name that exists is complete; `run.json` records the sha256 of each
artifact.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import tempfile
import threading
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from edgecompress.errors import RunError

RUNS_ROOT = Path("runs")
LOCK_FILE = ".lock"
RIGHT_FILE = "right.npy"  # of a stage: which of the reported images it got right, bool [samples]
SCHEMA_VERSION = 1
# What every command relies on in run.json, each key with its type; lists hold what stands beside them.
_REQUIRED: dict[str, type | tuple[type, type]] = {
    **{"status": str, "recipe": dict},
    **{"stages": (list, dict), "targets": (list, str)},
}
_OPTIONAL: dict[str, type | tuple[type, type]] = {
    **{"recipe_name": str, "started_at": str, "command": str},
    **{"baseline": dict, "data": dict, "model": dict, "exports": dict, "artifacts": dict, "machine": dict},
    **{"gates": (list, dict), "decisions": (list, dict), "notes": (list, str), "overrides": (list, str)},
}
# What a document that was not written by this package makes of code that reads it.
_MISREADINGS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
Json = dict[str, Any]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are the owner's alone until they are complete
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # a write that fails does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


_umask_lock = threading.Lock()


def _umask() -> int:
    """What the user's files may not be to others; it can only be read by setting it."""
    with _umask_lock:
        current = os.umask(0o077)
        os.umask(current)
    return current


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(document: Any) -> str:
    """JSON text with stable layout; not-a-number becomes null, since JSON has no name for it."""
    text = json.dumps(_finite(document), indent=2, ensure_ascii=False, default=str) + "\n"
    # A path that is not UTF-8 reaches Python as lone surrogates; as \udcff they can be written, and read back.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch: a float32 is no float, and would become text
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def versioned(document: Json) -> Json:
    """The document with the version of its schema, first of its keys."""
    return {"schema_version": SCHEMA_VERSION} | document


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, to_json(document))


def read_json(path: Path) -> Json:
    """Read a JSON object. Raises RunError naming the file, also where a later version of this package wrote it.

    One without a version is from before they had one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise RunError(f"{path}: expected a JSON object")
    version = document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise RunError(
            f"{path}: schema_version {version!r}, this edgecompress reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or give the command again that makes the file"
        )
    return document


def read_array(path: Path) -> Any:
    """The numpy array of a .npy file, never of pickled objects. Raises RunError naming the file."""
    import numpy as np  # not at the top: what only looks at files answers at once

    try:
        array = np.load(path, allow_pickle=False)
    except (*_MISREADINGS, OSError, EOFError, SyntaxError, MemoryError, tokenize.TokenError) as error:
        raise RunError(f"{path}: cannot be read: {error}; give the command again that makes it") from error
    if not isinstance(array, np.ndarray):
        raise RunError(f"{path}: cannot be read: is no .npy file; give the command again that makes it")
    return array


class RunDirectory:
    """Paths and manifest of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest_path(self) -> Path:
        return self.path / "run.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def export_for(self, target: str) -> Path:
        """Folder of a target's exported files: `export/`, or `export/<target>/` when another target was first."""
        own = self.export / target
        return own if own.is_dir() else self.export

    def stage(self, stage_id: str) -> Path:
        return self.path / "stages" / stage_id

    def profile_path(self, target: str) -> Path:
        return self.path / "profile" / f"{target}.json"

    def report_path(self, target: str, suffix: str) -> Path:
        return self.path / "report" / f"{target}.{suffix}"

    def exported_files(self, target: str) -> dict[str, str]:
        """sha256 of each ONNX file that is exported for a target, by the file's name."""
        return {path.name: sha256_of(path) for path in sorted(self.export_for(target).glob("*.onnx"))}

    def read_profile(self, target: str) -> Json | None:
        """A target's profile; None where there is none, or where it is of other files than those exported now."""
        path = self.profile_path(target)
        return read_json(path) if path.is_file() and self.stale_profile(target) is None else None

    def stale_profile(self, target: str) -> str | None:
        """What must be said of a profile whose files are not those exported now; None where there is no such."""
        path = self.profile_path(target)
        measured = read_json(path).get("files") if path.is_file() else None
        # A profile of a version that did not name its files is taken at its word.
        if measured is None or measured == self.exported_files(target):
            return None
        return (
            f"The profile for {target} is of other files than those exported now, so no latency is known of these; "
            f"measure them: edgecompress profile {shlex.quote(str(self.path))} --target {target}"
        )

    def read_manifest(self) -> Json:
        """Raises RunError when this is no run directory."""
        try:
            there = self.manifest_path.is_file()
        except OSError as error:  # a folder that may not be entered, a name that is too long
            raise RunError(f"{self.path}: cannot be read: {error.strerror}") from error
        if not there:
            raise RunError(f"{self.path}: not a run directory (it holds no run.json); start one with edgecompress run")
        manifest = read_json(self.manifest_path)
        if "schema_version" not in manifest:
            raise RunError(f"{self.manifest_path}: has no schema_version; it is damaged, start a new run")
        return manifest

    def write_manifest(self, manifest: Json) -> None:
        write_json(self.manifest_path, manifest)

    def update_manifest(self, change: Callable[[Json], None]) -> Json:
        """Read, change and write the manifest; returns what was written."""
        manifest = self.read_manifest()
        change(manifest)
        self.write_manifest(manifest)
        return manifest

    def append_metrics(self, record: Json) -> None:
        """Add one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_finite(record), default=str) + "\n")

    def read_metrics(self) -> list[Json]:
        """Every line of metrics.jsonl. One that a crash cut off at the end of the file is removed from it."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        if rest:
            write_text(path, whole + "\n" if whole else "")
        return [json.loads(line) for line in whole.splitlines()]

    def artifacts(self, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """sha256 of every file of the run but the manifest and the log, by path relative to the run.

        Files in `recorded` keep the hash given there: what somebody changed or removed since can then still be told.
        """
        known = dict(recorded or {})
        skipped = {"run.json", "metrics.jsonl"}
        files = ((p, p.relative_to(self.path)) for p in sorted(self.path.rglob("*")) if p.is_file())
        # What is hidden, or in a folder that is, was in the making when a crash came.
        whole = ((p, name.as_posix()) for p, name in files if not any(part.startswith(".") for part in name.parts))
        return known | {name: sha256_of(p) for p, name in whole if name not in skipped and name not in known}

    @contextmanager
    def replacing(self, place: Path, *, meanwhile: Callable[[Json], None] | None = None) -> Iterator[None]:
        """Within the block the file or folder `place` is replaced: run.json names none of it, so a crash leaves no lie.

        Afterwards it is named with its new hashes, also where the block ends in an error. `meanwhile` changes what else
        run.json says of the place, in the same write that forgets its hashes; the block itself puts that right at its
        end. Hashes of other files stay as they are. Does nothing for a place outside of the run.
        """
        if not place.resolve().is_relative_to(self.path.resolve()):
            yield
            return
        name = place.resolve().relative_to(self.path.resolve()).as_posix()

        def forget(manifest: Json) -> None:
            recorded = manifest.get("artifacts") or {}
            kept = {k: v for k, v in recorded.items() if k != name and not k.startswith(f"{name}/")}
            manifest["artifacts"] = kept
            if meanwhile is not None:
                meanwhile(manifest)

        def record(manifest: Json) -> None:
            manifest["artifacts"] = self.artifacts(manifest.get("artifacts"))

        self.update_manifest(forget)
        try:
            yield
        except BaseException:
            with suppress(OSError, RunError):  # a full disk perhaps: then they stay unnamed, and the error is told
                self.update_manifest(record)
            raise
        self.update_manifest(record)

    def write_document(self, path: Path, document: Json) -> None:
        """Write or replace a JSON file that run.json names with its hash; it carries the version of its schema."""
        with self.replacing(path):
            write_json(path, versioned(document))

    def changed_files(self) -> list[str]:
        """Files that are not, or no longer, as run.json records them."""
        recorded, now = self.read_manifest().get("artifacts") or {}, self.artifacts()
        return [name for name, digest in recorded.items() if now.get(name) != digest]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other command changes the run in `folder`, which is made where it is missing.

    The system lets go of the lock when its process ends, however it ends, so none is ever stale; the file that it
    is held on says whose it is. Raises RunError where another command has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with stream:
                stream.seek(0)
                owner = stream.read().strip() or "it has only just begun"
            raise RunError(
                f"{folder}: another command works on this run ({owner}); wait for its end, then give this one again"
            ) from error
        except BaseException:
            stream.close()
            raise
        if _is_the_file(path, stream.fileno()):
            break
        stream.close()  # its owner ended, and removed it, between our two looks
    with stream:
        try:
            stream.truncate(0)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            stream.write(f"process {os.getpid()} on {platform.node()}, since {now}")
            stream.flush()
            yield
        finally:
            if _is_the_file(path, stream.fileno()):
                path.unlink()


def _is_the_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def new_run_path(recipe_name: str) -> Path:
    """`runs/<recipe>-<UTC time>`, with a counter when two start within a second."""
    base = RUNS_ROOT / f"{recipe_name}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}"
    candidate, count = base, 1
    while candidate.exists():
        count += 1
        candidate = base.with_name(f"{base.name}-{count}")
    return candidate


def newest_run() -> Path:
    """The run under `runs/` that was started last. Raises RunError when there is none."""
    runs = [path.parent for path in RUNS_ROOT.glob("*/run.json")]
    if not runs:
        raise RunError("no run yet under runs/; start one with: edgecompress run prune_kd --target x86")
    return max(runs, key=lambda path: (str(read_json(path / "run.json").get("started_at", "")), path.name))


def open_run(path: Path | None) -> RunDirectory:
    """The run at `path`, or the newest one. Raises RunError, also where run.json is not as this package writes it."""
    run = RunDirectory(path if path is not None else newest_run())
    manifest = run.read_manifest()
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise RunError(f"{run.manifest_path}: has no {', '.join(missing)}; it is damaged, start a new run")
    faults = list(manifest_faults(manifest))
    if faults:
        raise RunError(f"{run.manifest_path}: {faults[0]}; it is damaged, start a new run")
    return run


def manifest_faults(manifest: Json) -> Iterator[str]:
    """What in a manifest no command could work with: another type, a stage without its id, a name that is a path."""
    for key, kind in (_REQUIRED | _OPTIONAL).items():
        outer, inner = kind if isinstance(kind, tuple) else (kind, object)
        value = manifest.get(key)
        if value is None and key in _OPTIONAL:
            continue
        items = value if isinstance(value, list) else ()
        if not isinstance(value, outer) or not all(isinstance(item, inner) for item in items):
            yield f"'{key}' is not what it should be, {_kind_text(outer, inner)}"
            return
    for stage in manifest["stages"]:
        wrong = [key for key in ("id", "kind", "status") if not isinstance(stage.get(key), str)]
        if wrong:
            yield f"a stage has no {wrong[0]}"
            return
    # These become names of files and folders.
    names = [*manifest["targets"], *(stage["id"] for stage in manifest["stages"])]
    names += [manifest["recipe_name"]] if manifest.get("recipe_name") is not None else []
    names += [baseline["id"]] if isinstance(baseline := manifest.get("baseline"), dict) and "id" in baseline else []
    yield from (f"{name!r} is no name of a target, a stage or a recipe" for name in names if not is_plain_name(name))
    for key in ("what", "value", "why"):
        if any(key not in decision for decision in manifest.get("decisions") or []):
            yield f"a decision has no {key}"
    artifacts: Mapping[str, Any] = manifest.get("artifacts") or {}
    yield from (f"artifacts: {name} has no sha256" for name, value in artifacts.items() if not isinstance(value, str))


def _kind_text(outer: type, inner: type) -> str:
    words: dict[type, str] = {str: "text", dict: "an object", list: "a list"}
    return words[outer] + (
        f" whose elements are {'text' if inner is str else 'objects'}" if inner is not object else ""
    )


def is_plain_name(name: object) -> bool:
    """Whether a name can be that of one file: no path, nothing hidden, nothing that leads elsewhere."""
    if not isinstance(name, str) or not name or name.startswith(".") or len(name.encode("utf-8", "replace")) > 200:
        return False
    return "/" not in name and "\\" not in name and name.isprintable() and PurePosixPath(name).name == name


@contextmanager
def reading_documents(*runs: RunDirectory) -> Iterator[None]:
    """Within the block, documents of these runs that are not built as this package writes them are a RunError.

    Whoever reads them takes them as they were written; a file that was changed since is named, by its hash.
    """
    try:
        yield
    except _MISREADINGS as error:
        changed = [str(run.path / name) for run in runs for name in run.changed_files()]
        which = f"changed since they were made: {', '.join(changed[:5])}" if changed else "perhaps run.json itself"
        raise RunError(
            f"{', '.join(str(run.path) for run in runs)}: a file there is not as edgecompress writes it "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); {which}. Restore it, or give the command "
            "again that makes it"
        ) from error
