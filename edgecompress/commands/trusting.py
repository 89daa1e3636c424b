"""The command that names code: trust, for a run of somebody else whose model is a Python file.

What enters: `file.py:function`. What leaves: the list of what may run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecompress.commands.cli_options import JsonOption, NoGateOption, QuietOption
from edgecompress.commands.cli_output import conclude
from edgecompress.errors import ConfigurationError

if TYPE_CHECKING:
    from edgecompress.run_directory import Json

app = typer.Typer()


@app.command()
def trust(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="FILE.py:FUNCTION", help="Left out, the list is shown.")
    ] = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let run directories use a Python function that you have looked at; your own recipes need no such leave."""

    def work() -> Json:
        from edgecompress.settings.named_code import named_code, names_file, remember

        for reference in references or ():
            file, _, function = reference.rpartition(":")
            if not file.endswith(".py") or not function.isidentifier():
                raise ConfigurationError(f"'{reference}': expected path/file.py:function, for instance nets.py:build")
            if not Path(file).is_file():
                raise ConfigurationError(f"'{reference}': there is no file {file}")
        for reference in references or ():
            remember(reference)
        return {"file": str(names_file()), "named": named_code()}

    def show(document: Json) -> None:
        if not document["named"]:
            typer.echo("no function is named yet; name one after looking at it: edgecompress trust nets.py:build")
        for name in document["named"]:
            typer.echo(name)

    conclude(work, show=show, as_json=as_json, quiet=quiet)
