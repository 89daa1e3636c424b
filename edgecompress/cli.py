"""The command line: every room of commands under one name.

Nothing heavy is imported before a command runs, so `--help` is instant. Progress and prose go to stderr; stdout holds
the result alone: tables for people, or one JSON document with `--json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from edgecompress.commands import making, measuring_commands, searching, shipping, starting, studying, trusting
from edgecompress.commands.cli_output import fail, print_json
from edgecompress.commands.cli_runs import runs_app
from edgecompress.commands.cli_schemas import schema_app
from edgecompress.commands.cli_settings import recipes_app, targets_app
from edgecompress.commands.examples import example
from edgecompress.errors import EXIT_OK, EXIT_STAGE_FAILED, machine_fault
from edgecompress.threads import check_every_start


class _Commands(TyperGroup):
    """The commands, with the contract of --json kept for misspelled options too: one document on stdout."""

    _as_json = False

    def main(self, args: Sequence[str] | None = None, *positional: Any, **extra: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        self._as_json = "--json" in given
        if not self._as_json or not extra.get("standalone_mode", True):
            return super().main(args, *positional, **extra)
        try:
            exit_code = super().main(args, *positional, **extra | {"standalone_mode": False})
        except typer.TyperException as error:
            print_json({"error": error.format_message(), "exit_code": error.exit_code})
            exit_code = error.exit_code
        sys.exit(exit_code or EXIT_OK)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _plain(error.message)
            raise
        except BrokenPipeError:  # typer's: whoever read our output has had enough
            raise
        except (OSError, MemoryError) as error:  # outside of what a command does: while its modules are imported
            fail(str(machine_fault(error)), EXIT_STAGE_FAILED, self._as_json)


def _plain(message: str) -> str:
    """A refused option's value, in the words of people: pydantic, which checks values for typer, has its own."""
    for words, plain in (("Value error, ", ""), ("Input should be ", "must be ")):
        if message.startswith(words):
            message = plain + message.removeprefix(words)
    return message.replace("must be greater than or equal to", "must be at least").replace(
        "must be less than or equal to", "must be at most"
    )


app = typer.Typer(
    name="edgecompress",
    cls=_Commands,
    help="Distil, prune and quantize an image classifier; export it; measure it on the device; say if it may ship.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_ROOMS = (starting.app, making.app, measuring_commands.app, searching.app, shipping.app, studying.app, trusting.app)
_GROUPS = {"recipes": recipes_app, "targets": targets_app, "runs": runs_app, "schema": schema_app}
for commands in _ROOMS:
    app.add_typer(commands)
for name, commands in _GROUPS.items():
    app.add_typer(commands, name=name)
for prefix, commands in (*(("", room) for room in _ROOMS), *((f"{name} ", group) for name, group in _GROUPS.items())):
    for command in commands.registered_commands:
        command.epilog = example(f"{prefix}{command.name or getattr(command.callback, '__name__', '')}")


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


def main() -> None:
    """Entry point of the console script."""
    # torch's threads spin while they wait for each other. On two cores with anything else running that made training
    # ten times slower; so they spin shortly, then sleep. The user's own setting wins.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    check_every_start()
    sys.unraisablehook = _end_where_a_thread_cannot_begin
    try:
        app()
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:  # no file or memory is left even for what prints messages
        _fail_with_nothing(str(machine_fault(error)))


def _fail_with_nothing(message: str) -> NoReturn:
    """End as `fail` does, with nothing that still has to be loaded."""
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": message, "exit_code": EXIT_STAGE_FAILED}, indent=2) + "\n")
    else:
        sys.stderr.write(f"error: {message}\n")
    sys.exit(EXIT_STAGE_FAILED)


def _end_where_a_thread_cannot_begin(fault: sys.UnraisableHookArgs) -> None:
    """End the process where a thread of it ran out of memory before it had begun.

    Whoever started it waits for ever for it to begin (https://github.com/python/cpython/issues/140746), so nobody else
    can. Files are safe: this is no worse than being killed, which every command survives.
    """
    if isinstance(fault.exc_value, MemoryError) and getattr(fault.object, "__name__", "") == "_bootstrap":
        try:
            _fail_with_nothing(str(machine_fault(fault.exc_value)))
        finally:
            sys.stdout.flush()
            os._exit(EXIT_STAGE_FAILED)
    sys.__unraisablehook__(fault)
