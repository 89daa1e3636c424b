"""The search against a hand-made grid of channel ratios and against random search, with the same epochs of training.

    python benchmarks/search.py --seeds 3 --epochs 30 --work work --results benchmarks/results/search.json

On 10,000 images of Fashion-MNIST a small dense network is trained once a seed; every arm then prunes and finetunes it,
with the dense network as teacher, until it has spent --epochs epochs. The grid tries channel ratios at even distances
with everything else as the recipe says; random search draws from the space that `edgecompress search` makes up for this
recipe, and the search chooses in it, giving up early what is hopeless. A trial counts where its training is complete.
The hypervolume is that of accuracy on test and MACs on paper, against the point of ten points less accuracy than the
dense network at all of its MACs, as a share of the area up to a perfect, free network. To compare the choices alone,
trials are neither quantized nor timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table

from edgecompress.data.run_data import open_data
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint
from edgecompress.models.complexity import count_macs
from edgecompress.models.model_building import copy_of
from edgecompress.run_directory import read_json, write_json
from edgecompress.searching.front import Point, hypervolume, pareto_front
from edgecompress.searching.latency_table import LatencyTable
from edgecompress.searching.order import SearchOrder
from edgecompress.searching.search_run import search
from edgecompress.searching.space import Settings, load_space
from edgecompress.searching.trial import Terms, Trial, own_stages
from edgecompress.settings.target import own_target
from edgecompress.steps.apply_run import apply_recipe, start_manifest
from edgecompress.steps.stage_cache import StageCache
from edgecompress.training.evaluate import accuracy, collect_logits
from edgecompress.training.training_loop import EpochRecord

RECIPE = """
name: search_benchmark
data: {name: fashion_mnist, max_train_samples: 10000, val_fraction: 0.04}
model: {name: student_cnn, arguments: {width: 16}, preprocessing: {input_size: 14}}
stages:
  - {id: dense, kind: train, epochs: 8, batch_size: 64, learning_rate: 0.1}
  - {id: pruned, kind: prune, channel_ratio: 0.5, scope: layer, epochs: EPOCHS, batch_size: 64, learning_rate: 0.02,
     warmup_epochs: 0.5, channel_multiple: 2, teacher: {stage: dense}}
"""
FINETUNE_EPOCHS = 3
DROP = 0.10


class Finished(Exception):  # noqa: N818
    """A trial's training is complete: what it came to."""

    def __init__(self, val_accuracy: float, test_accuracy: float, macs: int) -> None:
        super().__init__("finished")
        self.facts = {"accuracy": val_accuracy, "test_accuracy": test_accuracy, "macs": macs}


class BudgetSpent(BaseException):
    """All epochs of an arm are spent."""


class FloatTrial(Trial):
    """A trial that ends with its last epoch, before int8: its accuracies and its MACs."""

    budget = 0
    spent = 0
    finished: ClassVar[dict[int, dict[str, float]]] = {}

    def run(self) -> dict[str, Any]:
        cls = type(self)
        recipe = self.terms.space.recipe_with(self.settings, max_accuracy_drop=DROP)
        epochs = sum(stage.epochs for stage in own_stages(self.terms.space, recipe))
        run = self.terms.run_of(self.number)
        run.write_manifest(
            start_manifest(recipe, source="", overrides=[], targets=[self.terms.target.name], command="benchmark")
        )
        early = self._watch(recipe)
        data = open_data(recipe.data)
        dense: dict[str, float] = {}

        def watch(stage_id: str, record: EpochRecord, checkpoint: Checkpoint) -> None:
            if stage_id != "pruned":
                return
            if cls.spent >= cls.budget:
                raise BudgetSpent
            cls.spent += 1
            early(stage_id, record, checkpoint)
            if record.epoch == epochs:
                dense["accuracy"] = record_of_dense(self.terms, run.path)
                raise Finished(record.val_accuracy, test_accuracy(checkpoint, data), macs_of(checkpoint))

        try:
            apply_recipe(recipe, run, self.terms.target, cache=self.terms.cache, watch=watch)
        except Finished as end:
            facts = end.facts
        cls.finished[self.number] = facts
        nothing: dict[str, Any] = {"latency_ms_p50": None, "size_bytes": 0, "peak_rss_bytes": None, "params": 0}
        return {
            "status": "complete",
            "accuracy_split": "val",
            "accuracy_ci95": [0, 1],
            "baseline_accuracy": dense["accuracy"],
            "reported_accuracy": facts["test_accuracy"],
            "reported_baseline_accuracy": 0.0,
            "reported_split": "test",
            "predicted_latency_ms": None,
            "thoroughness": "none",
            **nothing,
            **facts,
            "cost": float(facts["macs"]),
            "seconds": 0.0,
            "run": self._relative(run),
        } | self.cost_facts()

    def _predicted_cost(self, checkpoint: Checkpoint) -> float:
        return float(macs_of(checkpoint))


