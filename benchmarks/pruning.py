"""What pruning costs and buys: channels against one-shot L1 with the same budget, and single weights by iterations.

    python benchmarks/pruning.py
    python benchmarks/pruning.py --data image_folder --root cifar10 --size 32 --shift-pixels 2 --train-samples 0 \\
        --finetune-samples 0 --epochs 160 --finetune-epochs 100 --results results/cifar
    python benchmarks/pruning.py --table --latency --work results

Each seed trains its own dense net; every other arm of the seed starts from it and finetunes for the same number of
epochs on the same share of its images, without augmentation, as one does with a checkpoint and few images at hand.
`dense, finetuned` cuts nothing: what those epochs alone are worth. `ours` cuts channels in steps and finetunes
with the dense net as teacher; `L1` cuts once, the same share in every layer, and finetunes on the labels; `L1, taught`
is that with the teacher, so that the two parts of the difference can be told apart. `sparse` zeroes weights in steps
(global L1), with the teacher. --latency exports seed 0 of every structured arm and measures it in ONNX Runtime beside
its dense net.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from arms import INT8, Arm, Benchmark, Result, paired_points, print_table, spread, stage_accuracy

from edgecompress import pipeline
from edgecompress.machine import describe_machine, summarize_machine
from edgecompress.measure.measuring import measure_latency
from edgecompress.settings.target import own_target

STRUCTURED = {"2.1x": 2.1, "4x": 4.0}
SPARSE = {"sparse 58 %": 0.58, "sparse 90 %": 0.90}


def arms_of(arguments: argparse.Namespace) -> list[Arm]:
    """The dense net, then ours and L1 at each MACs ratio, then the sparse ones."""
    model: dict[str, Any] = {
        "name": arguments.model,
        "arguments": {"width": arguments.width},
        "preprocessing": {"input_size": arguments.size, "crop_fraction": 1.0},
    }
    data: dict[str, Any] = {"name": arguments.data, "val_fraction": 0.02}
    if arguments.root:
        data["root"] = str(arguments.root)
    if arguments.train_samples:
        data["max_train_samples"] = arguments.train_samples
    augment = {"horizontal_flip": True, "shift_pixels": arguments.shift_pixels}
    training = {"batch_size": 128, "learning_rate": 0.1, "augment": augment}
    dense = {"kind": "train", "id": "dense", "epochs": arguments.epochs, **training}
    arms = [Arm("dense", {"data": data, "model": model, "stages": [dense, INT8]}, stage="dense")]

    few = {**data, "max_train_samples": arguments.finetune_samples} if arguments.finetune_samples else data
    trained = {**model, "checkpoint": "@dense/dense"}
    teacher = {"model": trained, "method": "kd", "temperature": arguments.temperature, "alpha": arguments.alpha}
    total = arguments.finetune_epochs
    finetuning = {"batch_size": 64, "warmup_epochs": 0, "learning_rate": arguments.finetune_learning_rate}
    longer = {"kind": "train", "id": "finetuned", "epochs": total, **finetuning}
    arms.append(Arm("dense, finetuned", {"data": few, "model": trained, "stages": [longer, INT8]}, stage="finetuned"))

    def pruned(name: str, *, steps: int, **settings: Any) -> Arm:
        # The same total for everyone: an iterative schedule pays for its epochs between the steps.
        between = 0 if steps == 1 else total // (2 * steps)
        stage = {
            "kind": "prune",
            "id": "pruned",
            "steps": steps,
            "epochs_between": between,
            "epochs": total - between * (steps - 1),
            **finetuning,
            **settings,
        }
        return Arm(name, {"data": few, "model": trained, "stages": [stage, INT8]}, stage="pruned")

    for name, ratio in STRUCTURED.items():
        cut = {"macs_ratio": 1.0 - 1.0 / ratio, "channel_multiple": arguments.channel_multiple}
        ranking = {"scope": arguments.scope, "importance": arguments.importance}
        arms.append(pruned(f"ours {name}", steps=arguments.steps, teacher=teacher, **ranking, **cut))
        arms.append(pruned(f"L1 {name}", steps=1, scope="layer", importance="l1", **cut))
        arms.append(pruned(f"L1 {name}, taught", steps=1, scope="layer", importance="l1", teacher=teacher, **cut))
    for name, sparsity in SPARSE.items():
        arms.append(
            pruned(name, steps=arguments.sparse_steps, method="unstructured", sparsity=sparsity, teacher=teacher)
        )
    return arms


def measure(
    benchmark: Benchmark, arguments: argparse.Namespace, arms: list[Arm], found: Mapping[str, list[Result]]
) -> None:
    """Speed in ONNX Runtime of seed 0's structured arms that ran, interleaved with the dense net, into latency.json."""
    files: dict[str, Path] = {}
    target = own_target()
    for arm in arms:
        if arm.name == "dense" or (arm.name.startswith(("ours", "L1")) and found[arm.name]):
            run = benchmark.run_directory(arguments, arms, arm, 0)
            exported = run / "export" / "model.onnx"
            if not exported.is_file():
                pipeline.export(run, target=target.name)
            files[arm.name] = exported
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "input.npy"
        channels = 1 if arguments.data == "fashion_mnist" else 3
        shape = (8, channels, arguments.size, arguments.size)
        np.save(images, np.random.default_rng(0).normal(size=shape).astype(np.float32))
        measured = measure_latency(
            files, threads=1, providers=target.providers, input_npy=images, seconds=arguments.seconds
        )
    ratios = {name: measured.ratio("dense", name) for name in files if name != "dense"}
    document = {
        "dense_ms": measured.percentile("dense", 50).value,
        "speedup": {name: {"ratio": r.ratio, "ci95": [r.low, r.high]} for name, r in ratios.items()},
        "processes": measured.processes,
        "machine": summarize_machine(describe_machine()),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    latency_file(arguments).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def latency_file(arguments: argparse.Namespace) -> Path:
    """Where the measured speedups are kept."""
    return Path(arguments.results) / "pruning" / "latency.json"


def main() -> None:
    benchmark = Benchmark("pruning", __doc__ or "")
    parser = benchmark.parser
    parser.add_argument("--data", default="fashion_mnist", help="a source of the package; image_folder needs --root")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--size", type=int, default=14, help="side of the images in px")
    parser.add_argument("--train-samples", type=int, default=10_000, help="training images of the dense net; 0: all")
    parser.add_argument("--finetune-samples", type=int, default=4000, help="of all other arms; 0: as many as dense")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--finetune-epochs", type=int, default=15)
    parser.add_argument("--finetune-learning-rate", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=3, help="cuts of channels of ours")
    parser.add_argument("--sparse-steps", type=int, default=4, help="iterations of the sparse arms")
    parser.add_argument("--scope", default="global")
    parser.add_argument("--importance", default="magnitude")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the teacher's term")
    parser.add_argument("--shift-pixels", type=int, default=1)
    parser.add_argument("--channel-multiple", type=int, default=4)
    parser.add_argument("--latency", action="store_true", help="measure the speed too; best on an idle machine")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for measuring")
    arguments = parser.parse_args()
    arms = arms_of(arguments)
    found = benchmark.run(arguments, arms)
    if arguments.latency:
        measure(benchmark, arguments, arms, found)
    file = latency_file(arguments)
    speedups = json.loads(file.read_text(encoding="utf-8"))["speedup"] if file.is_file() else {}

    dense = found["dense"]
    rows = []
    for arm in arms:
        results = found[arm.name]
        faster = speedups.get(arm.name)
        rival = found.get(arm.name.replace("ours", "L1")) if arm.name.startswith("ours") else None
        macs = [r["macs"] for r in results if arm.name != "dense"]
        rows.append(
            (
                arm.name,
                spread(stage_accuracy(results)),
                paired_points(results, dense) if arm.name != "dense" else "",
                paired_points(results, rival) if rival is not None else "",
                f"{dense[0]['macs'] / np.mean(macs):.2f}" if macs and dense else "",
                f"{faster['ratio']:.2f} [{faster['ci95'][0]:.2f}, {faster['ci95'][1]:.2f}]" if faster else "",
                f"{results[0]['sparsity']:.1%}" if results else "",
                str(len(results)),
            )
        )
    print_table(
        f"Pruning, {arguments.model} on {arguments.data}: test accuracy in %, last epoch, mean (min to max) over seeds",
        (
            "arm",
            "accuracy",
            "points against dense, paired [95 %]",
            "points against L1, paired [95 %]",
            "dense MACs / its",
            "dense latency / its, seed 0 [95 %]",
            "zeros",
            "seeds",
        ),
        rows,
        found,
    )


if __name__ == "__main__":
    main()
