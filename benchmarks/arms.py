"""What the benchmarks of training share: arms and seeds in, one small JSON file each, and a table of what is there.

An arm is a recipe; a seed of it is one run directory under --work, which is kept, so that a run that stopped goes on
where it was, and one JSON file under --results, which is committed. The table is made of whatever files are there, so
arms may be run one after the other, on several days and machines; each file says where and when it was made. Accuracy
is that of the last epoch on the test split (val where there is none); nothing is chosen on it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from edgecompress import pipeline
from edgecompress.machine import describe_machine, summarize_machine, versions

Recipe = Mapping[str, Any]
Result = dict[str, Any]

INT8 = {"kind": "quantize", "id": "int8", "placement": "full", "effort": "fast"}
"""The stage that every run ends with, where int8 is not what the benchmark is about: the quickest."""

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Arm:
    """One row of the table: a recipe, and the id of the stage whose accuracy is the arm's.

    `seeds` is how many seeds it has, where that is not what --seeds says (one teacher for all students, say).
    """

    name: str
    recipe: Recipe
    stage: str
    seeds: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's command line and folders."""

    name: str
    description: str
    parser: argparse.ArgumentParser = field(init=False)

    def __post_init__(self) -> None:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--only", nargs="+", default=[], help="names of the arms to run; the others are only shown")
        parser.add_argument("--table", action="store_true", help="train nothing: print the table of the files there are")
        parser.add_argument("--work", type=Path, default=Path("results"), help="run directories, kept to go on from")
        parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
        object.__setattr__(self, "parser", parser)

    def folder(self, arguments: argparse.Namespace, arm: str, seed: int) -> Path:
        """The run directory of an arm's seed."""
        return Path(arguments.work) / self.name / f"{arm.replace(' ', '-')}-seed{seed}"

    def run(self, arguments: argparse.Namespace, arms: Sequence[Arm]) -> dict[str, list[Result]]:
        """Run what has no JSON file yet, seed by seed, and read all that have one, by arm."""
        for seed in range(arguments.seeds):
            for arm in arms:
                if arguments.table or (arguments.only and arm.name not in arguments.only):
                    continue
                if seed < (arm.seeds or arguments.seeds) and not self._file(arguments, arm.name, seed).is_file():
                    self._run(arguments, arm, seed)
        found: dict[str, list[Result]] = {}
        for arm in arms:
            files = (self._file(arguments, arm.name, seed) for seed in range(arm.seeds or arguments.seeds))
            found[arm.name] = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        return found

    def _file(self, arguments: argparse.Namespace, arm: str, seed: int) -> Path:
        return Path(arguments.results) / self.name / f"{arm.replace(' ', '-')}-seed{seed}.json"

    def _run(self, arguments: argparse.Namespace, arm: Arm, seed: int) -> None:
        folder = self.folder(arguments, arm.name, seed)
        recipe_file = folder.with_suffix(".yaml")
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        # Through JSON, so that what two places share is written out in both.
        document = json.loads(json.dumps({"gates": {"max_accuracy_drop": 1.0}, **arm.recipe, "seed": seed}))
        recipe_file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        outcome = pipeline.apply(str(recipe_file), output=folder, resume=True)
        stages = {stage["id"]: stage for stage in outcome.manifest["stages"] if stage["status"] == "complete"}
        kept = ("accuracy", "accuracy_split", "samples", "params", "macs", "sparsity", "size_bytes", "seconds", "summary")
        result: Result = {
            "benchmark": self.name,
            "arm": arm.name,
            "seed": seed,
            **{key: stages[arm.stage].get(key) for key in kept},
            "stages": {name: {key: stage.get(key) for key in kept} for name, stage in stages.items()},
            "recipe": document,
            "data": outcome.manifest["data"]["fingerprint"],
            "machine": summarize_machine(describe_machine()),
            "versions": versions(),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        file = self._file(arguments, arm.name, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_portable(result, folder.parent), indent=1) + "\n", encoding="utf-8")


def _portable(value: Any, work: Path) -> Any:
    """The same without the path of this machine in it."""
    if isinstance(value, str):
        return value.replace(str(work.resolve()), "WORK").replace(str(work), "WORK")
    if isinstance(value, dict):
        return {key: _portable(item, work) for key, item in value.items()}
    return [_portable(item, work) for item in value] if isinstance(value, list) else value


def stage_accuracy(results: Sequence[Result], stage: str | None = None) -> np.ndarray:
    """Accuracies in %, one a seed: of the arm's own stage, or of another of its run."""
    return np.array([100 * float((r["stages"][stage] if stage else r)["accuracy"]) for r in results])


def spread(values: np.ndarray, digits: int = 2) -> str:
    """`mean (min to max)`, or the one value."""
    if not len(values):
        return "not run"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def paired_points(first: Sequence[Result], second: Sequence[Result]) -> str:
    """Points by which `first` is better than `second`, seed by seed: mean and 95 % interval (Student's t)."""
    shared = sorted({r["seed"] for r in first} & {r["seed"] for r in second})
    by_seed = [{r["seed"]: 100 * float(r["accuracy"]) for r in results} for results in (first, second)]
    return interval(np.array([by_seed[0][seed] - by_seed[1][seed] for seed in shared]))


def interval(differences: np.ndarray) -> str:
    """`mean [low, high]` of paired differences, 95 %; the values themselves where there are too few."""
    if not len(differences):
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.2f} (one seed)"
    reach = _T95[min(len(differences), len(_T95) + 1) - 2] * differences.std(ddof=1) / math.sqrt(len(differences))
    mean = differences.mean()
    return f"{mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}]"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], found: Mapping[str, list[Result]]) -> None:
    """The table, and under it where its figures were made."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=150)
    console.print(table)
    origins = sorted({f"{r['machine']}, {r['made_at'][:10]}" for results in found.values() for r in results})
    for origin in origins:
        console.print(f"made on {origin}")
