"""The chain: a dense net, its distilled student, that student pruned, and in int8. What each step costs and buys.

    python benchmarks/chain.py
    python benchmarks/chain.py --table --latency --work results

The recipe is the shipped `chain`, once a seed. --latency exports seed 0 (the distilled student by a recipe that starts
from its weights) and measures all four files in ONNX Runtime, interleaved in the same processes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from arms import INT8, Arm, Benchmark, Result, interval, print_table, spread, stage_accuracy

from edgecompress import pipeline
from edgecompress.machine import describe_machine, summarize_machine
from edgecompress.measure.measuring import measure_latency
from edgecompress.settings.recipe import find_recipe
from edgecompress.settings.target import own_target

STEPS = ("dense", "distilled", "pruned", "int8")


def arms_of(arguments: argparse.Namespace) -> list[Arm]:
    """The shipped recipe, and one that takes its distilled student as it is, to be exported."""
    document = yaml.safe_load(find_recipe("chain").read_text(encoding="utf-8"))
    recipe: dict[str, Any] = {key: document[key] for key in ("data", "model", "stages")}
    if arguments.root:
        recipe["data"] = {**recipe["data"], "root": str(arguments.root)}
    student = next(stage["model"] for stage in recipe["stages"] if stage["id"] == "distilled")
    alone = {"data": recipe["data"], "model": {**student, "checkpoint": "@chain/distilled"}, "stages": [INT8]}
    return [Arm("chain", recipe, stage="int8"), Arm("distilled alone", alone, stage="int8", seeds=1)]


def measure(benchmark: Benchmark, arguments: argparse.Namespace, arms: list[Arm]) -> None:
    """Latency and size of seed 0's four files, into latency.json."""
    target = own_target()
    chain, alone = (benchmark.run_directory(arguments, arms, arm, 0) for arm in arms)
    if not (chain / "export" / "model.int8.onnx").is_file():
        pipeline.export(chain, target=target.name, int8=True)
    if not (alone / "export" / "model.onnx").is_file():
        pipeline.export(alone, target=target.name)
    files = {
        "dense": chain / "export" / "baseline.onnx",
        "distilled": alone / "export" / "model.onnx",
        "pruned": chain / "export" / "model.onnx",
        "int8": chain / "export" / "model.int8.onnx",
    }
    size = arms[0].recipe["model"]["preprocessing"]["input_size"]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "input.npy"
        np.save(images, np.random.default_rng(0).normal(size=(8, 1, size, size)).astype(np.float32))
        measured = measure_latency(
            files, threads=1, providers=target.providers, input_npy=images, seconds=arguments.seconds
        )
    ratios = {name: measured.ratio("dense", name) for name in STEPS[1:]}
    document = {
        "latency_ms": {name: measured.percentile(name, 50).value for name in STEPS},
        "speedup": {name: {"ratio": r.ratio, "ci95": [r.low, r.high]} for name, r in ratios.items()},
        "onnx_bytes": {name: file.stat().st_size for name, file in files.items()},
        "processes": measured.processes,
        "machine": summarize_machine(describe_machine()),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    latency_file(arguments).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def latency_file(arguments: argparse.Namespace) -> Path:
    """Where the measured latencies are kept."""
    return Path(arguments.results) / "chain" / "latency.json"


def row(step: str, results: list[Result], measured: dict[str, Any]) -> tuple[str, ...]:
    """One step's row; its accuracy against the dense net's, seed by seed."""
    accuracy, dense = stage_accuracy(results, step), stage_accuracy(results, "dense")
    facts = [result["stages"][step] for result in results]
    faster = measured.get("speedup", {}).get(step)
    latency, size = (measured.get(key, {}).get(step) for key in ("latency_ms", "onnx_bytes"))
    return (
        step,
        spread(accuracy),
        "" if step == "dense" else interval(accuracy - dense),
        f"{np.mean([fact['params'] for fact in facts]):,.0f}",
        f"{np.mean([fact['macs'] for fact in facts]) / 1e6:.2f} M",
        f"{size:,}" if size else "",
        f"{measured['onnx_bytes']['dense'] / size:.1f}" if size else "",
        f"{latency:.4f} ms" if latency else "",
        f"{faster['ratio']:.2f} [{faster['ci95'][0]:.2f}, {faster['ci95'][1]:.2f}]" if faster else "",
    )


def main() -> None:
    benchmark = Benchmark("chain", __doc__ or "")
    benchmark.parser.add_argument("--root", type=Path, help="folder of the idx files")
    benchmark.parser.add_argument("--latency", action="store_true", help="measure too; best on an idle machine")
    benchmark.parser.add_argument("--seconds", type=float, default=60.0, help="time for measuring")
    arguments = benchmark.parser.parse_args()
    arms = arms_of(arguments)
    found = benchmark.run(arguments, arms)
    if arguments.latency:
        measure(benchmark, arguments, arms)
    file = latency_file(arguments)
    measured = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    results = found["chain"]
    if not results:
        raise SystemExit("no results yet; run without --table")
    print_table(
        f"The chain: test accuracy in %, last epoch, mean (min to max) over {len(results)} seed(s); files of seed 0",
        ("step", "accuracy", "points against dense, paired [95 %]", "params", "MACs", "bytes of the ONNX file")
        + ("dense bytes / its", "latency, median", "dense latency / its [95 %]"),
        [row(step, results, measured) for step in STEPS],
        found,
    )


if __name__ == "__main__":
    main()
