"""`init`, the second half: a recipe for the user's own model and data, with comments that say why.

What enters: facts about data and model, and what is wanted. What leaves: YAML that loads as it is, and the choices that
were made, in words. Epochs follow from the number of images: small sets need more of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from edgecompress.settings.configuration import validate
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DataSettings, Recipe
from edgecompress.settings.yaml_files import parse_yaml
from edgecompress.steps.first_look import DataFacts, ModelFacts

Goal = Literal["int8", "prune"]
_STEPS_FROM_SCRATCH, _STEPS_OF_FINETUNING = 2000, 600
_CHANNEL_RATIO = 0.3


@dataclass(frozen=True)
class Wanted:
    """What the recipe is for."""

    name: str
    recipe_path: Path
    target: str
    goal: Goal


def first_recipe(
    wanted: Wanted, data: DataSettings, model: ModelSettings, seen: DataFacts, looked: ModelFacts
) -> tuple[str, list[str]]:
    """The text of the recipe, and what was chosen and why. Raises ConfigurationError for a name that cannot be one."""
    lines = [*_header(wanted, data, seen, looked), f"name: {_scalar(wanted.name)}"]
    lines += [f"description: {_scalar(_description(wanted, model, data))}", "seed: 0"]
    lines += [*_data_lines(data, seen), *_model_lines(model, looked), "stages:"]
    notes = list(seen.notes)
    trained = None if looked.knows_the_classes else "trained"
    if trained:
        stage, why = _train_lines(seen, looked)
        lines += stage
        notes.append(why)
    if wanted.goal == "prune":
        stage, why = _prune_lines(seen, model, trained)
        lines += stage
        notes.append(why)
    lines += _int8_lines(seen)
    lines += _gate_lines(seen)
    text = "\n".join(lines) + "\n"
    validate(Recipe, parse_yaml(text, source=str(wanted.recipe_path)), source=str(wanted.recipe_path))
    return text, notes


def _header(wanted: Wanted, data: DataSettings, seen: DataFacts, looked: ModelFacts) -> list[str]:
    images = ", ".join(f"{name} {count:,}" for name, count in seen.splits.items())
    low, middle, high = seen.sides_px
    sizes = f"{low} px" if low == high else f"{low} to {high} px, median {middle} (the shorter side, of a sample)"
    (small, fewest), (large, most) = seen.smallest_class, seen.largest_class
    balance = f"{fewest:,}" if fewest == most else f"{fewest:,} ({_plain(small)}) to {most:,} ({_plain(large)})"
    weights = {
        "checkpoint": "from the checkpoint" if looked.knows_the_classes else "from the checkpoint, with a new head",
        "pretrained": "published" if looked.knows_the_classes else "published, with a new head",
        "random": "none yet",
    }[looked.weights]
    classes = f"{seen.num_classes} classes"
    if seen.has_class_index:
        classes = f"{seen.classes_in_train} of the model's classes (class_index goes up to {seen.num_classes - 1})"
    first = "epochs and learning_rate" if not looked.knows_the_classes else "calibration.samples and effort"
    return [
        "# Written by `edgecompress init`, which looked at the data and the model. It is yours to change.",
        "#",
        f"#   edgecompress run {wanted.recipe_path} --target {wanted.target}",
        "#",
        f"# Found: {classes}; images: {images}; {seen.channels} channel{'s' if seen.channels > 1 else ''}; {sizes}.",
        f"# Images of a class in train: {balance}. Weights: {weights}.",
        f"# Change first: {first}; `edgecompress recipes show prune_kd` and `distill` show what else there is.",
        "# Try it in seconds before it runs for hours: --dry-run, and --set data.max_train_samples=500.",
    ]


def _description(wanted: Wanted, model: ModelSettings, data: DataSettings) -> str:
    where = data.root if data.root is not None else data.name
    what = {"int8": "to int8", "prune": "pruned, then int8"}[wanted.goal]
    return f"{model.name} on {where}, {what}."


def _data_lines(data: DataSettings, seen: DataFacts) -> list[str]:
    lines = ["data:", f"  name: {_scalar(data.name)}"]
    if data.root is not None:
        lines.append(f"  root: {_scalar(str(data.root))}  # relative to the folder that the command is given in")
    if data.class_index is not None:
        lines.append(f"  class_index: {_scalar(str(data.class_index))}")
    for note in seen.notes:
        lines.append(f"  # {_plain(note)}")
    return lines


def _model_lines(model: ModelSettings, looked: ModelFacts) -> list[str]:
    lines = ["model:", f"  name: {_scalar(model.name)}"]
    if model.checkpoint is not None:
        lines.append(f"  checkpoint: {_scalar(str(model.checkpoint))}")
    if model.pretrained:
        lines.append("  pretrained: true  # downloaded when the recipe runs")
    if model.preprocessing.input_size is not None:
        lines.append(f"  preprocessing: {{input_size: {model.preprocessing.input_size}}}  # less is faster")
    else:
        lines.append(f"  # input: {looked.input_size} px and the normalization of the model's own configuration")
    return lines


def _batch_size(seen: DataFacts) -> int:
    """A power of two from 8 to 64, so that an epoch has some steps."""
    return int(min(64, max(8, 2 ** int(math.log2(max(1, seen.splits["train"] // 16))))))


def _epochs(seen: DataFacts, steps: int) -> int:
    return min(30, max(5, math.ceil(steps / max(1, seen.splits["train"] // _batch_size(seen)))))


def _train_lines(seen: DataFacts, looked: ModelFacts) -> tuple[list[str], str]:
    fresh = looked.weights == "random"
    epochs = _epochs(seen, _STEPS_FROM_SCRATCH if fresh else _STEPS_OF_FINETUNING)
    rate, why = (0.05, "there are no weights") if fresh else (0.01, "the weights know other classes")
    lines = [
        "  - id: trained",
        f"    kind: train            # {why}",
        f"    epochs: {epochs}",
        f"    batch_size: {_batch_size(seen)}",
        f"    learning_rate: {rate}",
    ]
    if seen.is_unbalanced:
        lines.append("    label_smoothing: 0.1   # classes are uneven; watch the worst class in the report")
    return lines, f"a train stage of {epochs} epochs, since {why}"


def _prune_lines(seen: DataFacts, model: ModelSettings, trained: str | None) -> tuple[list[str], str]:
    teacher = f"{{stage: {trained}}}" if trained else f"{{model: {_flow(model)}}}"
    lines = [
        "  - id: pruned",
        "    kind: prune",
        f"    channel_ratio: {_CHANNEL_RATIO}    # share of the channels to remove; or macs_ratio, latency_ratio",
        "    steps: 2               # in two cuts, finetuned after each",
        "    epochs_between: 2",
        f"    epochs: {_epochs(seen, _STEPS_OF_FINETUNING)}",
        f"    batch_size: {_batch_size(seen)}",
        "    learning_rate: 0.01",
        f"    teacher: {teacher}  # the model before the cut",
    ]
    return lines, f"a prune stage that removes {_CHANNEL_RATIO:.0%} of the channels"


def _int8_lines(seen: DataFacts) -> list[str]:
    samples = min(256, seen.splits["train"])
    return [
        "  - id: int8",
        "    kind: quantize",
        f"    calibration: {{samples: {samples}}}  # images of train that ranges are taken from",
        "    effort: balanced       # fast for a first try; best takes minutes",
    ]


def _gate_lines(seen: DataFacts) -> list[str]:
    lines = ["gates:", "  max_accuracy_drop: 0.02  # a miss ends with exit code 3"]
    if seen.is_unbalanced:
        lines.append("  max_class_accuracy_drop: 0.1  # of the worst class; it counts here, where classes are uneven")
    return lines


def _flow(model: ModelSettings) -> str:
    given: dict[str, Any] = model.model_dump(mode="json", exclude_defaults=True)
    return str(yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=10_000)).strip()


def _scalar(text: str) -> str:
    return str(yaml.safe_dump(text, width=10_000, allow_unicode=True)).splitlines()[0]


def _plain(text: str) -> str:
    """Text that stays within its comment: a class folder may be called anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:120]
