"""What a recipe costs and buys over several seeds: mean and spread of accuracy, MACs and bytes.

    python benchmarks/recipe_seeds.py --recipe prune_kd --seeds 3 --output results

Each seed is a run directory under --output and is kept, so a stopped benchmark goes on where it was. Accuracy is that
of the last epoch on the test split; nothing is chosen on test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from edgecompress import pipeline
from edgecompress.machine import describe_machine, summarize_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="prune_kd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()

    stages: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        outcome = pipeline.apply(
            arguments.recipe,
            overrides=[f"seed={seed}", *arguments.overrides],
            output=arguments.output / f"{Path(arguments.recipe).stem}-seed{seed}",
            resume=True,
        )
        for stage in outcome.manifest["stages"]:
            stages.setdefault(stage["id"], []).append(stage)

    first = next(iter(stages.values()))
    baseline = np.array([stage["accuracy"] for stage in first])
    table = Table(
        title=f"{arguments.recipe}, {arguments.seeds} seeds, {first[0]['samples']} {first[0]['accuracy_split']} images"
    )
    for column in ("stage", "accuracy, mean", "min to max", "points against first, mean (each)", "MACs", "size"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, entries in stages.items():
        accuracies = np.array([entry["accuracy"] for entry in entries])
        points = 100 * (accuracies - baseline)
        table.add_row(
            name,
            f"{accuracies.mean():.2%}",
            f"{accuracies.min():.2%} to {accuracies.max():.2%}",
            f"{points.mean():+.2f} ({', '.join(f'{value:+.2f}' for value in points)})",
            f"{entries[0]['macs'] / first[0]['macs']:.1%}",
            f"{entries[0]['size_bytes'] / first[0]['size_bytes']:.1%}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"machine: {summarize_machine(describe_machine())}")


if __name__ == "__main__":
    main()
