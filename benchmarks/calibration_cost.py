"""What calibration costs: time against plain fp32 forward passes, and peak memory, of a ResNet-50.

    python benchmarks/calibration_cost.py
    python benchmarks/calibration_cost.py --samples 64 --methods percentile --ort-samples 0

Weights are random and seeded; images are synthetic, made batch by batch. Each method runs in processes of its own:
`quantize` with `effort: fast`, from capture to converted graph. In the first the float module sees every batch right
before the observers do, so that both passes meet the same disturbances of the machine; the second calibrates alone, for
its peak memory. Printed: the seconds of either pass (making images, capture and conversion left out), the median over
the batches of their ratio with its quartiles, the ratio of the CPU seconds (on a busy machine the one to trust), the
seconds of all of `quantize` without the float passes, and the peak.
ONNX Runtime's calibrater gets the exported fp32 model, its own forward passes as the measure, and fewer images: it
keeps every activation. With `--alone` only the second of our processes runs: peak memory, no ratio. `--bar` makes the
script fail where a method of ours misses the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.measure_worker import _peak_rss_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

Spent = tuple[float, float]  # seconds of the clock, and of all threads on a CPU

MODEL = "torchvision/resnet50"
SIZE = 224
METHODS = ("minmax", "percentile", "entropy", "mse")
MAX_RATIO = 1.5
MAX_PEAK_BYTES = 1.5e9


def synthetic(count: int, seed: int) -> Tensor:
    """Normalized images [count, 3, 224, 224] in channels-last order: coarse blobs, finer ones and a little noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    total = 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    for cells, strength in ((4, 1.0), (14, 0.6)):
        blobs = strength * torch.randn(count, 3, cells, cells, generator=generator)
        total += torch.nn.functional.interpolate(blobs, size=SIZE, mode="bilinear")
    return total.contiguous(memory_format=torch.channels_last)


def sizes(samples: int, batch_size: int) -> list[int]:
    """The images of each batch."""
    return [min(batch_size, samples - start) for start in range(0, samples, batch_size)]


def create() -> nn.Module:
    """The float model, in eval mode."""
    import torch
    import torchvision

    torch.manual_seed(0)
    module: nn.Module = torchvision.models.get_model(MODEL.partition("/")[2], weights=None)
    return module.eval()


def run_float(request: dict[str, Any]) -> dict[str, Any]:
    """Plain forward passes alone: the memory that they take without any calibration."""
    import torch

    module, seconds = create(), []
    with torch.no_grad():
        for number, count in enumerate(sizes(request["samples"], request["batch_size"])):
            seconds.append(_pass(module, synthetic(count, number)))
    return {"forward": seconds, "peak_rss_bytes": _peak_rss_bytes()}


