#!/usr/bin/env python3
"""Measure the models of this bundle on this device, in the same way as `edgecompress profile` does.

    python3 bench.py                        # prints a table and writes bench.json
    python3 bench.py --seconds 60
    python3 bench.py --answers kept.jsonl   # goes on where an attempt with the same file was cut off

What enters: the bundle's folder, which is the one that this file stands in. What leaves: bench.json with every latency
as it was measured, which `edgecompress profile RUN --target T --results bench.json` judges. Needs Python 3.9 or newer,
numpy and onnxruntime. The measuring is the tool's own, unchanged (edgecompress/measure/measuring.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime as ort
except ImportError as missing:
    raise SystemExit(
        f"error: {missing}; this script needs numpy and onnxruntime: {sys.executable} -m pip install numpy onnxruntime"
    ) from missing

if __name__ == "__main__":
    # The folder stays as it was made, for edgecompress verify.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

from edgecompress import console
from edgecompress.errors import EdgeCompressError
from edgecompress.machine import describe_machine, summarize_machine
from edgecompress.measure.answers import Answers
from edgecompress.measure.latencies import FreshMeasurement, LatencyMeasurement
from edgecompress.measure.measuring import STANDARD, THOROUGHNESS, measure_fresh, measure_latency

Json = dict[str, Any]
KIND = "edgecompress bench"
SCHEMA_VERSION = 1
DEFAULT_SECONDS = 20.0


def measure_bundle(
    folder: Path,
    *,
    seconds: float,
    thoroughness: str = STANDARD,
    threads: int | None = None,
    answers: Answers | None = None,
) -> Json:
    """Measure every model of a bundle; returns the content of bench.json. Raises BundleError and ProfileError."""
    infer = _infer()
    manifest = infer.read_manifest(folder)
    how: Json = {"threads": threads or manifest["measuring"]["threads"]}
    how["providers"] = manifest["measuring"]["providers"]
    how["session"] = manifest["measuring"]["session"]
    absent = [name for name in how["providers"] if name not in ort.get_available_providers()]
    if absent:
        raise infer.BundleError(
            f"onnxruntime {ort.__version__} has no {', '.join(absent)} here; install a build with it"
        )
    paths = {name: folder / model["file"] for name, model in manifest["models"].items()}
    lost = [str(path) for path in paths.values() if not path.is_file()]
    if lost:
        raise infer.BundleError(f"{lost[0]}: is missing; copy the whole bundle to the device")
    with tempfile.TemporaryDirectory(prefix="edgecompress-bench-") as scratch:
        images = Path(scratch) / "input.npy"
        np.save(images, _images(folder, manifest))
        how |= {"input_npy": images, "answers": answers}
        fresh = {name: measure_fresh(path, **how) for name, path in paths.items()}
        preset = THOROUGHNESS[thoroughness]
        how |= {"narrow_enough": preset.narrow_enough, "processes": preset.processes}
        latency = measure_latency(paths, seconds=seconds, **how)
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "bundle": {key: manifest[key] for key in ("name", "target", "recipe")},
        "models": {name: {"file": path.name, "sha256": _sha256(path)} for name, path in paths.items()},
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "onnxruntime": ort.__version__},
        "providers_available": list(ort.get_available_providers()),
        "threads": how["threads"],
        "providers": how["providers"],
        "session": how["session"],
        "seconds": seconds,
        "thoroughness": thoroughness,
        "fresh": {name: asdict(measured) for name, measured in fresh.items()},
        "latency": latency.to_dict(),
    }


def _infer() -> Any:
    """infer.py: beside this file in a bundle, in the same package where the tool itself runs it."""
    if __package__:
        from edgecompress.device import infer
    else:
        import infer  # type: ignore[import-not-found,no-redef]
    return infer


def _images(folder: Path, manifest: Json) -> np.ndarray[Any, Any]:
    """The stored images of the models' own size, as the models read them."""
    infer = _infer()
    classifier = infer.Classifier(folder, "fp32", threads=1)
    size, channels = manifest["preprocessing"]["input_size"], manifest["preprocessing"]["channels"]
    images = [infer.read_image(folder / sample["image"], channels) for sample in manifest["self_test"]["samples"]]
    chosen = [image for image in images if image.shape == (size, size, channels)]
    return np.concatenate([classifier.model_input(image, prepared=True) for image in chosen])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(results: Json) -> str:
    """The results for people, one row a quantity and one column a model."""
    latency = LatencyMeasurement.from_dict(results["latency"])
    fresh = {name: FreshMeasurement(**row) for name, row in results["fresh"].items()}
    names = list(results["models"])
    percentiles = {name: {p: latency.percentile(name, p) for p in (50, 90, 99)} for name in names}
    rows = [["", *names]]
    for percentile, label in ((50, "latency, median"), (90, "latency, 90th percentile"), (99, "99th percentile")):
        found = [percentiles[name][percentile] for name in names]
        rows.append([label, *(f"{one.value:.3g} ms [{one.low:.3g}, {one.high:.3g}]" for one in found)])
    rows.append(["throughput", *(f"{1000 / latency.latencies_ms(name).mean():,.0f}/s" for name in names)])
    rows.append(["load time", *(f"{fresh[name].load_ms:.3g} ms" for name in names)])
    rows.append(["first inference", *(f"{fresh[name].first_inference_ms:.3g} ms" for name in names)])
    peaks = (fresh[name].peak_rss_bytes for name in names)
    rows.append(["peak memory", *("not known here" if peak is None else f"{peak / 1e6:.1f} MB" for peak in peaks)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]  # noqa: B905
    if {"fp32", "int8"} <= set(names):
        ratio = latency.ratio("fp32", "int8")
        lines.append(
            f"fp32 takes {ratio.ratio:.2f} times as long as int8 (95 % interval {ratio.low:.2f} to {ratio.high:.2f})"
        )
    lines.append(
        f"{summarize_machine(results['machine'])}, onnxruntime {results['versions']['onnxruntime']}, "
        f"{results['threads']} thread{'' if results['threads'] == 1 else 's'}; {latency.processes} processes, "
        f"{latency.steady_processes} of them steady after their warm-up; stopped because {latency.stopped_because}"
    )
    return "\n".join(lines)


def _keep_in(path: Path) -> tuple[list[Json], Callable[[Json], None]]:
    """Answers that a file holds, and a function that adds one. A last line that was cut off is left out."""
    rows: list[Json] = []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    rows = [json.loads(line) for line in whole.splitlines()]
    if whole != text:
        path.write_text(whole, encoding="utf-8")

    def keep(row: Json) -> None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    return rows, keep


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the models of this bundle on this device.")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="time to spend on latency (default: 20)")
    presets = sorted(THOROUGHNESS)
    parser.add_argument("--thoroughness", choices=presets, default=STANDARD, help="how narrow the intervals must be")
    parser.add_argument("--threads", type=int, help="threads of one inference (default: the target's)")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="file to write (default: bench.json)")
    parser.add_argument("--answers", type=Path, help="file that keeps every answer, to go on after an interruption")
    parser.add_argument("--stream", action="store_true", help="write answers and result to stdout, a line of JSON each")
    return parser


