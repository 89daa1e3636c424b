"""Whether the intervals of `profile` keep their word: the same files measured again and again.

    edgecompress run int8_ptq --target x86 --output runs/twenty ...
    python benchmarks/profile_repeatability.py results --run runs/twenty --target x86

Twenty times the ratio fp32 / int8, each time as `profile` measures it, and twenty times fp32 against itself, in turn.
The 95 % interval must hold the ratio pooled over all runs in at least 17 of 20 (fewer happen in 1.6 % of cases where
the rate is truly 95 %), and the file must be called different from itself at most twice (more often: 7.5 %).

Each measurement leaves one small JSON in the folder given, and those that are there are not made again: a benchmark
that was stopped (or told to stop by --most-seconds) goes on where it was. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.measuring import measure_latency
from edgecompress.run_directory import write_json
from edgecompress.settings.target import Target, load_target

KINDS = {"pair": "int8 against fp32", "same": "fp32 against itself"}
LEAST_HELD, MOST_ALARMS = 17, 2


def measure(kind: str, fp32: Path, int8: Path, target: Target, seconds: float) -> dict[str, Any]:
    """One measurement as `profile` makes it; the second file is fp32 again for kind `same`."""
    measured = measure_latency(
        {"fp32": fp32, "int8": int8 if kind == "pair" else fp32},
        threads=target.threads,
        providers=target.providers,
        input_npy=None,
        seconds=seconds,
        session=target.session_settings(),
    )
    ratio = measured.ratio("fp32", "int8")
    return {
        "kind": kind,
        "ratio": ratio.ratio,
        "ci95": [ratio.low, ratio.high],
        "log_ratio_of_processes": process_ratios(measured),
        "processes": measured.processes,
        "windows": measured.windows,
        "steady_processes": measured.steady_processes,
        "reference_ms": [float(np.median(loop)) for loop in measured.reference_ms],
        "fp32_ms": measured.percentile("fp32", 50).value,
        "seconds": measured.seconds,
        "stopped_because": measured.stopped_because,
        "at": time.time(),
    }


def process_ratios(measured: LatencyMeasurement) -> list[float]:
    """Log of the ratio in each process: what the interval is made of, to be looked at when it fails."""
    medians = measured.window_medians_ms
    pairs = zip(medians["fp32"], medians["int8"], strict=True)
    return [float(np.median(np.log(first / second))) for first, second in pairs]


def read(folder: Path, kind: str, runs: int) -> list[dict[str, Any]]:
    paths = [folder / f"{kind}-{index:02d}.json" for index in range(runs)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def report(folder: Path, runs: int, console: Console) -> bool:
    """Print the tables; returns whether both bars are met by complete sets."""
    met = True
    for kind, label in KINDS.items():
        found = read(folder, kind, runs)
        if not found:
            met = False
            continue
        pooled = math.exp(float(np.mean([math.log(one["ratio"]) for one in found])))
        wanted = pooled if kind == "pair" else 1.0
        table = Table(title=f"{label}: {len(found)} of {runs} measurements, pooled ratio {pooled:.4f}")
        for heading in ("run", "ratio", "95 % interval", "holds", "processes", "steady", "fp32", "time"):
            table.add_column(heading, justify="right", no_wrap=True)
        held = 0
        for index, one in enumerate(found):
            low, high = one["ci95"]
            holds = low <= wanted <= high
            held += holds
            cells = [f"{one['ratio']:.4f}", f"{low:.4f} to {high:.4f}", "yes" if holds else "NO", f"{one['processes']}"]
            cells += [f"{one['steady_processes']}", f"{one['fp32_ms']:.2f} ms", f"{one['seconds']:.1f} s"]
            table.add_row(str(index + 1), *cells)
        console.print(table)
        widths = [(one["ci95"][1] - one["ci95"][0]) / 2 / one["ratio"] for one in found]
        spread = float(np.std([math.log(one["ratio"]) for one in found], ddof=1)) if len(found) > 1 else math.nan
        width = 100 * float(np.median(widths))
        console.print(f"median half-width {width:.1f} %; ratios of whole runs spread by {100 * spread:.1f} %")
        if kind == "pair":
            bar = held >= LEAST_HELD
            console.print(f"the interval held the pooled ratio in {held} of {len(found)} (bar: {LEAST_HELD} of {runs})")
        else:
            bar = len(found) - held <= MOST_ALARMS
            console.print(f"called different from itself {len(found) - held} times (bar: at most {MOST_ALARMS})")
        met = met and bar and len(found) == runs
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where each measurement leaves its JSON")
    parser.add_argument("--run", type=Path, help="run directory with an exported int8 file")
    parser.add_argument("--fp32", type=Path, help="instead of --run: the fp32 file")
    parser.add_argument("--int8", type=Path, help="and the int8 file")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--seconds", type=float, default=8.0, help="time allowed for each measurement")
    parser.add_argument("--runs", type=int, default=20, help="measurements of each kind")
    parser.add_argument("--most-seconds", type=float, default=math.inf, help="begin no measurement after this")
    arguments = parser.parse_args()
    fp32 = arguments.fp32 or (arguments.run and arguments.run / "export" / "model.onnx")
    int8 = arguments.int8 or (arguments.run and arguments.run / "export" / "model.int8.onnx")
    if fp32 is None or int8 is None:
        parser.error("give --run, or --fp32 and --int8")
    target = load_target(arguments.target)
    started = time.monotonic()
    for index in range(arguments.runs):
        for kind in KINDS:
            path = arguments.folder / f"{kind}-{index:02d}.json"
            if not path.is_file() and time.monotonic() - started < arguments.most_seconds:
                write_json(path, measure(kind, fp32, int8, target, arguments.seconds))
    console = Console(highlight=False, width=110)
    console.print(f"{summarize_machine(describe_machine())}; onnxruntime {versions().get('onnxruntime')}")
    return 0 if report(arguments.folder, arguments.runs, console) else 1


if __name__ == "__main__":
    sys.exit(main())
