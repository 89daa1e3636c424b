"""The command line: typed options in, one function of the pipeline called, an exit code out.

Nothing heavy is imported before a command runs, so `--help` is instant. Progress and prose go to stderr; stdout holds
the result alone: tables for people, or one JSON document with `--json`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from edgecompress import console
from edgecompress.commands.cli_options import (
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
    TargetOption,
    ThoroughOption,
)
from edgecompress.commands.cli_output import command_line, finish, print_json, reporting_errors, silence_library_logs
from edgecompress.commands.cli_settings import recipes_app, targets_app
from edgecompress.errors import EXIT_GATE_MISSED, EXIT_OK, EXIT_STAGE_FAILED, ConfigurationError

if TYPE_CHECKING:
    from edgecompress.pipeline import Outcome


class _Commands(TyperGroup):
    """The commands, with the contract of --json kept for misspelled options too: one document on stdout."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **extra: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if "--json" not in given or not extra.get("standalone_mode", True):
            return super().main(args, *positional, **extra)
        try:
            exit_code = super().main(args, *positional, **extra | {"standalone_mode": False})
        except typer.TyperException as error:
            print_json({"error": error.format_message(), "exit_code": error.exit_code})
            exit_code = error.exit_code
        sys.exit(exit_code or EXIT_OK)


