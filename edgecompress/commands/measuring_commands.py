"""The command that measures: profile, for runs, for any ONNX files, here and on devices.

What enters: a run directory or ONNX files, and a target. What leaves: a profile, judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgecompress import console
from edgecompress.commands.checks import require_run_and_target, thoroughness_of
from edgecompress.commands.cli_options import (
    JsonOption,
    NoGateOption,
    QuickOption,
    QuietOption,
    SecondsOption,
    TargetOption,
    ThoroughOption,
)
from edgecompress.commands.cli_output import conclude, finish, reporting_errors
from edgecompress.commands.completion import complete_runs
from edgecompress.errors import EXIT_GATE_MISSED, EXIT_OK, ConfigurationError

if TYPE_CHECKING:
    from edgecompress.pipeline import Outcome
    from edgecompress.run_directory import Json

app = typer.Typer()


@app.command()
def profile(
    target: TargetOption,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN|FILE.onnx",
            help="A run directory (left out, the newest under runs/), or any ONNX files, the first as the reference.",
            autocompletion=complete_runs,
        ),
    ] = None,
    seconds: SecondsOption = None,
    quick: QuickOption = False,
    thorough: ThoroughOption = False,
    host: Annotated[str | None, typer.Option("--host", help="Measure there, over SSH: user@device.")] = None,
    host_python: Annotated[
        str | None, typer.Option("--host-python", help="The device's Python; left out, the target's device.python.")
    ] = None,
    ssh: Annotated[str, typer.Option("--ssh", help="The command that connects, e.g. 'ssh -p 2222'.")] = "ssh",
    results: Annotated[
        Path | None, typer.Option("--results", help="Judge what a bundle's bench.py wrote on a device.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", help="threads, batch, options, joined by commas, or none; left out, a small one."),
    ] = None,
    providers: Annotated[
        str | None, typer.Option("--providers", help="Execution providers to compare: all, or cpu,xnnpack,...")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="INPUT=1x3x224x224", help="Sizes of an input with free axes; for files."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Keep the document there; for files.")] = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a run's exported files, or any ONNX files, and judge them against a target's budgets."""
    if paths and (len(paths) > 1 or not paths[0].is_dir()) and _are_files(paths, host or results, as_json):
        asked: dict[str, Any] = {"sweep": sweep, "providers": providers, "shapes": shape or (), "output": output}
        with reporting_errors(as_json):
            asked |= {"seconds": seconds, "thoroughness": thoroughness_of(quick, thorough)}
        _profile_files(paths, target, asked, as_json, no_gate, quiet)
        return
    run = paths[0] if paths else None

    def work() -> Outcome:
        if shape or output:
            raise ConfigurationError("--shape and --output go with ONNX files; a run knows its own")
        thoroughness = thoroughness_of(quick, thorough)
        require_run_and_target(run, target)
        from edgecompress.deploy.connection import Host
        from edgecompress.settings.target import load_target

        if host is not None and results is not None:
            raise ConfigurationError("--host and --results: give one of them; the first measures, the second has")
        device = Host.of(load_target(target), host, python=host_python, ssh=ssh) if results is None else None
        from edgecompress import pipeline

        how: dict[str, Any] = {"sweep": sweep, "providers": providers, "host": device, "results": results}
        return pipeline.profile(run, target=target, seconds=seconds, thoroughness=thoroughness, **how)

    finish(work, lambda outcome: next(iter(outcome.profiles.values())), as_json, no_gate, quiet, explain=True)


def _are_files(paths: Sequence[Path], elsewhere: object, as_json: bool) -> bool:
    """Whether ONNX files were given rather than a run that is not there; a mixture is refused."""
    folders = [path for path in paths if path.is_dir()]
    with reporting_errors(as_json):
        if elsewhere and not folders:
            raise ConfigurationError("--host and --results go with a run; ONNX files are measured on this machine")
        if folders and len(paths) > 1:
            raise ConfigurationError(
                f"{folders[0]}: is a folder; give one run directory, or ONNX files and nothing else"
            )
    return len(paths) > 1 or paths[0].is_file() or paths[0].suffix in (".onnx", ".ort")


def _profile_files(
    paths: Sequence[Path],
    target: str,
    asked: dict[str, Any],
    as_json: bool,
    no_gate: bool,
    quiet: bool,
) -> NoReturn:
    def work() -> Json:
        from edgecompress import pipeline

        return pipeline.profile_files(paths, target=target, **asked)

    def show(document: Json) -> None:
        _print_files(document)
        if asked["output"] is not None:
            typer.echo(f"profile: {asked['output']}")

    def exit_code(document: Json) -> int:
        return EXIT_GATE_MISSED if document["missed"] and not no_gate else EXIT_OK

    conclude(work, show=show, exit_code=exit_code, as_json=as_json, quiet=quiet)


def _print_files(document: Json) -> None:
    from rich.console import Console

    from edgecompress.reporting.profile_text import budget_lines, explanation_tables, files_table

    stdout = Console(highlight=False, emoji=False)
    for text in document["notes"]:
        console.note(f"note: {text}")
    stdout.print(files_table(document))
    for table in explanation_tables(document):
        stdout.print(table, soft_wrap=True)
    for line in budget_lines(document):
        stdout.print(line, markup=False, soft_wrap=True)
