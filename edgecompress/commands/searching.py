"""The command that chooses: search, which tries a recipe's settings and names the model to ship.

What enters: a recipe, a target, what may be lost, and how much may be tried. What leaves: a folder of complete runs,
search.json, search.md and search.html.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgecompress.commands.cli_options import (
    CacheOption,
    DryRunOption,
    JsonOption,
    NoGateOption,
    QuietOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    TargetOption,
)
from edgecompress.commands.cli_output import command_line, conclude, planned_command, print_next, print_plan
from edgecompress.commands.next_steps import after_search
from edgecompress.errors import EXIT_GATE_MISSED, EXIT_OK, ConfigurationError
from edgecompress.searching.limits import DEFAULT_TRIALS, require_limits

if TYPE_CHECKING:
    from edgecompress.searching.order import SearchOrder

app = typer.Typer()
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Minimized(StrEnum):
    """What a search makes small."""

    LATENCY = "latency"
    SIZE = "size"
    MEMORY = "memory"


@app.command("search")
def search_command(
    recipe: RecipeArgument,
    target: TargetOption,
    max_accuracy_drop: Annotated[
        float, typer.Option("--max-accuracy-drop", help="What may be lost on val, as a fraction: 0.01 is one point.")
    ],
    minimize: Annotated[Minimized, typer.Option("--minimize", help="What to make small.")] = Minimized.LATENCY,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help=f"Trials in all; {DEFAULT_TRIALS} without --time, else as many as fit."),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Begin no trial after this time, for instance 2h, 30m or 90s.")
    ] = None,
    overrides: SetOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="The search's folder.")] = None,
    resume: ResumeOption = False,
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="A database that several workers share: postgresql://user@host/name."),
    ] = None,
    cache: CacheOption = None,
    warm_start: Annotated[
        list[Path] | None,
        typer.Option("--warm-start", help="An earlier search or run whose settings are tried first; may be repeated."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Search a recipe's settings for the best model that a target can run."""

    def order() -> SearchOrder:
        seconds = seconds_of(time_limit)
        require_limits(
            max_accuracy_drop=max_accuracy_drop,
            minimize=minimize.value,
            trials=trials,
            seconds=seconds,
            storage=storage,
        )
        _require_space_and_target(recipe, tuple(overrides or ()), target)
        from edgecompress.searching.order import SearchOrder
        from edgecompress.settings.target import load_target

        return SearchOrder(
            source=recipe,
            overrides=tuple(overrides or ()),
            target=load_target(target),
            max_accuracy_drop=max_accuracy_drop,
            minimize=minimize.value,
            trials=trials,
            seconds=seconds,
            storage=storage,
            cache=cache,
            warm_starts=tuple(warm_start or ()),
            command=planned_command() if dry_run else command_line(),
        )

    def plan() -> dict[str, Any]:
        from edgecompress import pipeline

        return pipeline.plan_search(order(), output=output, resume=resume)

    def work() -> dict[str, Any]:
        from edgecompress import pipeline

        return pipeline.search(order(), output=output, resume=resume)

    if dry_run:
        conclude(plan, show=print_plan, as_json=as_json, quiet=quiet)
    conclude(
        work,
        show=_show,
        exit_code=lambda document: EXIT_GATE_MISSED if document["pick"] is None and not no_gate else EXIT_OK,
        as_json=as_json,
        quiet=quiet,
    )


def seconds_of(text: str | None) -> float | None:
    """`2h`, `30m`, `90s`, `1h30m` or plain seconds. Raises ConfigurationError."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?|(\d+(\.\d+)?[smhd])+", text):
        raise ConfigurationError(f"--time: '{text}' is no time; write for instance 2h, 30m, 90s or 1h30m")
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    seconds = sum(float(number) * _UNITS.get(unit, 1.0) for number, unit in parts)
    if seconds <= 0:
        raise ConfigurationError(f"--time: '{text}' leaves no time for a trial; give for instance 30m")
    return seconds


def _require_space_and_target(recipe: str, overrides: tuple[str, ...], target: str) -> None:
    """Name the faults of both files at once, and before torch, which takes seconds to load."""
    from edgecompress.searching.space import load_space
    from edgecompress.settings.target import load_target

    faults = []
    for check in (lambda: load_space(recipe, overrides), lambda: load_target(target)):
        try:
            check()
        except ConfigurationError as error:
            faults.append(str(error))
    if faults:
        raise ConfigurationError("\n".join(faults))


def _show(document: dict[str, Any]) -> None:
    from edgecompress.searching.result_text import lines

    for line in lines(document):
        typer.echo(line)
    typer.echo(f"page: {document['folder']}/search.html")
    print_next(after_search(document))
