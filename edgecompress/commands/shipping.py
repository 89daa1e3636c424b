"""The commands around what ships: report, compare, bundle, verify.

What enters: a run directory with its export done. What leaves: pages, a bundle, or the proof that one is whole.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgecompress.commands.checks import page_formats, require_run_and_target
from edgecompress.commands.cli_options import (
    FormatOption,
    JsonOption,
    NoGateOption,
    OptionalTarget,
    QuietOption,
    RunArgument,
    RunsArgument,
    TargetOption,
)
from edgecompress.commands.cli_output import conclude, finish, print_next
from edgecompress.commands.next_steps import after_bundle, after_comparison, after_verification
from edgecompress.errors import EXIT_GATE_MISSED, EXIT_OK, EXIT_STAGE_FAILED

if TYPE_CHECKING:
    from edgecompress.deploy.bundle import Bundle
    from edgecompress.deploy.verify import Verification
    from edgecompress.pipeline import Outcome
    from edgecompress.reporting.report_page import ReportPaths
    from edgecompress.run_directory import Json

app = typer.Typer()


@app.command()
def report(
    run: RunArgument = None,
    target: OptionalTarget = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    formats: FormatOption = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the deployment report per target: an HTML page, and the same as Markdown and JSON."""

    def work() -> Outcome:
        require_run_and_target(run, target)
        wanted = page_formats(formats, opened=open_page)
        from edgecompress import pipeline

        outcome = pipeline.report(run, target=target, formats=wanted)
        for paths in outcome.reports.values():
            if open_page and paths.html is not None:
                webbrowser.open(paths.html.resolve().as_uri())
        return outcome

    def document(outcome: Outcome) -> Any:
        return {name: paths.to_dict() for name, paths in outcome.reports.items()}

    finish(work, document, as_json, no_gate, quiet)


@app.command()
def compare(
    runs: RunsArgument,
    target: OptionalTarget = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="The folder to write; left out, a new one under runs/.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    formats: FormatOption = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare runs, or one run on several targets: differences with intervals, and which is better for what.

    Ends with 3 where none of them may ship.
    """

    def work() -> tuple[Json, ReportPaths]:
        for run in runs:
            require_run_and_target(run, target)
        wanted = page_formats(formats, opened=open_page)
        from edgecompress import pipeline

        document, paths = pipeline.compare(runs, target=target, output=output, formats=wanted)
        if open_page and paths.html is not None:
            webbrowser.open(paths.html.resolve().as_uri())
        return document, paths

    def document(result: tuple[Json, ReportPaths]) -> Json:
        return {**result[0], "pages": result[1].to_dict()}

    def show(result: tuple[Json, ReportPaths]) -> None:
        from rich.console import Console

        from edgecompress.reporting.profile_text import comparison_table

        facts, paths = result
        stdout = Console(highlight=False, emoji=False)
        stdout.print(facts["sentence"], markup=False, soft_wrap=True)
        for note in facts["notes"]:
            stdout.print(f"note: {note}", markup=False, soft_wrap=True)
        stdout.print(comparison_table(facts))
        stdout.print(f"comparison: {next(iter(paths.to_dict().values()))}", markup=False, soft_wrap=True)
        print_next(after_comparison(facts))

    def exit_code(result: tuple[Json, ReportPaths]) -> int:
        held = all(candidate["verdict"] == "hold" for candidate in result[0]["candidates"])
        return EXIT_GATE_MISSED if held and not no_gate else EXIT_OK

    conclude(work, document=document, show=show, exit_code=exit_code, as_json=as_json, quiet=quiet)


@app.command()
def bundle(
    target: TargetOption,
    run: RunArgument = None,
    output: Annotated[Path | None, typer.Option("--output", help="Where to write; left out, RUN/bundle.")] = None,
    preprocessing: Annotated[
        bool, typer.Option("--preprocessing/--no-preprocessing", help="Resize and normalize inside the models.")
    ] = True,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one folder and one archive that a device runs with numpy and ONNX Runtime alone."""

    def work() -> tuple[Outcome, Bundle]:
        require_run_and_target(run, target)
        from edgecompress import pipeline

        return pipeline.bundle(run, target=target, output=output, preprocessing_inside=preprocessing)

    def document(result: tuple[Outcome, Bundle]) -> Json:
        made = result[1]
        places = {"folder": str(made.folder), "archive": str(made.archive), "caution": made.caution}
        return {**made.manifest, **places}

    def show(result: tuple[Outcome, Bundle]) -> None:
        from edgecompress.device.infer import self_test_lines

        made = result[1]
        lines = [*filter(None, [made.caution]), *(f"self-test {line}" for line in self_test_lines(made.self_test))]
        for line in [*lines, f"bundle:  {made.folder}", f"archive: {made.archive}"]:
            typer.echo(line)
        print_next(after_bundle(made.archive))

    def exit_code(result: tuple[Outcome, Bundle]) -> int:
        return EXIT_GATE_MISSED if result[0].missed and not no_gate else EXIT_OK

    conclude(work, document=document, show=show, exit_code=exit_code, as_json=as_json, quiet=quiet)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle, its archive, or a run directory.")],
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check every file against the manifest, then a bundle's answers; end with 1 where anything differs."""

    def work() -> Verification:
        from edgecompress.deploy.verify import verify as check

        return check(path)

    def show(found: Verification) -> None:
        for line in found.lines():
            typer.echo(line)
        print_next(after_verification(found))

    def exit_code(found: Verification) -> int:
        return EXIT_OK if found.ok else EXIT_STAGE_FAILED

    conclude(work, document=lambda found: found.to_dict(), show=show, exit_code=exit_code, as_json=as_json, quiet=quiet)
