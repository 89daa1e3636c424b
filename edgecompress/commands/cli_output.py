"""How a command ends: its result on stdout, everything else on stderr, and the contract's exit code.

What enters: the work of a command, as a function. What leaves: text or one JSON document, and the exit.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from edgecompress import console
from edgecompress.commands.next_steps import next_command
from edgecompress.errors import EXIT_GATE_MISSED, EXIT_OK, EdgeCompressError, machine_faults

if TYPE_CHECKING:
    from edgecompress.pipeline import Outcome
    from edgecompress.run_directory import Json

Result = TypeVar("Result")


def conclude(
    work: Callable[[], Result],
    *,
    show: Callable[[Result], None],
    document: Callable[[Result], Any] = lambda result: result,
    exit_code: Callable[[Result], int] = lambda result: EXIT_OK,
    as_json: bool,
    quiet: bool,
) -> NoReturn:
    """Do the work, then print its result: one JSON document, or what `show` prints for people; and end."""
    console.set_quiet(quiet)
    with reporting_errors(as_json), console.library_logs_silenced():
        # Libraries below print to stdout now and then; it belongs to the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result = work()
        if as_json:
            print_json(document(result))
        else:
            show(result)
        raise typer.Exit(exit_code(result))


def finish(
    work: Callable[[], Outcome],
    document: Callable[[Outcome], Any],
    as_json: bool,
    no_gate: bool,
    quiet: bool,
    *,
    explain: bool = False,
) -> NoReturn:
    """The same for what leaves a run; a process that only trained along prints nothing.

    With `explain` the terminal also shows where the time goes, which the report holds in any case.
    """

    def work_alone() -> Outcome:
        outcome = work()
        if not outcome.is_first_process:
            raise typer.Exit(EXIT_OK)
        return outcome

    conclude(
        work_alone,
        show=functools.partial(_print_readable, explain=explain),
        document=document,
        exit_code=lambda outcome: EXIT_GATE_MISSED if outcome.missed and not no_gate else EXIT_OK,
        as_json=as_json,
        quiet=quiet,
    )


@contextlib.contextmanager
def reporting_errors(as_json: bool) -> Iterator[None]:
    """Within the block, an error of the tool becomes one message and its exit code."""
    try:
        with machine_faults():
            yield
    except EdgeCompressError as error:
        fail(str(error), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):  # the second: Ctrl-C, or the end of the input, at a question
        fail("interrupted", 130, as_json)


def fail(message: str, exit_code: int, as_json: bool) -> NoReturn:
    """End with one message, or with the document that says the same."""
    if as_json:
        print_json({"error": message, "exit_code": exit_code})
    else:
        console.error(message)
    raise typer.Exit(exit_code)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    from edgecompress.run_directory import to_json

    typer.echo(to_json(document), nl=False)


def print_rows(rows: list[dict[str, str]]) -> None:
    """Names and descriptions, a line each."""
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        typer.echo(f"{row['name']:<{width}}  {row['description']}")


def _print_readable(outcome: Outcome, *, explain: bool) -> None:
    """The same as `print_outcome`, for a run whose files may come from anywhere. Raises RunError."""
    from edgecompress.run_directory import reading_documents

    with reading_documents(outcome.run):
        print_outcome(outcome, explain=explain)


def print_outcome(outcome: Outcome, *, explain: bool = False) -> None:
    """What a command did, for people: what is bad first, then the tables, then where everything is."""
    from rich.console import Console

    from edgecompress.reporting.profile_text import explanation_tables
    from edgecompress.reporting.summary import models_table, slower_sentences, stages_table, verdict_text

    stdout = Console(highlight=False, emoji=False)
    for sentence in slower_sentences(outcome.manifest, outcome.profiles.values()):
        stdout.print(sentence, markup=False, soft_wrap=True, style="bold red")
    for text in outcome.manifest.get("notes", []):
        console.note(f"note: {text}")
    stdout.print(stages_table(outcome.manifest))
    for document in outcome.profiles.values():
        stdout.print(models_table(document))
    for document in outcome.profiles.values():
        for table in explanation_tables(document) if explain else ():
            stdout.print(table, soft_wrap=True)
        stdout.print(verdict_text(document), markup=False, soft_wrap=True)
    if outcome.missed and not outcome.profiles:
        for sentence in outcome.missed:
            stdout.print(f"gate missed: {sentence}", markup=False, soft_wrap=True)
    for paths in outcome.reports.values():
        stdout.print(f"report: {paths.html or paths.markdown or paths.json}", markup=False, soft_wrap=True)
    stdout.print(f"run:    {outcome.run.path}", markup=False, soft_wrap=True)
    print_next(next_command(outcome))


def print_plan(document: Json) -> None:
    """What a dry run found, for people."""
    from rich.console import Console

    from edgecompress.reporting.plan_text import plan_lines, plan_table

    stdout = Console(highlight=False, emoji=False)
    stdout.print(plan_table(document))
    for line in plan_lines(document):
        stdout.print(line, markup=False, soft_wrap=True)


def print_next(command: str | None) -> None:
    """The last line: what to do now, where a command can do it."""
    if command is not None:
        typer.echo(f"next:   {command}")


def command_line() -> str:
    """The command as it was given, so that the run can be made again."""
    return shlex.join(["edgecompress", *sys.argv[1:]])


def planned_command() -> str:
    """The command as it was given, without --dry-run."""
    return shlex.join(["edgecompress", *(word for word in sys.argv[1:] if word != "--dry-run")])
