"""The command that starts: init, which writes a recipe and a target for one's own model and data.

What enters: flags, or answers on a terminal. What leaves: two files that were not there before, and the next command.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgecompress import console
from edgecompress.commands.cli_options import JsonOption, NoGateOption, QuietOption
from edgecompress.commands.cli_output import conclude, print_next
from edgecompress.commands.completion import complete_targets

if TYPE_CHECKING:
    from edgecompress.run_directory import Json

app = typer.Typer()


@app.command()
def init(
    output: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The recipe to write; left out, named after the data.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="An image folder (train/<class>/*.jpg), or digits, cifar10, ...")
    ] = None,
    class_index: Annotated[
        Path | None, typer.Option("--class-index", help="JSON: folder to class, for some of a model's classes.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="timm/NAME, torchvision/NAME, a small net, file.py:function.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Its weights: .safetensors, .pt or .pth.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Let timm or torchvision download theirs.")] = False,
    goal: Annotated[
        Literal["int8", "prune"], typer.Option("--goal", help="int8 alone, or fewer channels first.")
    ] = "int8",
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="A target file or shipped name; left out, one is written for this machine.",
            autocompletion=complete_targets,
        ),
    ] = None,
    as_json: JsonOption = False,
    no_gate: NoGateOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a recipe and a target for your own model and data, after looking at them."""

    def work() -> Json:
        given: dict[str, Any] = {
            "data": data,
            "model": model,
            "checkpoint": checkpoint,
            "pretrained": pretrained,
            "goal": goal,
        }
        if data is None:
            given |= _ask(**given)
        return write_first_files(output=output, class_index=class_index, target=target, **given)

    def show(document: Json) -> None:
        for note in document["notes"]:
            console.note(f"note: {note}")
        typer.echo(f"recipe: {document['recipe']}")
        if document["target"] is not None:
            typer.echo(f"target: {document['target']}")
        print_next(document["next"])

    conclude(work, show=show, as_json=as_json, quiet=quiet)


def _ask(
    *, data: str | None, model: str | None, checkpoint: Path | None, pretrained: bool, goal: Literal["int8", "prune"]
) -> Json:
    """The few questions, where there is a terminal; what a flag said is not asked again. Raises ConfigurationError."""
    from edgecompress.errors import ConfigurationError

    if not sys.stdin.isatty():
        raise ConfigurationError("--data: required where there is no terminal to ask on; give a folder, or digits")
    answers: Json = {"data": typer.prompt("Images (a folder with train/<class>/, or digits)", err=True)}
    if model is None:
        answers["model"] = typer.prompt("Model (timm/NAME, torchvision/NAME; empty: a small net)", "", err=True) or None
    if answers.get("model", model) is not None and checkpoint is None and not pretrained:
        file = typer.prompt("Weights (a file; empty: train from scratch)", "", err=True)
        answers["checkpoint"] = Path(file) if file else None
    answers["goal"] = typer.prompt("Goal (int8 or prune)", goal, value_proc=_goal, err=True)
    return answers


def _goal(answer: str) -> str:
    """An answer that is no goal is asked for again."""
    if answer not in ("int8", "prune"):
        raise typer.BadParameter(f"'{answer}' is neither int8 nor prune")
    return answer


def write_first_files(
    *,
    data: str,
    output: Path | None,
    class_index: Path | None,
    model: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    goal: Literal["int8", "prune"],
    target: str | None,
) -> Json:
    """Look at data and model, then write the recipe and, without `target`, a target for this machine.

    Nothing is written where anything is wrong, and no file is ever replaced. Raises InputError.
    """
    from edgecompress.errors import ConfigurationError
    from edgecompress.settings.target import load_target

    if model is None and (checkpoint is not None or pretrained):
        raise ConfigurationError("--checkpoint and --pretrained say nothing without --model; give the model's name")
    if checkpoint is not None and pretrained:
        raise ConfigurationError("--checkpoint and --pretrained: give one of them")
    recipe_path = output if output is not None else Path(f"{_identifier(Path(data).resolve().name)}.yaml")
    if recipe_path.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"{recipe_path}: a recipe is a YAML file; name it {recipe_path.with_suffix('.yaml')}")
    target_path = recipe_path.with_name(f"{recipe_path.stem}-target.yaml") if target is None else None
    for path in filter(None, (recipe_path, target_path)):
        if path.exists():
            raise ConfigurationError(f"{path}: is already there and is not replaced; choose another name or remove it")
    if not recipe_path.absolute().parent.is_dir():
        raise ConfigurationError(f"{recipe_path}: its folder is not there; make it first")
    if target is not None:
        load_target(target)

    from edgecompress.data.data_sources import SOURCES
    from edgecompress.run_directory import write_text
    from edgecompress.settings.model_settings import ModelSettings, PreprocessingSettings
    from edgecompress.settings.recipe import DataSettings
    from edgecompress.settings.spelling import did_you_mean
    from edgecompress.settings.target_detection import detected_target, write_target
    from edgecompress.settings.user_code import is_user_code
    from edgecompress.steps.first_look import look_at_data, look_at_model
    from edgecompress.steps.first_recipe import Wanted, first_recipe

    is_folder = Path(data).expanduser().is_dir()
    if not is_folder and data not in SOURCES and not is_user_code(data):
        raise ConfigurationError(
            f"--data {data}: there is no such folder, and no data of that name{did_you_mean(data, SOURCES)}"
        )
    source = {"name": "image_folder", "root": Path(data)} if is_folder else {"name": data}
    data_settings = DataSettings.model_validate(source | {"class_index": class_index})
    images, seen = look_at_data(data_settings)
    chosen = []
    if model is None:
        model = "resnet20" if seen.input_size <= 64 else "mobilenet_small"
        chosen.append(f"no model was named: {model}, trained from scratch")
    own_input = model.startswith(("timm/", "torchvision/")) or ".py:" in model
    preprocessing = PreprocessingSettings() if own_input else PreprocessingSettings(input_size=seen.input_size)
    model_settings = ModelSettings(
        name=model, checkpoint=checkpoint, pretrained=pretrained, preprocessing=preprocessing
    )
    looked = look_at_model(model_settings, images)
    target_name = target if target is not None else str(target_path)
    wanted = Wanted(_identifier(recipe_path.stem), recipe_path, target_name, goal)
    text, notes = first_recipe(wanted, data_settings, model_settings, seen, looked)
    target_text = detected_target(name=_identifier(target_path.stem)) if target_path is not None else None
    write_text(recipe_path, text)
    if target_path is not None and target_text is not None:
        write_target(target_path, target_text)
    pairs = {"smallest_class": seen.smallest_class, "largest_class": seen.largest_class}
    return {
        "recipe": str(recipe_path),
        "target": str(target_path) if target_path is not None else None,
        "next": shlex.join(["edgecompress", "run", str(recipe_path), "--target", target_name]),
        "data": {
            "name": data_settings.name,
            "num_classes": seen.num_classes,
            "channels": seen.channels,
            "native_size": seen.native_size,
            "splits": seen.splits,
            **{key: {"name": name, "images": count} for key, (name, count) in pairs.items()},
            "notes": list(seen.notes),
        },
        "model": {"name": model, "weights": looked.weights},
        "notes": [*chosen, *looked.notes, *notes],
    }


def _identifier(text: str) -> str:
    """A name that recipes and targets may have, as near to the text as can be."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:50] or "mine"