def main() -> int:
    """Parse the arguments, measure, print. Returns the exit code: 0, 1 when measuring failed, 2 for bad input."""
    parser = _parser()
    arguments = parser.parse_args()
    if not 0 < arguments.seconds < float("inf") or (arguments.threads is not None and arguments.threads < 1):
        parser.error("--seconds must be a positive number, and --threads 1 or more")
    console.set_quiet(True)  # its bars need a library that the device has no use for
    folder = Path(__file__).resolve().parent
    known, keep = ([], None) if arguments.answers is None else _keep_in(arguments.answers)
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8") if arguments.stream else sys.stderr

    def report(row: Json) -> None:
        if keep is not None:
            keep(row)
        reply.write(json.dumps({"answer": row}) + "\n" if arguments.stream else ".")
        reply.flush()

    if not arguments.stream:
        print(
            f"measuring for about {arguments.seconds:.0f} s, a dot for each process: ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    try:
        answers = Answers(known, keep=report)
        results = measure_bundle(
            folder,
            seconds=arguments.seconds,
            thoroughness=arguments.thoroughness,
            threads=arguments.threads,
            answers=answers,
        )
    except (EdgeCompressError, _infer().BundleError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    if arguments.stream:
        reply.write(json.dumps({"results": results}) + "\n")
        reply.flush()
        return 0
    print(file=sys.stderr)
    arguments.output.write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(table(results))
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