def record_of_dense(terms: Terms, run: Path) -> float:
    """The dense network's accuracy on val after its last epoch."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["val_accuracy"] for line in lines if line["stage"] == "dense"][-1])


def macs_of(checkpoint: Checkpoint) -> int:
    return count_macs(copy_of(checkpoint.module).float(), example_input(checkpoint.architecture, batch=1))


def test_accuracy(checkpoint: Checkpoint, data: Any) -> float:
    preprocessing = checkpoint.architecture.preprocessing
    split = data.splits["test"].prepare(preprocessing, cache=False)
    return accuracy(collect_logits(copy_of(checkpoint.module), split, preprocessing), split.labels)


def grid(count: int, start: Settings) -> list[Settings]:
    """Channel ratios at even distances, everything else as in the recipe."""
    ratios = np.linspace(0.1, 0.85, count)
    return [start | {"stages.pruned.channel_ratio": float(f"{ratio:.4g}")} for ratio in ratios]


def randomly(count: int, space: Any, seed: int) -> list[Settings]:
    """Points of the same space, each field drawn evenly (on its own scale)."""
    generator = np.random.default_rng(seed)
    return [{d.path: d.at(float(generator.random())) for d in space.dimensions} for _ in range(count)]


def fixed_arm(points: list[Settings], terms: Terms, cls: type[FloatTrial]) -> None:
    """Every point in full, one after the other."""
    for number, point in enumerate(points):
        cls(number, point, terms, lambda early: None).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30, help="of finetuning, for each arm")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/search.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    recipe = arguments.work / "search_benchmark.yaml"
    recipe.write_text(RECIPE.replace("EPOCHS", str(FINETUNE_EPOCHS)))
    document: dict[str, Any] = read_json(arguments.results) if arguments.results.is_file() else {"rows": []}
    target = own_target()
    count = arguments.epochs // FINETUNE_EPOCHS
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for arm in ("grid", "random", "search"):
            if any(
                row["seed"] == seed and row["arm"] == arm and row["epochs"] == arguments.epochs
                for row in document["rows"]
            ):
                continue
            folder = arguments.work / f"seed{seed}-{arm}"
            cache = arguments.work / f"cache{seed}"
            overrides = (f"seed={seed}",)
            space = load_space(str(recipe), overrides)
            cls = type("ArmTrial", (FloatTrial,), {"budget": arguments.epochs, "spent": 0, "finished": {}})
            started = time.monotonic()
            if arm == "search":
                order = SearchOrder(
                    source=str(recipe),
                    overrides=overrides,
                    target=target,
                    max_accuracy_drop=DROP,
                    minimize="latency",
                    trials=10 * count,
                    seconds=None,
                    storage=None,
                    cache=cache,
                    warm_starts=(),
                    command="benchmarks/search.py",
                )
                with contextlib.suppress(BudgetSpent):
                    search(order, folder, resume=True, make_trial=cls)
            else:
                terms = Terms(
                    space,
                    folder,
                    target,
                    "latency",
                    DROP,
                    StageCache(cache),
                    LatencyTable.open(folder / "t", target),
                    "",
                )
                points = grid(count, space.start()) if arm == "grid" else randomly(count, space, seed)
                fixed_arm(points, terms, cls)
            dense = load_checkpoint(next(folder.glob("trials/*/stages/dense")))
            data = open_data(space.recipe_with(space.start()).data)
            row = {
                "seed": seed,
                "arm": arm,
                "epochs": arguments.epochs,
                "epochs_spent": cls.spent,
                "dense_test_accuracy": test_accuracy(dense, data),
                "dense_macs": macs_of(dense),
                "complete": len(cls.finished),
                "points": list(cls.finished.values()),
                "seconds": time.monotonic() - started,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": summarize_machine(describe_machine()),
                "versions": versions(),
            }
            document["rows"].append(row | {"hypervolume": area_of(row)})
            document["recipe"] = recipe.read_text()
            write_json(arguments.results, document)
            print_table(document)


def area_of(row: dict[str, Any]) -> float:
    """Hypervolume of an arm's complete trials, as a share of the area up to a perfect network without MACs."""
    worst = row["dense_test_accuracy"] - DROP
    points = [Point(n, p["test_accuracy"], p["macs"] / row["dense_macs"]) for n, p in enumerate(row["points"])]
    return hypervolume(points, worst_accuracy=worst, worst_cost=1.0) / (1 - worst)


def print_table(document: dict[str, Any]) -> None:
    table = Table(title="hypervolume of test accuracy and MACs (more is better)")
    for column in ("arm", "seeds", "mean", "each", "complete trials", "on the front"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in ("grid", "random", "search"):
        rows = [row for row in document["rows"] if row["arm"] == arm]
        if not rows:
            continue
        areas = [row["hypervolume"] for row in rows]
        fronts = [
            len(pareto_front([Point(n, p["test_accuracy"], p["macs"]) for n, p in enumerate(row["points"])]))
            for row in rows
        ]
        table.add_row(
            arm,
            str(len(rows)),
            f"{np.mean(areas):.4f}",
            ", ".join(f"{area:.4f}" for area in areas),
            ", ".join(str(row["complete"]) for row in rows),
            ", ".join(str(front) for front in fronts),
        )
    console = Console(width=120)
    console.print(table)
    for machine in sorted({row["machine"] for row in document["rows"]}):
        console.print(machine)


if __name__ == "__main__":
    main()
