"""A run's directory: begun or gone on with by one command at a time, and its end recorded whatever happens.

What enters: a validated recipe and where its run is to be. What leaves: the run directory with a manifest of this
command, locked within the block, and at its end the status that holds. Nothing is overwritten unasked.
"""

from __future__ import annotations

import contextlib
import errno
import reprlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgecompress import __version__, console
from edgecompress.errors import ConfigurationError, InputError, ModelError, RunError
from edgecompress.run_directory import LOCK_FILE, RUNS_ROOT, Json, RunDirectory, alone_in, new_run_path, open_run
from edgecompress.settings.recipe import Recipe
from edgecompress.steps.apply_run import start_manifest
from edgecompress.steps.run_state import recipe_document, recipe_of

_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST)


@dataclass(frozen=True)
class StartedRun:
    """The directory of this command, and what of it this command made."""

    directory: RunDirectory
    made_run: bool = False
    made_folder: bool = False

    def discard(self) -> None:
        """Remove the run that this command made, so that the command can be mended and given again."""
        for path in self.directory.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if self.made_folder:
            self.directory.path.rmdir()
            with contextlib.suppress(OSError):  # other runs are in it
                RUNS_ROOT.rmdir()


@contextmanager
def start_run(
    recipe: Recipe,
    source: str,
    overrides: Sequence[str],
    targets: list[str],
    output: Path | None,
    resume: bool,
    command: str,
) -> Iterator[StartedRun]:
    """A new run directory, or with `resume` the one that is there, and no other command in it within the block.

    Nothing is overwritten unasked.
    """
    directory, _, has_folder = place_run(recipe, output, resume)
    with contextlib.ExitStack() as stack:
        try:
            while output is None:  # two commands of the same second would have the same name
                try:
                    directory.path.mkdir(parents=True)
                    break
                except FileExistsError:
                    directory = RunDirectory(new_run_path(recipe.name))
            stack.enter_context(alone_in(directory.path))
            _, has_run, _ = place_run(recipe, directory.path, resume)  # again: now nobody else makes one
            if has_run:
                _go_on(directory, targets)
            else:
                how: Json = {"overrides": list(overrides), "targets": targets, "command": command}
                directory.write_manifest(start_manifest(recipe, source=source, **how))
        except OSError as error:
            if error.errno not in _NO_PLACE:
                raise
            raise RunError(f"{directory.path}: cannot be written: {error.strerror}; choose another --output") from error
        yield StartedRun(directory, made_run=not has_run, made_folder=not has_run and not has_folder)


def _go_on(directory: RunDirectory, targets: list[str]) -> None:
    """Bring a manifest up to this command: further targets, and fields of the recipe that its version did not know."""
    manifest = directory.read_manifest()
    missing = [name for name in targets if name not in manifest["targets"]]
    if missing:
        directory.update_manifest(lambda m: m.update(targets=[*m["targets"], *missing], status="running"))
    whole = recipe_document(recipe_of(manifest))
    added = _differences(manifest["recipe"], whole, before="not known", now="taken")
    if added:
        console.note(
            f"{directory.path}: from edgecompress {manifest.get('edgecompress_version')}, which knew fewer fields"
        )
        for text in added:
            console.note(f"  {text}")
        directory.update_manifest(lambda m: m.update(recipe=whole))


def place_run(recipe: Recipe, output: Path | None, resume: bool) -> tuple[RunDirectory, bool, bool]:
    """Where a run goes, and whether a run and a folder are there already. Raises RunError where it may not go there."""
    if resume and output is None:
        raise RunError("--resume needs --output DIR, the run to go on with")
    directory = RunDirectory(output if output is not None else new_run_path(recipe.name))
    try:
        has_run, has_folder = directory.manifest_path.exists(), directory.path.exists()
        is_foreign = has_folder and not has_run and (not directory.path.is_dir() or _holds_files(directory.path))
    except OSError as error:
        raise RunError(f"{directory.path}: cannot be read: {error.strerror}; choose another --output") from error
    if is_foreign:
        raise RunError(f"{directory.path}: exists and is no run directory; choose another --output")
    if has_run:
        if not resume:
            raise RunError(f"{directory.path}: a run is already there; go on with --resume, or choose another --output")
        manifest = open_run(directory.path).read_manifest()
        try:
            there = recipe_document(recipe_of(manifest))  # with the defaults of fields that its version did not know
        except ConfigurationError as error:
            raise RunError(
                f"{directory.path}: this edgecompress, {__version__}, cannot go on with a recipe that "
                f"{manifest.get('edgecompress_version')} wrote; use that version, or choose another --output. {error}"
            ) from error
        if there != recipe_document(recipe):
            changed = _differences(there, recipe_document(recipe))
            raise RunError(
                f"{directory.path}: was made with another recipe ({', '.join(changed[:5])}); "
                "repeat the same command, or choose another --output"
            )
    return directory, has_run, has_folder


def _holds_files(folder: Path) -> bool:
    """Whether a folder holds more than a command that was stopped hard leaves: its lock, a run.json in the making."""
    return any(path.name != LOCK_FILE and not path.name.startswith(".run.json.") for path in folder.iterdir())


def _differences(old: object, new: object, place: str = "", *, before: str = "there", now: str = "now") -> list[str]:
    """Dotted places at which two documents differ."""
    words = {"before": before, "now": now}
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [(f"{place}.{key}".lstrip("."), old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
        return [text for where, a, b in inner for text in _differences(a, b, where, **words)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [text for i, (a, b) in pairs for text in _differences(a, b, f"{place}.{i}", **words)]
    was = before if old is None and before != "there" else f"{reprlib.repr(old)} there"
    return [] if old == new else [f"{place}: {was}, {reprlib.repr(new)} {now}"]


@contextmanager
def recorded(started: StartedRun) -> Iterator[None]:
    """Write the run's status whatever happens, and say how to go on when it failed.

    Where the input was at fault and the new run holds nothing to go on with, it is removed again, so that the mended
    command can be given in its place.
    """
    run = started.directory
    try:
        yield
    except BaseException as error:
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        try:
            if started.made_run and isinstance(error, InputError) and _is_void(run, error):
                started.discard()
                raise
            run.update_manifest(lambda m: m.update(status="failed", error=message, finished_at=_now()))
        except (OSError, RunError) as second:
            if second is error:
                raise
            console.warn(f"{run.manifest_path}: that the run failed could not be written either: {second}")
        when = "" if isinstance(error, KeyboardInterrupt) else "once that is mended, "
        console.note(f"what was done is kept; {when}go on with the same command and: --output {run.path} --resume")
        raise
    run.update_manifest(lambda m: m.update(status="complete", error=None, finished_at=_now()))


def _is_void(run: RunDirectory, error: InputError) -> bool:
    """Whether a run that ends with `error` holds nothing of use.

    No stage is complete, and either nothing was evaluated or trained yet, or the recipe is at fault: mended, it is
    another recipe, which could not go on from what is here.
    """
    manifest = run.read_manifest()
    if any(stage.get("status") == "complete" for stage in manifest["stages"]):
        return False
    is_the_recipes = isinstance(error, ConfigurationError | ModelError)
    return is_the_recipes or not ("baseline" in manifest or run.read_metrics())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