def run_ours(request: dict[str, Any]) -> dict[str, Any]:
    """One method through `quantize`; with `interleaved`, the float module's pass before each of its batches."""
    import torch

    from edgecompress.int8.post_training import quantize
    from edgecompress.int8.scheme import Scheme
    from edgecompress.settings.recipe import QuantizeStage

    counts = sizes(request["samples"], request["batch_size"])
    calibration = {"method": request["method"], "samples": request["samples"], "batch_size": request["batch_size"]}
    stage = QuantizeStage.model_validate(
        {"kind": "quantize", "id": "int8", "effort": "fast", "placement": "full", "calibration": calibration}
    )
    module = create()
    forward: list[Spent] = []
    observed: list[Spent] = []
    aside = 0.0  # what quantize waits for: images and float passes

    def batches() -> Iterator[Tensor]:
        nonlocal aside
        for number, count in enumerate(counts):
            begun = time.perf_counter()
            images = synthetic(count, number)
            if request["interleaved"]:
                forward.append(_pass(module, images))
            aside += time.perf_counter() - begun
            clock = _clock()
            yield images
            observed.append(_since(clock))

    started = time.perf_counter()
    model = quantize(
        module,
        stage=stage,
        scheme=Scheme("uint8", 8),
        calibration=batches,
        batches=len(counts),
        example=torch.zeros(2, 3, SIZE, SIZE),
    )
    return {
        "forward": forward,
        "observed": observed,
        "total_seconds": time.perf_counter() - started - aside,
        "tensors": None if model.calibration is None else model.calibration.tensors,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def export(request: dict[str, Any]) -> dict[str, Any]:
    """Write the float model as ONNX, in a process of its own so that the peak of this one counts nowhere."""
    import torch

    from edgecompress.data.preprocessing import Preprocessing
    from edgecompress.exporting.onnx_export import Provenance, export_onnx
    from edgecompress.settings.target import load_target

    export_onnx(
        create(),
        torch.zeros(2, 3, SIZE, SIZE),
        Path(request["fp32"]),
        target=load_target("x86"),
        preprocessing=Preprocessing(input_size=SIZE, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3),
        provenance=Provenance((), "benchmark", "", versions()),
        extra_metadata={},
    )
    return {}


def run_ort(request: dict[str, Any]) -> dict[str, Any]:
    """ONNX Runtime's calibrater, as `quantize_static` sets it up; the images, one by one, come from an array file."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry

    images = np.load(request["images"], mmap_mode="r")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = ({"input": np.array(image[None])} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    session = onnxruntime.InferenceSession(request["fp32"], options, providers=["CPUExecutionProvider"])
    clock = _clock()
    for image in images:
        session.run(None, {"input": np.array(image[None])})
    forward = _since(clock)
    del session
    clock = _clock()
    calibrater = create_calibrator(
        request["fp32"],
        list(QDQRegistry),
        augmented_model_path=str(Path(request["fp32"]).with_suffix(".augmented.onnx")),
        calibrate_method=CalibrationMethod[request["method"]],
        extra_options={"symmetric": False},
    )
    calibrater.collect_data(Reader())
    ranges = calibrater.compute_data()
    observed = _since(clock)
    return {
        "forward": [forward],
        "observed": [observed],
        "total_seconds": observed[0],
        "tensors": len(ranges.data),
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _clock() -> Spent:
    return time.perf_counter(), time.process_time()


def _since(clock: Spent) -> Spent:
    now = _clock()
    return now[0] - clock[0], now[1] - clock[1]


def _pass(module: nn.Module, images: Tensor) -> Spent:
    import torch

    clock = _clock()
    with torch.no_grad():
        module(images)
    return _since(clock)


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "float": run_float,
    "ours": run_ours,
    "export": export,
    "ort": run_ort,
}


def fresh(job: str, threads: int, **request: Any) -> dict[str, Any]:
    """Run a job in a process of its own. Raises RuntimeError with the end of what it wrote."""
    pool = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    text = json.dumps({"job": job, "threads": threads, **request})
    command = [sys.executable, __file__, "--job", text]
    done = subprocess.run(command, env={**os.environ, **pool}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-5:]) or f"exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def summary(name: str, samples: int, answer: dict[str, Any]) -> dict[str, Any]:
    """One row: sums over the pass, and the ratio's median and quartiles over the batches."""
    row = {"name": name, "samples": samples, "forward_seconds": sum(wall for wall, _ in answer["forward"])} | {
        key: answer.get(key) for key in ("total_seconds", "tensors", "peak_rss_bytes")
    }
    if answer.get("observed") and answer["forward"]:
        ratios = np.array(answer["observed"]) / np.array(answer["forward"])  # [batches, clock and CPU]
        low, middle, high = (float(ratio) for ratio in np.percentile(ratios[:, 0], [25, 50, 75]))
        row |= {"seconds": sum(wall for wall, _ in answer["observed"]), "ratio": middle, "ratio_quartiles": [low, high]}
        row |= {"cpu_ratio": float(np.median(ratios[:, 1]))}
    return row


def ort_row(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The peer, with the export and the images made outside of its process."""
    fp32, images = folder / "fp32.onnx", folder / "images.npy"
    fresh("export", arguments.threads, fp32=str(fp32))
    array = np.lib.format.open_memmap(images, mode="w+", dtype=np.float32, shape=(arguments.ort_samples, 3, SIZE, SIZE))
    done = 0
    for number, count in enumerate(sizes(arguments.ort_samples, arguments.batch_size)):
        array[done : done + count] = synthetic(count, number).numpy()
        done += count
    array.flush()
    request = {"fp32": str(fp32), "images": str(images), "method": arguments.ort_method}
    answer = fresh("ort", arguments.threads, **request)
    return summary(f"ONNX Runtime, {arguments.ort_method}", arguments.ort_samples, answer)


def show(console: Console, rows: list[dict[str, Any]], batch_size: int) -> None:
    table = Table(title=f"{MODEL}, {SIZE} x {SIZE}, batches of {batch_size}")
    columns = (
        "",
        "images",
        "tensors",
        "fp32 forward",
        "calibration pass",
        "ratio",
        "quartiles",
        "CPU",
        "all",
        "peak memory",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        quartiles = row.get("ratio_quartiles")
        table.add_row(
            row["name"],
            str(row["samples"]),
            str(row["tensors"] or "-"),
            f"{row['forward_seconds']:.1f} s" if row["forward_seconds"] else "-",
            f"{row['seconds']:.1f} s" if quartiles else "-",
            f"{row['ratio']:.2f}" if quartiles else "-",
            f"{quartiles[0]:.2f} to {quartiles[1]:.2f}" if quartiles else "-",
            f"{row['cpu_ratio']:.2f}" if quartiles else "-",
            f"{row['total_seconds']:.1f} s" if row["total_seconds"] else "-",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="calibration images of ours")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ort-samples", type=int, default=64, help="the same of ONNX Runtime; 0: leave it out")
    parser.add_argument("--ort-method", choices=["MinMax", "Percentile", "Entropy"], default="Percentile")
    parser.add_argument("--threads", type=int, default=0, help="threads of every process; 0: their default")
    parser.add_argument("--json", type=Path, help="also write every number here")
    parser.add_argument("--alone", action="store_true", help="peak memory only: no float passes, no ratio")
    parser.add_argument("--bar", action="store_true", help=f"fail above {MAX_RATIO} forward passes or 1.5 GB")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        request = json.loads(arguments.job)
        print(json.dumps(JOBS[request["job"]](request)))
        return
    console, notes = Console(width=160), Console(stderr=True)
    common = {"samples": arguments.samples, "batch_size": arguments.batch_size}
    rows = []
    if not arguments.alone:
        notes.print("fp32 forward")
        rows = [summary("fp32 forward alone", arguments.samples, fresh("float", arguments.threads, **common))]
    ours = []
    for method in arguments.methods:
        notes.print(method)
        alone = fresh("ours", arguments.threads, method=method, interleaved=False, **common)
        answer = alone
        if not arguments.alone:
            answer = fresh("ours", arguments.threads, method=method, interleaved=True, **common)
            answer["peak_rss_bytes"] = alone["peak_rss_bytes"]
        ours.append(summary(f"ours, {method}", arguments.samples, answer))
    rows += ours
    if arguments.ort_samples:
        notes.print(f"ONNX Runtime, {arguments.ort_method}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(ort_row(arguments, Path(folder)))
            except RuntimeError as error:  # the rows above must not be lost
                notes.print(f"left out: {str(error).splitlines()[-1]}")
    show(console, rows, arguments.batch_size)
    facts = describe_machine()
    console.print(f"machine: {summarize_machine(facts)}; threads: {arguments.threads or 'default'}; {versions()}")
    if arguments.json is not None:
        document = {"machine": facts, "versions": versions(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    missed = [
        row["name"] for row in ours if row.get("ratio", 0.0) > MAX_RATIO or row["peak_rss_bytes"] > MAX_PEAK_BYTES
    ]
    if arguments.bar and missed:
        sys.exit(f"above {MAX_RATIO} forward passes or {MAX_PEAK_BYTES / 1e9} GB: {', '.join(missed)}")


if __name__ == "__main__":
    main()
