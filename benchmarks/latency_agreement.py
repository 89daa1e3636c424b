"""Does the tool's latency agree with a plain timing loop? Both in the same run, in turns.

    python benchmarks/latency_agreement.py
    python benchmarks/latency_agreement.py --files model.onnx model.int8.onnx --pairs 12

A plain loop is what anybody would write: one session, twenty inferences to warm up, then the median of so many timed
ones. Each pair starts one process of each kind, in turns of order, with the same file, thread count and random image;
the tool's process is its own measuring process as `profile` starts it. Prints the median of each over the pairs, and
the ratio with its 95 % interval over processes; they agree when the ratio lies within 5 % of 1. Without `--files`,
random MobileNetV2 and ResNet-18 are exported (see int8_latency.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.statistics import hierarchical_bootstrap_ratio

PLAIN_LOOP = """
import json, sys, time
import numpy as np, onnxruntime
path, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
entry = session.get_inputs()[0]
shape = [size if isinstance(size, int) else 1 for size in entry.shape]
feed = {entry.name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
for _ in range(20):
    session.run(None, feed)
times, end = [], time.perf_counter() + seconds
while time.perf_counter() < end or len(times) < 20:
    start = time.perf_counter()
    session.run(None, feed)
    times.append((time.perf_counter() - start) * 1e3)
print(json.dumps(times))
"""


def plain_ms(path: Path, threads: int, seconds: float) -> float:
    """Median of a plain loop in a process of its own."""
    command = [sys.executable, "-c", PLAIN_LOOP, str(path), str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(np.median(json.loads(done.stdout)))


def tool_ms(path: Path, threads: int, seconds: float) -> float:
    """Median of one of the tool's own measuring processes."""
    measured = measure_latency(
        {"model": path},
        threads=threads,
        providers=("CPUExecutionProvider",),
        input_npy=None,
        processes=1,
        seconds=12 * seconds,  # of which one process gets a twelfth
        narrow_enough=float("inf"),
        what=path.name,
    )
    return float(np.median(measured.latencies_ms("model")))


def _random_models(folder: Path) -> list[Path]:
    from int8_latency import create, write_onnx

    from edgecompress.settings.target import load_target

    paths = []
    for name in ("mobilenet_v2", "resnet18"):
        paths.append(folder / f"{name}.onnx")
        write_onnx(create(f"torchvision/{name}"), paths[-1], load_target("x86"))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time that each process measures")
    arguments = parser.parse_args()
    console = Console(width=140)
    table = Table(title=f"batch 1, {arguments.threads} thread(s), {arguments.pairs} pairs of processes")
    for column in ("file", "plain loop, ms", "the tool, ms", "tool / plain loop [95 %]", "within 5 %"):
        table.add_column(column, justify="left" if column == "file" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        for path in arguments.files or _random_models(Path(temporary)):
            kinds = {"plain": plain_ms, "tool": tool_ms}
            medians: dict[str, list[float]] = {kind: [] for kind in kinds}
            for pair in range(arguments.pairs):
                for kind in list(kinds) if pair % 2 == 0 else list(kinds)[::-1]:
                    medians[kind].append(kinds[kind](path, arguments.threads, arguments.seconds))
            pairs = {kind: [np.array([value]) for value in values] for kind, values in medians.items()}
            ratio = hierarchical_bootstrap_ratio(pairs["tool"], pairs["plain"])
            plain, tool = (np.exp(np.mean(np.log(medians[kind]))) for kind in ("plain", "tool"))
            agrees = "yes" if abs(ratio.ratio - 1) < 0.05 else "no"
            cells = f"{plain:.3f}", f"{tool:.3f}", f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", agrees
            table.add_row(path.name, *cells)
    console.print(table)
    console.print(f"machine: {summarize_machine(describe_machine())}")
    console.print(f"versions: {versions()}")


if __name__ == "__main__":
    main()
