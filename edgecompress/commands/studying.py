"""The commands that explain: sensitivity, debug-int8, doctor.

What enters: a run directory, or nothing but this machine. What leaves: tables, and what to set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgecompress.commands.checks import require_run_and_target
from edgecompress.commands.cli_options import (
    JsonOption,
    NoGateOption,
    OptionalTarget,
    QuietOption,
    RunArgument,
)
from edgecompress.commands.cli_output import conclude, print_next
from edgecompress.commands.next_steps import after_diagnosis, after_examination, after_sensitivity
from edgecompress.errors import EXIT_GATE_MISSED, EXIT_OK

if TYPE_CHECKING:
    from edgecompress.commands.doctor import Finding
    from edgecompress.pipeline import Outcome
    from edgecompress.run_directory import Json

app = typer.Typer()


@app.command()
def sensitivity(
    run: RunArgument = None,
    what: Annotated[
        Literal["int8", "channels", "both"], typer.Option("--what", help="Rounding, pruning, or both.")
    ] = "both",
    target: OptionalTarget = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Held-out images; left out, 32 for int8 and 256 for channels.")
    ] = None,
    macs_ratio: Annotated[
        float, typer.Option("--macs-ratio", min=0.01, max=0.99, help="Share of the MACs that the proposal removes.")
    ] = 0.5,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time each group cut by half, beside the whole model.")
    ] = True,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what int8 costs in each layer, and what each group of channels is worth; propose ratios to prune by."""

    def work() -> tuple[Outcome, Json]:
        require_run_and_target(run, target)
        from edgecompress import pipeline

        return pipeline.sensitivity(run, what=what, target=target, images=images, macs_ratio=macs_ratio, timed=latency)

    def show(result: tuple[Outcome, Json]) -> None:
        from rich.console import Console

        from edgecompress.reporting.placement_text import sensitivity_table
        from edgecompress.reporting.sensitivity_text import channels_table, proposal_lines

        outcome, document = result
        stdout = Console(highlight=False, emoji=False)
        if what != "channels" and "layers" in document:
            stdout.print(sensitivity_table(document))
        if what != "int8":
            stdout.print(channels_table(document["channels"]))
            for line in proposal_lines(document["channels"]["proposal"]):
                stdout.print(line, markup=False, soft_wrap=True)
        stdout.print(f"run:    {outcome.run.path}", markup=False, soft_wrap=True)
        print_next(after_sensitivity(outcome, document, what))

    conclude(work, document=lambda result: result[1], show=show, as_json=as_json, quiet=quiet)


@app.command("debug-int8")
def debug_int8(
    run: RunArgument = None,
    target: OptionalTarget = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Held-out images to measure on.")] = 32,
    worst: Annotated[int, typer.Option("--worst", min=1, help="Layers to diagnose, those that lose most.")] = 5,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Name the layers that lose most by int8, why, and the setting that mends each."""

    def work() -> tuple[Outcome, Json]:
        require_run_and_target(run, target)
        from edgecompress import pipeline

        return pipeline.debug_int8(run, target=target, images=images, worst=worst)

    def show(result: tuple[Outcome, Json]) -> None:
        from edgecompress.steps.debug_run import debug_text

        outcome, document = result
        for line in debug_text(document):
            typer.echo(line)
        typer.echo(f"run:    {outcome.run.path}")
        print_next(after_diagnosis(outcome, document))

    conclude(work, document=lambda result: result[1], show=show, as_json=as_json, quiet=quiet)


@app.command()
def doctor(as_json: JsonOption = False, no_gate: NoGateOption = False, quiet: QuietOption = False) -> None:
    """Look at this machine and this installation, and say what they mean for int8 and for measuring."""

    def work() -> list[Finding]:
        from edgecompress.commands.doctor import examine

        return examine()

    def document(findings: list[Finding]) -> Json:
        from edgecompress.commands.doctor import doctor_document

        return doctor_document(findings)

    def show(findings: list[Finding]) -> None:
        from rich.console import Console

        from edgecompress.commands.doctor import findings_table

        Console(highlight=False, emoji=False).print(findings_table(findings))
        print_next(after_examination(document(findings)["ok"]))

    def exit_code(findings: list[Finding]) -> int:
        return EXIT_OK if document(findings)["ok"] or no_gate else EXIT_GATE_MISSED

    conclude(work, document=document, show=show, exit_code=exit_code, as_json=as_json, quiet=quiet)
