"""The commands that publish what --json prints: a JSON Schema for each kind of document, with a version.

What enters: a name. What leaves: the schema, from the package's `schemas/`; recipes and targets have theirs from the
classes that read them. Keys that a schema requires stay; a document may hold more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgecompress.commands.cli_options import JsonOption, NoGateOption
from edgecompress.commands.cli_output import print_json, reporting_errors
from edgecompress.commands.completion import complete_schemas

if TYPE_CHECKING:
    from edgecompress.run_directory import Json

FOLDER = Path(__file__).resolve().parent.parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
SETTINGS = {"recipe": "A recipe, resolved", "target": "A target"}
_SETTINGS_VERSION = 1

schema_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List and show the JSON schemas of what --json prints."
)


def schema_names() -> list[str]:
    """Every schema that can be shown."""
    return sorted([*(path.stem for path in FOLDER.glob("*.json")), *SETTINGS])


def read_schema(name: str) -> Json:
    """A published schema. Raises ConfigurationError with the nearest name."""
    from edgecompress.errors import ConfigurationError
    from edgecompress.run_directory import read_json
    from edgecompress.settings.spelling import did_you_mean

    if name not in schema_names():
        raise ConfigurationError(f"schema '{name}': there is none of that name{did_you_mean(name, schema_names())}")
    return settings_schema(name) if name in SETTINGS else read_json(FOLDER / f"{name}.json")


def settings_schema(kind: str) -> Json:
    """The schema of recipe or target files. The file's name stands in for `name`, so it is not required."""
    from edgecompress.settings.recipe import Recipe
    from edgecompress.settings.target import Target

    schema = (Recipe if kind == "recipe" else Target).model_json_schema()
    schema["required"] = [key for key in schema["required"] if key != "name"]
    head = {"$schema": DIALECT, "$id": f"urn:edgecompress:schema:{kind}:{_SETTINGS_VERSION}"}
    return {**head, "x-version": _SETTINGS_VERSION, "x-commands": [], **schema, "title": SETTINGS[kind]}


@schema_app.command("list")
def list_command(as_json: JsonOption = False, no_gate: NoGateOption = False) -> None:
    """List the schemas, and the commands whose documents they describe."""
    with reporting_errors(as_json):
        keys = {"version": "x-version", "title": "title", "commands": "x-commands"}
        found = {name: read_schema(name) for name in schema_names()}
        rows = [{"name": name, **{key: schema[at] for key, at in keys.items()}} for name, schema in found.items()]
        if as_json:
            print_json({"schemas": rows})
            return
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            commands = f" ({', '.join(row['commands'])})" if row["commands"] else ""
            typer.echo(f"{row['name']:<{width}}  v{row['version']}  {row['title']}{commands}")


@schema_app.command("show")
def show_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A name that `schema list` shows.",
            autocompletion=complete_schemas,
        ),
    ],
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
) -> None:
    """Print a schema (it is JSON with or without --json)."""
    with reporting_errors(as_json):
        print_json(read_schema(name))