app = typer.Typer(
    name="edgecompress",
    cls=_Commands,
    help="Distil, prune and quantize an image classifier; export it; measure it on the device; say if it may ship.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(targets_app, name="targets")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Handle --version; everything else is a command."""
    if version:
        from edgecompress import __version__

        typer.echo(f"edgecompress {__version__}")
        raise typer.Exit(EXIT_OK)


@app.command()
def apply(
    recipe: RecipeArgument,
    target: OptionalTarget = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Apply a recipe's stages in PyTorch: train, distill, prune, factorize, quantize, qat."""

    def work() -> Outcome:
        _check_recipe_and_targets(recipe, overrides or (), [target] if target is not None else [])
        from edgecompress import pipeline

        return pipeline.apply(
            recipe, target=target, overrides=overrides or (), output=output, resume=resume, command=command_line()
        )

    finish(work, lambda outcome: outcome.manifest, as_json, no_gate, quiet)


@app.command()
def export(
    run: RunArgument = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write the int8 file too, and check its parity.")] = False,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Files take uint8 [N, H, W, C] images of any size.")
    ] = False,
    ort: Annotated[
        bool, typer.Option("--ort", help="Write ORT format too, for mobile and minimal builds of ONNX Runtime.")
    ] = False,
    target: OptionalTarget = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write ONNX files and check parity: PyTorch, ONNX and int8 ONNX on real images."""

    def work() -> Outcome:
        _check_run_and_target(run, target)
        from edgecompress import pipeline

        return pipeline.export(
            run,
            target=target,
            int8=int8,
            with_preprocessing=with_preprocessing,
            ort=ort,
            overrides=overrides or (),
        )

    finish(work, lambda outcome: outcome.manifest, as_json, no_gate, quiet)


@app.command()
def profile(
    target: TargetOption,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN | FILE.onnx ...]",
            help="A run directory (left out, the newest under runs/), or any ONNX files, the first as the reference.",
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
            asked |= {"seconds": seconds, "thoroughness": _thoroughness(quick, thorough)}
        _profile_files(paths, target, asked, as_json, no_gate, quiet)
        return
    run = paths[0] if paths else None

    def work() -> Outcome:
        if shape or output:
            raise ConfigurationError("--shape and --output go with ONNX files; a run knows its own")
        thoroughness = _thoroughness(quick, thorough)
        _check_run_and_target(run, target)
        from edgecompress.deploy.remote import Host
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
) -> None:
    console.set_quiet(quiet)
    with reporting_errors(as_json):
        silence_library_logs()
        from edgecompress import pipeline

        with contextlib.redirect_stdout(sys.stderr):
            document = pipeline.profile_files(paths, target=target, **asked)
        if as_json:
            print_json(document)
        else:
            _print_files(document)
            if asked["output"] is not None:
                typer.echo(f"profile: {asked['output']}")
        raise typer.Exit(EXIT_GATE_MISSED if document["missed"] and not no_gate else EXIT_OK)


def _print_files(document: Any) -> None:
    from rich.console import Console

    from edgecompress.report.profile_text import budget_lines, explanation_tables, files_table

    stdout = Console(highlight=False, emoji=False)
    for text in document["notes"]:
        console.note(f"note: {text}")
    stdout.print(files_table(document))
    for table in explanation_tables(document):
        stdout.print(table, soft_wrap=True)
    for line in budget_lines(document):
        stdout.print(line, markup=False, soft_wrap=True)


@app.command()
def report(
    run: RunArgument = None,
    target: OptionalTarget = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the deployment report: one HTML page and one Markdown file per target."""

    def work() -> Outcome:
        _check_run_and_target(run, target)
        from edgecompress import pipeline

        outcome = pipeline.report(run, target=target)
        if open_page:
            for paths in outcome.reports.values():
                webbrowser.open(paths.html.resolve().as_uri())
        return outcome

    def document(outcome: Outcome) -> Any:
        return {name: {"html": str(p.html), "markdown": str(p.markdown)} for name, p in outcome.reports.items()}

    finish(work, document, as_json, no_gate, quiet)


@app.command("run")
def run_command(
    recipe: RecipeArgument,
    targets: Annotated[list[str], typer.Option("--target", help="A target file or shipped name; may be repeated.")],
    overrides: SetOption = None,
    output: OutputOption = None,
    resume: ResumeOption = False,
    seconds: SecondsOption = None,
    quick: QuickOption = False,
    thorough: ThoroughOption = False,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Apply, export with int8, profile and report, in one go."""

    def work() -> Outcome:
        thoroughness = _thoroughness(quick, thorough)
        _check_recipe_and_targets(recipe, overrides or (), targets)
        from edgecompress import pipeline

        return pipeline.run(
            recipe,
            targets=targets,
            overrides=overrides or (),
            output=output,
            resume=resume,
            seconds=seconds,
            thoroughness=thoroughness,
            command=command_line(),
        )

    finish(work, lambda outcome: outcome.manifest, as_json, no_gate, quiet)


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
    console.set_quiet(quiet)
    with reporting_errors(as_json):
        _check_run_and_target(run, target)
        silence_library_logs()
        with contextlib.redirect_stdout(sys.stderr):
            from edgecompress import pipeline
            from edgecompress.device.infer import self_test_lines

            outcome, made = pipeline.bundle(run, target=target, output=output, preprocessing_inside=preprocessing)
        if as_json:
            places = {"folder": str(made.folder), "archive": str(made.archive), "caution": made.caution}
            print_json({**made.manifest, **places})
        else:
            lines = [*filter(None, [made.caution]), *(f"self-test {line}" for line in self_test_lines(made.self_test))]
            for line in [*lines, f"bundle:  {made.folder}", f"archive: {made.archive}"]:
                typer.echo(line)
        raise typer.Exit(EXIT_GATE_MISSED if outcome.missed and not no_gate else EXIT_OK)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle, its archive, or a run directory.")],
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check every file against the manifest, then a bundle's answers; end with 1 where anything differs."""
    console.set_quiet(quiet)
    with reporting_errors(as_json):
        from edgecompress.deploy.verify import verify as check

        found = check(path)
        if as_json:
            print_json(found.to_dict())
        else:
            for line in found.lines():
                typer.echo(line)
        raise typer.Exit(EXIT_OK if found.ok else EXIT_STAGE_FAILED)


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
    console.set_quiet(quiet)
    with reporting_errors(as_json):
        _check_run_and_target(run, target)
        silence_library_logs()
        with contextlib.redirect_stdout(sys.stderr):
            from edgecompress import pipeline

            outcome, document = pipeline.sensitivity(
                run, what=what, target=target, images=images, macs_ratio=macs_ratio, timed=latency
            )
        if as_json:
            print_json(document)
            return
        from rich.console import Console

        from edgecompress.report.placement_text import sensitivity_table
        from edgecompress.report.sensitivity_text import channels_table, proposal_lines

        stdout = Console(highlight=False, emoji=False)
        if what != "channels" and "layers" in document:
            stdout.print(sensitivity_table(document))
        if what != "int8":
            stdout.print(channels_table(document["channels"]))
            for line in proposal_lines(document["channels"]["proposal"]):
                stdout.print(line, markup=False, soft_wrap=True)
        stdout.print(f"run:    {outcome.run.path}", markup=False, soft_wrap=True)


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
    console.set_quiet(quiet)
    with reporting_errors(as_json):
        _check_run_and_target(run, target)
        silence_library_logs()
        with contextlib.redirect_stdout(sys.stderr):
            from edgecompress import pipeline

            outcome, document = pipeline.debug_int8(run, target=target, images=images, worst=worst)
        if as_json:
            print_json(document)
            return
        from edgecompress.steps.debug_run import debug_text

        for line in debug_text(document):
            typer.echo(line)
        typer.echo(f"run:    {outcome.run.path}")


@app.command()
def doctor(as_json: JsonOption = False, no_gate: NoGateOption = False) -> None:
    """Look at this machine and this installation, and say what they mean for int8 and for measuring."""
    with reporting_errors(as_json):
        from edgecompress.commands.doctor import doctor_document, examine, findings_table

        findings = examine()
        document = doctor_document(findings)
        if as_json:
            print_json(document)
        else:
            from rich.console import Console

            Console(highlight=False, emoji=False).print(findings_table(findings))
        raise typer.Exit(EXIT_OK if document["ok"] or no_gate else EXIT_GATE_MISSED)


def _thoroughness(quick: bool, thorough: bool) -> str:
    if quick and thorough:
        raise ConfigurationError("--quick and --thorough: give one of them, or neither")
    return "quick" if quick else "thorough" if thorough else "standard"


def _check_recipe_and_targets(recipe: str, overrides: Sequence[str], targets: Sequence[str]) -> None:
    """Name the faults of all files at once, and before torch, which takes seconds to load."""
    from edgecompress.settings.recipe import load_recipe
    from edgecompress.settings.target import load_target

    checks: list[Callable[[], object]] = [lambda: load_recipe(recipe, overrides)]
    checks += [functools.partial(load_target, target) for target in targets]
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            faults.append(str(error))
    if faults:
        raise ConfigurationError("\n".join(faults))


def _check_run_and_target(run: Path | None, target: str | None) -> None:
    """Refuse a run or a target that is not there before torch is loaded."""
    from edgecompress.run_directory import open_run
    from edgecompress.settings.target import load_target

    open_run(run)
    if target is not None:
        load_target(target)


def main() -> None:
    """Entry point of the console script."""
    # torch's threads spin while they wait for each other. On two cores with anything else running that made training
    # ten times slower; so they spin shortly, then sleep. The user's own setting wins.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    app()
