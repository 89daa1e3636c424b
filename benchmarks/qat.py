"""What int8 costs a trained MobileNetV3-small: after training, and with quantization-aware training.

    python benchmarks/qat.py --set data.name=fashion_mnist --output results
    python benchmarks/qat.py --model timm/mobilenetv3_small_100 --set data.name=image_folder --set data.root=cifar10

The model is trained once from random weights, at the images' own size. From the same weights it is then made int8 by
post-training quantization with each effort, and by a `qat` stage, once for each of --seeds: a seed draws other
calibration images, and another order of training. Accuracy is that of the last epoch on the test split; whether `qat`
keeps what it trained is decided on val. Printed for every int8 model: its points against the float model with their
95 % interval, paired on the images of the test split. Every model leaves a run directory under --output, and a stopped
benchmark goes on where it was. Latency plays no part here: `placement: full`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from edgecompress import pipeline
from edgecompress.data.run_data import open_data
from edgecompress.machine import describe_machine, summarize_machine
from edgecompress.settings.recipe import DataSettings
from edgecompress.training.evaluate import paired_drop_interval

Recipe = dict[str, Any]
Right = torch.Tensor  # whether each image of the test split is answered right, bool [N]

INT8 = "int8"
PLAIN = "post-training, fast"
ARMS = (PLAIN, "post-training, balanced", "post-training, best", "qat")


def recipes(model: str, size: int | None, epochs: int, qat_epochs: int) -> dict[str, Recipe]:
    """The float model's recipe (its int8 stage is the first arm), and those that are given its weights."""
    description: dict[str, Any] = {"name": model}
    if size is not None:
        description["preprocessing"] = {"input_size": size, "crop_fraction": 1.0}
    base = {"model": description, "data": {"name": "fashion_mnist"}, "gates": {"max_accuracy_drop": 1.0}}
    augment = {"horizontal_flip": True, "shift_pixels": 2}
    train = {"kind": "train", "id": "dense", "epochs": epochs, "learning_rate": 0.2, "weight_decay": 1e-4}

    def quantize(effort: str) -> Recipe:
        return {"kind": "quantize", "id": INT8, "placement": "full", "effort": effort}

    qat = {"kind": "qat", "id": INT8, "placement": "full", "epochs": qat_epochs, "batch_size": 128, "augment": augment}
    return {
        "dense": base | {"stages": [train | {"augment": augment}, quantize("fast")]},
        ARMS[1]: base | {"stages": [quantize("balanced")]},
        ARMS[2]: base | {"stages": [quantize("best")]},
        ARMS[3]: base | {"stages": [qat]},
    }


def run(recipe: Recipe, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The manifest of a run in `folder`, complete; nothing is made twice."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return dict(pipeline.apply(str(path), overrides=overrides, output=folder, resume=True).manifest)


def right_answers(manifest: dict[str, Any], folder: Path, stage: str) -> Right:
    """From the logits that the run keeps, so that no model is evaluated twice."""
    data = open_data(DataSettings.model_validate(manifest["recipe"]["data"]))
    logits = torch.from_numpy(np.load(folder / "stages" / stage / "logits.npy"))
    return logits.argmax(dim=1) == torch.from_numpy(data.splits[data.report_split].labels)


def points(dense: Right, int8: Right) -> tuple[float, float, float]:
    """By how much int8 is better, in points: the difference and its 95 % interval."""
    low, high = paired_drop_interval(dense, int8)
    return 100 * float(int8.double().mean() - dense.double().mean()), -100 * high, -100 * low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision/mobilenet_v3_small")
    parser.add_argument("--size", type=int, default=28, help="input side in pixels; 0 for the model's own")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the int8 models")
    parser.add_argument("--dense-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=ARMS[1:])
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch; 0: its default")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--json", type=Path, help="also write every number here")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    made = recipes(arguments.model, arguments.size or None, arguments.epochs, arguments.qat_epochs)
    folder = arguments.output / "dense"
    manifest = run(made["dense"], folder, [f"seed={arguments.dense_seed}", *arguments.overrides])
    dense = right_answers(manifest, folder, "dense")
    accuracy = float(dense.double().mean())
    console = Console(width=140)
    weights = folder / "stages" / "dense" / "model.safetensors"
    found: dict[str, list[dict[str, Any]]] = {PLAIN: []}

    def note(arm: str, seed: int, where: Path, of: dict[str, Any]) -> None:
        right = right_answers(of, where, INT8)
        entry = next(entry for entry in of["stages"] if entry["id"] == INT8)
        gained, low, high = points(dense, right)
        row = {"seed": seed, "accuracy": float(right.double().mean()), "points": gained, "ci95": [low, high]}
        found.setdefault(arm, []).append(row | {"kept_trained": entry.get("qat", {}).get("kept_trained")})
        console.print(f"{arm}, seed {seed}: {gained:+.2f} points [{low:+.2f}, {high:+.2f}]; {entry['summary']}")

    note(PLAIN, arguments.dense_seed, folder, manifest)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            where = arguments.output / f"{arm.replace(', ', '-')}-seed{seed}"
            given = [f"seed={seed}", f"model.checkpoint={weights}", *arguments.overrides]
            note(arm, seed, where, run(made[arm], where, given))
    table = Table(title=f"{arguments.model}: {accuracy:.2%} in float on {len(dense)} test images")
    for column in ("", "accuracy", "points, mean", "each seed, with its paired 95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    for arm, rows in found.items():
        table.add_row(
            arm,
            ", ".join(f"{row['accuracy']:.2%}" for row in rows),
            f"{np.mean([row['points'] for row in rows]):+.2f}",
            ", ".join(f"{row['points']:+.2f} [{row['ci95'][0]:+.2f}, {row['ci95'][1]:+.2f}]" for row in rows),
        )
    console.print(table)
    facts = describe_machine()
    console.print(f"machine: {summarize_machine(facts)}")
    if arguments.json is not None:
        document = {"model": arguments.model, "dense_accuracy": accuracy, "arms": found, "machine": facts}
        arguments.json.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
