"""The commands that make models: apply, export, and run, which does all of the line.

What enters: a recipe or a run directory. What leaves: run directories, exported files, reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgecompress.commands.checks import require_recipe_and_targets, require_run_and_target, thoroughness_of
from edgecompress.commands.cli_options import (
    CacheOption,
    DryRunOption,
    JsonOption,
    NoGateOption,
    OptionalTarget,
    OutputOption,
    QuickOption,
    QuietOption,
    RecipeArgument,
    ResumeOption,
    RunArgument,
    SecondsOption,
    SetOption,
    ThoroughOption,
    TrackOption,
)
from edgecompress.commands.cli_output import command_line, conclude, finish, planned_command, print_plan
from edgecompress.commands.completion import complete_targets

if TYPE_CHECKING:
    from edgecompress.pipeline import Outcome
    from edgecompress.run_directory import Json

app = typer.Typer()

PreprocessingOption = Annotated[
    bool, typer.Option("--with-preprocessing", help="Files take uint8 [N, H, W, C] images of any size.")
]


@app.command()
def apply(
    recipe: RecipeArgument,
    target: OptionalTarget = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    cache: CacheOption = None,
    track: TrackOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Apply a recipe's stages in PyTorch: train, distill, prune, factorize, quantize, qat."""
    if dry_run:
        targets = [target] if target is not None else []
        _plan(recipe, targets, overrides, output, resume, lambda: None, as_json, quiet)

    def work() -> Outcome:
        require_recipe_and_targets(recipe, overrides or (), [target] if target is not None else [])
        from edgecompress import pipeline

        return pipeline.apply(
            recipe,
            target=target,
            overrides=overrides or (),
            output=output,
            resume=resume,
            cache=cache,
            track=track or (),
            command=command_line(),
        )

    finish(work, lambda outcome: outcome.manifest, as_json, no_gate, quiet)


@app.command()
def export(
    run: RunArgument = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Write the int8 file too, and check its parity; without it an earlier one goes."),
    ] = False,
    with_preprocessing: PreprocessingOption = False,
    ort: Annotated[
        bool, typer.Option("--ort", help="Write ORT format too, for mobile and minimal builds of ONNX Runtime.")
    ] = False,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="Add the output `probabilities`, behind the logits.")
    ] = False,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Add the K likeliest classes: `top_k_indices`, `top_k_probabilities`."),
    ] = None,
    target: OptionalTarget = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write ONNX files and check parity: PyTorch, ONNX and int8 ONNX on real images."""

    def work() -> Outcome:
        require_run_and_target(run, target)
        from edgecompress import pipeline

        return pipeline.export(
            run,
            target=target,
            int8=int8,
            with_preprocessing=with_preprocessing,
            ort=ort,
            softmax=softmax,
            top_k=top_k,
            overrides=overrides or (),
        )

    finish(work, lambda outcome: outcome.manifest, as_json, no_gate, quiet)


@app.command("run")
def run_command(
    recipe: RecipeArgument,
    targets: Annotated[
        list[str],
        typer.Option(
            "--target", help="A target file or shipped name; may be repeated.", autocompletion=complete_targets
        ),
    ],
    overrides: SetOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    cache: CacheOption = None,
    track: TrackOption = None,
    dry_run: DryRunOption = False,
    with_preprocessing: PreprocessingOption = False,
    seconds: SecondsOption = None,
    quick: QuickOption = False,
    thorough: ThoroughOption = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Apply, export with int8, profile and report, in one go."""
    if dry_run:

        def measured() -> float:
            from edgecompress.measure.measuring import THOROUGHNESS

            return THOROUGHNESS[thoroughness_of(quick, thorough)].seconds if seconds is None else seconds

        _plan(recipe, targets, overrides, output, resume, measured, as_json, quiet)

    def work() -> Outcome:
        thoroughness = thoroughness_of(quick, thorough)
        require_recipe_and_targets(recipe, overrides or (), targets)
        from edgecompress import pipeline

        return pipeline.run(
            recipe,
            targets=targets,
            overrides=overrides or (),
            output=output,
            resume=resume,
            with_preprocessing=with_preprocessing,
            seconds=seconds,
            thoroughness=thoroughness,
            cache=cache,
            track=track or (),
            command=command_line(),
        )

    finish(work, lambda outcome: outcome.manifest, as_json, no_gate, quiet)


def _plan(
    recipe: str,
    targets: Sequence[str],
    overrides: Sequence[str] | None,
    output: Path | None,
    resume: bool,
    profiled_for: Callable[[], float | None],
    as_json: bool,
    quiet: bool,
) -> NoReturn:
    """--dry-run: what the command would do, and nothing done."""

    def work() -> Json:
        require_recipe_and_targets(recipe, overrides or (), targets)
        from edgecompress import pipeline

        how: dict[str, Any] = {"output": output, "resume": resume, "profiled_for": profiled_for()}
        return pipeline.plan(recipe, targets=targets, overrides=overrides or (), command=planned_command(), **how)

    conclude(work, show=print_plan, as_json=as_json, quiet=quiet)
