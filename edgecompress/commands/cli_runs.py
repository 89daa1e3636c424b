"""The commands about runs as a whole: list them, remove them.

What enters: a folder of runs, or run directories. What leaves: one row a run, or fewer folders. Only what holds a
run.json is ever removed, and only after every path that was given has been looked at.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecompress import console
from edgecompress.commands.cli_options import JsonOption, NoGateOption, QuietOption
from edgecompress.commands.cli_output import conclude
from edgecompress.commands.completion import complete_runs
from edgecompress.errors import ConfigurationError, EdgeCompressError, RunError
from edgecompress.run_directory import RUNS_ROOT, Json, RunDirectory, alone_in, open_run, read_json

if TYPE_CHECKING:
    from rich.table import Table

runs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List and remove runs.")


@runs_app.command("list")
def list_command(
    root: Annotated[Path, typer.Option("--root", help="The folder that holds the runs.")] = RUNS_ROOT,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the runs under runs/, the newest first."""

    def work() -> Json:
        return {"root": str(root), "runs": runs_under(root)}

    def show(document: Json) -> None:
        from rich.console import Console

        if not document["runs"]:
            typer.echo(f"no run under {root}; start one with: edgecompress run prune_kd --target x86")
            return
        Console(highlight=False, emoji=False).print(_table(document["runs"]))

    conclude(work, show=show, as_json=as_json, quiet=quiet)


@runs_app.command("rm")
def remove_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run directories to remove.", autocompletion=complete_runs),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove run directories with all that they hold, after asking."""

    def work() -> Json:
        rows = [_removable(path) for path in dict.fromkeys(paths)]
        if not yes:
            _ask(rows)
        for row in rows:
            with alone_in(Path(row["path"])):  # a command that works on it would write into what is going
                shutil.rmtree(row["path"])
        removed = [{"path": row["path"], "size_bytes": row["size_bytes"]} for row in rows]
        return {"removed": removed, "freed_bytes": sum(row["size_bytes"] for row in removed)}

    def show(document: Json) -> None:
        from edgecompress.reporting.value_text import bytes_text

        for row in document["removed"]:
            typer.echo(f"removed: {row['path']} ({bytes_text(row['size_bytes'])})")

    conclude(work, show=show, as_json=as_json, quiet=quiet)


def runs_under(root: Path) -> list[Json]:
    """One row a run, the newest first; a run whose manifest cannot be read is listed as damaged. Raises RunError."""
    if not root.is_dir():
        if root == RUNS_ROOT:  # the default, before the first run
            return []
        raise RunError(f"{root}: there is no such folder; give the folder that holds the runs with --root")
    rows = [_row(manifest.parent) for manifest in root.glob("*/run.json")]
    return sorted(rows, key=lambda row: (row["started_at"] or "", row["path"]), reverse=True)


def _row(path: Path) -> Json:
    row: Json = {"path": str(path), "recipe": None, "status": "damaged", "started_at": None, "targets": []}
    row |= {"stages": [], "accuracy": None, "size_bytes": _size_bytes(path), "verdicts": {}}
    try:
        manifest = open_run(path).read_manifest()
        stages = [{"id": str(stage["id"]), "status": str(stage["status"])} for stage in manifest["stages"]]
        done = [stage for stage in manifest["stages"] if stage["status"] == "complete"]
        row |= {"recipe": manifest["recipe_name"], "started_at": manifest["started_at"], "stages": stages}
        row |= {"targets": manifest["targets"], "accuracy": done[-1].get("accuracy") if done else None}
        profiles = {file.stem: read_json(file) for file in sorted((path / "profile").glob("*.json"))}
        row["verdicts"] = {name: str(profile["verdict"]) for name, profile in profiles.items() if "verdict" in profile}
        row["status"] = manifest["status"]
    except (EdgeCompressError, KeyError, TypeError, ValueError):
        pass  # said by its status
    return row


def _size_bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _removable(path: Path) -> Json:
    """The row of a run that may be removed. Raises RunError for anything else."""
    if path.is_symlink():
        raise RunError(f"{path}: is a link; give the run directory itself")
    RunDirectory(path).read_manifest()
    if Path.cwd().is_relative_to(path.resolve()):
        raise RunError(f"{path}: is the folder you are in, or holds it; leave it first")
    return _row(path)


def _ask(rows: Sequence[Json]) -> None:
    """Ask on the terminal. Raises ConfigurationError where there is none, or the answer is no."""
    from edgecompress.reporting.value_text import bytes_text

    if not sys.stdin.isatty():
        raise ConfigurationError("runs rm asks before it removes, and there is no terminal; give --yes")
    for row in rows:
        going = "; it is still running, or was stopped hard" if row["status"] == "running" else ""
        console.stderr().print(f"{row['path']}: {bytes_text(row['size_bytes'])}{going}", markup=False, soft_wrap=True)
    if not typer.confirm(f"Remove {len(rows)} run{'s' if len(rows) > 1 else ''}?", err=True):
        raise ConfigurationError("nothing was removed")


def _table(rows: Sequence[Json]) -> Table:
    from rich import box
    from rich.table import Table

    from edgecompress.reporting.value_text import bytes_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", ratio=1)
    for name in ("status", "stages", "accuracy", "size"):
        table.add_column(name, justify="right" if name in ("accuracy", "size") else "left", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in rows:
        done = sum(stage["status"] == "complete" for stage in row["stages"])
        table.add_row(
            row["path"],
            row["status"],
            f"{done} of {len(row['stages'])}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
            bytes_text(row["size_bytes"]),
            "\n".join(f"{name}: {verdict}" for name, verdict in row["verdicts"].items()),
        )
    return table
