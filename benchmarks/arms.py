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
import re
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

_KEPT = ("accuracy", "accuracy_split", "samples", "params", "macs", "sparsity", "size_bytes", "seconds", "summary")

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
        parser.add_argument(
            "--table", action="store_true", help="train nothing: print the table of the files there are"
        )
        parser.add_argument("--work", type=Path, default=Path("results"), help="run directories, kept to go on from")
        parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
        object.__setattr__(self, "parser", parser)

    def run(self, arguments: argparse.Namespace, arms: Sequence[Arm]) -> dict[str, list[Result]]:
        """Run what has no JSON file yet, seed by seed, and read all that have one, by arm."""
        runs = _Runs(self.name, arguments, {arm.name: arm for arm in arms})
        for seed in range(arguments.seeds):
            for arm in arms:
                if not arguments.table and (not arguments.only or arm.name in arguments.only):
                    runs.ensure_result(arm, seed)
        return {arm.name: runs.results(arm) for arm in arms}

    def run_directory(self, arguments: argparse.Namespace, arms: Sequence[Arm], arm: Arm, seed: int) -> Path:
        """Where an arm's run is, made where it is not there yet."""
        runs = _Runs(self.name, arguments, {other.name: other for other in arms})
        runs.apply(arm, seed)
        return runs.folder(arm, seed)


@dataclass(frozen=True)
class _Runs:
    """The runs of one command: an arm may start from the weights of another, written `@arm/stage` in its recipe."""

    benchmark: str
    arguments: argparse.Namespace
    arms: Mapping[str, Arm]

    def folder(self, arm: Arm, seed: int) -> Path:
        return Path(self.arguments.work) / self.benchmark / f"{_slug(arm.name)}-seed{seed}"

    def _file(self, arm: Arm, seed: int) -> Path:
        return Path(self.arguments.results) / self.benchmark / f"{_slug(arm.name)}-seed{seed}.json"

    def _seeds(self, arm: Arm) -> int:
        return min(arm.seeds or self.arguments.seeds, self.arguments.seeds)

    def results(self, arm: Arm) -> list[Result]:
        found = []
        for seed in range(self._seeds(arm)):
            file = self._file(arm, seed)
            if not file.is_file():
                continue
            result = json.loads(file.read_text(encoding="utf-8"))
            if result["recipe"] != self._recorded(arm, seed):
                raise SystemExit(f"{file}: made with other settings; give those, or another folder by --results")
            found.append(result)
        return found

    def _recorded(self, arm: Arm, seed: int) -> Any:
        return json.loads(json.dumps(_without_paths({**arm.recipe, "seed": seed})))

    def apply(self, arm: Arm, seed: int) -> Any:
        """The manifest of an arm's run, complete; nothing is trained twice."""
        folder = self.folder(arm, seed)
        recipe_file = folder.parent / f"{folder.name}.yaml"
        recipe_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"gates": {"max_accuracy_drop": 1.0}, **arm.recipe, "seed": seed}
        # Through JSON, so that what two places share is written out in both.
        resolved = json.loads(json.dumps(self._resolve(document, seed)))
        recipe_file.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        return pipeline.apply(str(recipe_file), output=folder, resume=True).manifest

    def _resolve(self, value: Any, seed: int) -> Any:
        if isinstance(value, Mapping):
            return {key: self._resolve(item, seed) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._resolve(item, seed) for item in value]
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        name, _, stage = value[1:].partition("/")
        other = self.arms[name]
        its_seed = min(seed, self._seeds(other) - 1)
        self.ensure_result(other, its_seed)
        self.apply(other, its_seed)
        return str(self.folder(other, its_seed) / "stages" / stage / "model.safetensors")

    def ensure_result(self, arm: Arm, seed: int) -> None:
        if seed >= self._seeds(arm) or self._file(arm, seed).is_file():
            return
        manifest = self.apply(arm, seed)
        stages = {stage["id"]: stage for stage in manifest["stages"] if stage["status"] == "complete"}
        result: Result = {
            "benchmark": self.benchmark,
            "arm": arm.name,
            "seed": seed,
            **{key: stages[arm.stage].get(key) for key in _KEPT},
            "stages": {name: {key: stage.get(key) for key in _KEPT} for name, stage in stages.items()},
            "recipe": self._recorded(arm, seed),
            "data": manifest["data"]["fingerprint"],
            "machine": summarize_machine(describe_machine()),
            "versions": versions(),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        file = self._file(arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def _without_paths(value: Any) -> Any:
    """The recipe without the folders of a machine: of a path, its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    file, colon, function = value.partition(":")  # a model of one's own is file.py:function
    return Path(file).name + colon + function if Path(file).exists() else value


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


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], found: Mapping[str, list[Result]]
) -> None:
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
