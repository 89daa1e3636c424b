"""What the shell may complete: run directories, recipes, targets, and the fields that --set can reach.

What enters: a word that is not finished, and what stands before it. What leaves: words, some with a line of help. Where
nothing is known the list is empty, and the shell completes file names.
"""

from __future__ import annotations

import itertools
import os
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgecompress.errors import EdgeCompressError
from edgecompress.run_directory import RUNS_ROOT, read_json

if TYPE_CHECKING:
    from pydantic import BaseModel

Word = tuple[str, str]


def complete_runs(incomplete: str) -> list[Word]:
    """Run directories under runs/, and folders on the way to others."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    places = [RUNS_ROOT, folder] if incomplete else [RUNS_ROOT]
    words: dict[str, str] = {}
    for place in places:
        for path in _folders(place):
            if (path / "run.json").is_file():
                words.setdefault(str(path), _about_run(path))
            elif place == folder:
                words.setdefault(f"{path}/", "")
    return sorted((name, text) for name, text in words.items() if name.startswith(incomplete))


def _folders(place: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []


def _about_run(path: Path) -> str:
    try:
        manifest = read_json(path / "run.json")
    except EdgeCompressError:
        return "damaged"
    return f"{manifest.get('recipe_name')}, {manifest.get('status')}"


def complete_recipes(incomplete: str) -> list[Word]:
    """Shipped recipes, and YAML files that the word may become."""
    return _shipped("recipes", incomplete)


def complete_targets(incomplete: str) -> list[Word]:
    """Shipped targets, and YAML files that the word may become."""
    return _shipped("targets", incomplete)


def complete_settings(ctx: typer.Context, incomplete: str) -> list[Word]:
    """Names and files for the groups `recipes` and `targets`, by the group that was typed."""
    group = ctx.parent.info_name if ctx.parent is not None else None
    return _shipped("targets" if group == "targets" else "recipes", incomplete)


def complete_schemas(incomplete: str) -> list[str]:
    """Names of published schemas."""
    from edgecompress.commands.cli_schemas import schema_names

    return [name for name in schema_names() if name.startswith(incomplete)]


def complete_trackers(incomplete: str) -> list[str]:
    """The trackers that --track takes."""
    return [name for name in ("tensorboard", "mlflow", "wandb") if name.startswith(incomplete)]


def _shipped(folder: str, incomplete: str) -> list[Word]:
    from edgecompress.settings.yaml_files import read_yaml_mapping
    from edgecompress.shipped import shipped_files, shipped_name

    words: list[Word] = []
    for path in shipped_files(folder):
        name = shipped_name(folder, path)
        if name.startswith(incomplete):
            words.append((name, str(read_yaml_mapping(path).get("description", ""))))
    place = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = (str(path) for path in sorted(place.glob("*.y*ml")))
    words += [(name, "") for name in files if name.startswith(incomplete)]
    words += [(f"{path}/", "") for path in _folders(place) if incomplete and str(path).startswith(incomplete)]
    return words


def complete_overrides(ctx: typer.Context, incomplete: str) -> list[Word]:
    """Fields of the recipe that was named, with its stages by their id; after `=`, the values that a field may take."""
    document = _recipe_document(ctx.params | _typed(ctx))
    words = [(f"{path}={value}", help_text) for path, value, help_text in _fields(document, incomplete)]
    return [word for word in words if word[0].startswith(incomplete)]


def _typed(ctx: typer.Context) -> dict[str, str]:
    """The command's first argument. The parser gives up at an option that has no value yet, which is the usual case."""
    text = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""  # bash; zsh and fish
    words = text.split()
    words = words[words.index(str(ctx.info_name)) + 1 :] if ctx.info_name in words else []
    flags = {name for option in ctx.command.params if getattr(option, "is_flag", False) for name in option.opts}
    for before, word in itertools.pairwise(["", *words]):
        if not word.startswith("-") and (not before.startswith("-") or before in flags):
            return {"first": word}
    return {}


def _recipe_document(parameters: dict[str, Any]) -> dict[str, Any]:
    """The recipe as it stands in its file or in the run's manifest; empty where neither can be read."""
    from edgecompress.run_directory import open_run
    from edgecompress.settings.yaml_files import find_settings, read_yaml_mapping

    try:
        if "recipe" in parameters:
            source = str(parameters["recipe"] or parameters.get("first", ""))
            return read_yaml_mapping(find_settings(source, kind="recipe"))
        run = parameters.get("run") or parameters.get("first")
        return dict(open_run(Path(run) if run is not None else None).read_manifest()["recipe"])
    except (EdgeCompressError, TypeError, ValueError):
        return {}


def _fields(document: dict[str, Any], incomplete: str) -> Iterator[tuple[str, str, str]]:
    """(dotted path, value or nothing, help) of every field. Values are given once the word has its `=`."""
    from edgecompress.settings.recipe import Recipe

    with_values = "=" in incomplete
    for name, field in Recipe.model_fields.items():
        if name != "stages":
            yield from _field(name, field, with_values)
    kinds = {kind: model for model in _models(Recipe.model_fields["stages"].annotation) for kind in _kinds(model)}
    stages = document.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        model = kinds.get(str(stage.get("kind"))) if isinstance(stage, dict) else None
        for name, field in model.model_fields.items() if model is not None else ():
            if name not in ("id", "kind"):
                yield from _field(f"stages.{stage.get('id')}.{name}", field, with_values)


def _field(path: str, field: Any, with_values: bool) -> Iterator[tuple[str, str, str]]:
    inner = _models(field.annotation)
    for model in inner:
        for name, deeper in model.model_fields.items():
            if len(path.split(".")) < 5:  # a teacher may hold a model, which holds arguments: far enough
                yield from _field(f"{path}.{name}", deeper, with_values)
    if inner:
        return
    help_text = field.description or ""
    for value in _values(field.annotation) if with_values else [""]:
        yield path, value, help_text


def _values(annotation: Any) -> list[str]:
    """What a field may be, where that can be listed."""
    if annotation is bool:
        return ["true", "false"]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [value for argument in typing.get_args(annotation) for value in _values(argument)]
    return []


def _models(annotation: Any) -> list[type[BaseModel]]:
    from edgecompress.settings.configuration import models_in

    return models_in(annotation)


def _kinds(model: type[BaseModel]) -> Sequence[str]:
    field = model.model_fields.get("kind")
    values: Iterable[Any] = typing.get_args(field.annotation) if field is not None else ()
    return [str(value) for value in values]
