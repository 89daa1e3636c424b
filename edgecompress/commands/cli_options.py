"""The arguments and options that several commands share, each in one place.

What enters: nothing. What leaves: annotated types for the commands' signatures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgecompress.commands.completion import (
    complete_overrides,
    complete_recipes,
    complete_runs,
    complete_settings,
    complete_targets,
    complete_trackers,
)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or a shipped recipe's name.", autocompletion=complete_recipes
    ),
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN", help="A run directory; left out, the newest under runs/.", autocompletion=complete_runs
    ),
]
RunsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="Run directories, two or more; or one that was profiled on several targets.",
        autocompletion=complete_runs,
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        help="A target file, or a shipped target's name.",
        autocompletion=complete_targets,
    ),
]
OptionalTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="A target file, or a shipped target's name.",
        autocompletion=complete_targets,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field, e.g. stages.pruned.epochs=5.",
        autocompletion=complete_overrides,
    ),
]
OutputOption = Annotated[Path | None, typer.Option("--output", help="The run directory to make.")]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on in --output where it stopped.")]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="A folder of finished stages: taken from there, and kept there.")
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="tensorboard|mlflow|wandb",
        help="Tell a tracker of epochs and results, repeatable; an extra of that name installs it.",
        autocompletion=complete_trackers,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, with time, disk and memory; do nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
NoGateOption = Annotated[bool, typer.Option("--no-gate", help="End with 0 where a gate or budget was missed.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print warnings and the result only.")]
SecondsOption = Annotated[
    float | None,
    typer.Option("--seconds", min=1.0, help="Time limit for measuring latency: 20, --quick 4, --thorough 120."),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Measure for a few seconds; intervals are wide.")]
ThoroughOption = Annotated[bool, typer.Option("--thorough", help="Measure for minutes; intervals are narrow.")]
FormatOption = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="html|md|json", help="What to write, repeatable; left out, all of them."),
]
NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A shipped name or a file.",
        autocompletion=complete_settings,
    ),
]
