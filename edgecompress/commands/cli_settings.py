"""The commands that look at recipes and targets: list, show, validate, and what only targets have.

What enters: a name or a file. What leaves: the two groups that the command line adds. None of them loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgecompress.commands.cli_options import JsonOption, NameArgument, NoGateOption
from edgecompress.commands.cli_output import print_json, print_next, print_rows, reporting_errors
from edgecompress.commands.next_steps import after_validation

recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and validate recipes.")
targets_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and validate targets.")


def _add_settings_commands(group: typer.Typer, folder: str) -> None:
    """The same three commands for recipes and for targets."""
    kind = folder.removesuffix("s")

    @group.command("list", help=f"List the shipped {folder}.")
    def list_command(as_json: JsonOption = False, no_gate: NoGateOption = False) -> None:
        with reporting_errors(as_json):
            from edgecompress.settings.yaml_files import read_yaml_mapping
            from edgecompress.shipped import shipped_files, shipped_name

            rows = []
            for path in shipped_files(folder):
                description = str(read_yaml_mapping(path).get("description", ""))
                rows.append({"name": shipped_name(folder, path), "description": " ".join(description.split())})
            if as_json:
                print_json({folder: rows})
            else:
                print_rows(rows)

    @group.command("show", help=f"Print a {kind}'s file, comments included.")
    def show_command(name: NameArgument, as_json: JsonOption = False, no_gate: NoGateOption = False) -> None:
        with reporting_errors(as_json):
            from edgecompress.settings.yaml_files import find_settings, read_yaml_mapping

            path = find_settings(name, kind="recipe" if kind == "recipe" else "target")
            if as_json:
                print_json(read_yaml_mapping(path))
            else:
                typer.echo(path.read_text(encoding="utf-8"), nl=False)

    @group.command("validate", help=f"Check a {kind} and name every fault in it.")
    def validate_command(name: NameArgument, as_json: JsonOption = False, no_gate: NoGateOption = False) -> None:
        with reporting_errors(as_json):
            from edgecompress.searching.space import validated_recipe
            from edgecompress.settings.target import load_target

            searched: list[str] = []
            if kind == "target":
                settings = load_target(name).model_dump(mode="json")
            else:
                settings, searched = validated_recipe(name)
            if as_json:
                fields = {"searched": searched} if searched else {}
                print_json({"valid": True, kind: settings, **fields})
            else:
                text = f", with {len(searched)} fields to search: {', '.join(searched)}" if searched else ""
                typer.echo(f"{name}: valid {kind} '{settings['name']}'{text}")
                print_next(after_validation(kind, name, searched))


_add_settings_commands(recipes_app, "recipes")
_add_settings_commands(targets_app, "targets")


@targets_app.command("schema")
def schema_command(as_json: JsonOption = False, no_gate: NoGateOption = False) -> None:
    """Print the JSON schema of target files, for editors and checks (it is JSON with or without --json)."""
    with reporting_errors(as_json):
        from edgecompress.commands.cli_schemas import settings_schema

        print_json(settings_schema("target"))


@targets_app.command("detect")
def detect_command(
    name: Annotated[str | None, typer.Option("--name", help="The target's name; left out, that of --output.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The file to write; left out, stdout.")] = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
) -> None:
    """Write a target file for this machine, with comments."""
    with reporting_errors(as_json):
        from edgecompress.settings.target_detection import DEFAULT_NAME, detected_target, write_target
        from edgecompress.settings.yaml_files import parse_yaml

        text = detected_target(name=name or (output.stem if output is not None else DEFAULT_NAME))
        if output is not None:
            write_target(output, text)
        if as_json:
            print_json({"target": parse_yaml(text, source="detected target"), "file": output and str(output)})
        elif output is None:
            typer.echo(text, nl=False)
        else:
            typer.echo(f"target: {output}")
            print_next(after_validation("target", str(output), ()))
