"""Int8 against its peers on real weights: the same images for all, each file made in a process of its own.

    python benchmarks/int8.py --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors \
        --data imagenette --class-index class_index.json --other-data birds --json results.json

Rows: ours with every effort of the recipe; onnxruntime's `quantize_static` (uint8 activations, int8 weights per
channel, QDQ, after `quant_pre_process`) with MinMax, Percentile and Entropy, and with reduce_range where the CPU has no
VNNI; NNCF with fast and with full bias correction, where it is installed (`pip install nncf`). Columns: top-1,
agreement with fp32, SQNR of the logits, agreement and SQNR on images of another source (--other-data), latency on
one and two threads against fp32 (medians; ratio with its 95 % interval, interleaved in fresh processes), seconds (of
the clock, and of the CPU, which a busy machine changes less) and peak memory of making the file. ORT's Percentile and
Entropy keep every activation: they get --peer-samples images.
Below the table: the two ceilings (8-bit activations alone, 8-bit weights alone, ranges and rounding of the first of
our rows), the share of the gap to the first that ours closes over the best peer, and PyTorch int8 against ONNX int8.
--model and --checkpoint can be repeated, in pairs. --only takes parts of row names. With --keep a benchmark that was
stopped goes on where it was: delete a file to make its row again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from edgecompress.data.images import SPLIT_NAMES
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit, calibration_indices, open_data
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, Provenance, export_onnx, open_session
from edgecompress.exporting.parity import Logits, sqnr_db, top1_agreement
from edgecompress.int8.conv_kernels import choose_conv_kernels, use_matrix_products
from edgecompress.machine import describe_machine, has_vnni, summarize_machine, versions
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.measure.measuring import measure_latency
from edgecompress.models.checkpoint import example_input
from edgecompress.models.model_building import create_model
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DataSettings, QuantizeStage
from edgecompress.settings.target import load_target

_METHODS = Path(__file__).with_name("int8_methods.py")
_BATCH = 32
# Files measured side by side with fp32 in one process. Few, since processes take turns through every order of them.
_SIDE_BY_SIDE = 4
_OURS = "ours, "


def methods(samples: int, peer_samples: int) -> dict[str, dict[str, Any]]:
    """Every row by its name: which family makes it, with what."""
    rows: dict[str, dict[str, Any]] = {}
    for effort in get_args(QuantizeStage.model_fields["effort"].annotation):
        rows[f"{_OURS}{effort}"] = {"family": "ours", "effort": effort, "samples": samples}
    kept = min(samples, peer_samples)
    for reduce_range in (False,) if has_vnni() else (False, True):
        for method, count in (("MinMax", samples), ("Percentile", kept), ("Entropy", kept)):
            name = f"ORT {method}{' reduce_range' if reduce_range else ''}"
            rows[name] = {"family": "ort", "calibrate_method": method, "reduce_range": reduce_range, "samples": count}
    for fast in (True, False):
        name = f"NNCF {'fast' if fast else 'full'} bias correction"
        rows[name] = {"family": "nncf", "preset": "MIXED", "fast_bias_correction": fast, "samples": samples}
    return rows


def _pixels(split: PreparedSplit, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.concatenate([batch.numpy() for batch, _ in split.batches(_BATCH, indices=torch.from_numpy(indices))])


def _drawn(split: PreparedSplit, count: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).permutation(len(split))[:count])


def _run(path: Path, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Logits:
    session = open_session(path)
    batches: Iterator[torch.Tensor] = (
        preprocessing.normalize(torch.from_numpy(images[start : start + _BATCH]))
        for start in range(0, len(images), _BATCH)
    )
    return np.concatenate([session.run([OUTPUT_NAME], {INPUT_NAME: batch.numpy()})[0] for batch in batches])


def _make(request: dict[str, Any], threads: int) -> dict[str, Any]:
    """Make one file in a fresh process. Raises RuntimeError with the end of what it wrote."""
    pools = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in pools.items()), sys.executable, str(_METHODS)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-5:]) or f"exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _wanted(name: str, parts: list[str] | None) -> bool:
    return parts is None or any(part.lower() in name.lower() for part in parts)


class _Bench:
    """One model: its images, its fp32 file, and the rows made of them."""

    def __init__(self, arguments: argparse.Namespace, name: str, checkpoint: Path | None, folder: Path) -> None:
        self.arguments, self.name, self.folder = arguments, name, folder
        self.target = load_target(arguments.target)
        data_settings = DataSettings(name="image_folder", root=arguments.data, class_index=arguments.class_index)
        model_settings = ModelSettings(name=name, checkpoint=checkpoint)
        data = open_data(data_settings)
        torch.manual_seed(0)
        created = create_model(model_settings, data)
        self.preprocessing = created.architecture.preprocessing
        train = data.splits["train"].prepare(self.preprocessing, cache=False)
        report = data.splits[data.report_split].prepare(self.preprocessing, cache=False)
        chosen = _drawn(report, arguments.images)
        self.labels = report.labels.numpy()[chosen]
        self.images = _pixels(report, chosen)
        self.other = self._other_images()
        calibration = torch.from_numpy(_pixels(train, calibration_indices(train.labels.numpy(), arguments.samples, 0)))
        np.save(folder / "calibration.npy", self.preprocessing.normalize(calibration).numpy())
        np.save(folder / "evaluation.npy", self.images)
        np.save(folder / "latency.npy", self.preprocessing.normalize(torch.from_numpy(self.images[:16])).numpy())
        self.request = {
            "model": json.loads(model_settings.model_dump_json()),
            "data": json.loads(data_settings.model_dump_json()),
            "target": arguments.target,
            "calibration_npy": str(folder / "calibration.npy"),
            "evaluation_npy": str(folder / "evaluation.npy"),
        }
        self.fp32 = folder / "fp32.onnx"
        export_onnx(
            created.module.eval(),
            example_input(created.architecture),
            self.fp32,
            target=self.target,
            preprocessing=self.preprocessing,
            provenance=Provenance((), "benchmark", "", versions()),
            extra_metadata={},
        )
        self.reference = _run(self.fp32, self.images, self.preprocessing)
        self.other_reference = None if self.other is None else _run(self.fp32, self.other, self.preprocessing)
        self.files: dict[str, Path] = {"fp32": self.fp32}
        self.rows: list[dict[str, Any]] = [
            {"name": "fp32", "accuracy": self._accuracy(self.reference), "size_bytes": self.fp32.stat().st_size}
        ]
        # What a kept row was made from and judged on, its method aside.
        names = ("data", "class_index", "other_data", "other_images", "samples", "images", "target")
        self.question = {key: getattr(arguments, key) for key in names} | {"model": name, "checkpoint": checkpoint}
        self.skipped: dict[str, str] = {}
        self.ceilings: dict[str, Any] = {}

    def _other_images(self) -> NDArray[np.uint8] | None:
        if self.arguments.other_data is None:
            return None
        data = open_data(DataSettings(name="image_folder", root=self.arguments.other_data))
        name = next(name for name in reversed(SPLIT_NAMES) if name in data.splits)
        split = data.splits[name].prepare(self.preprocessing, cache=False)
        return _pixels(split, _drawn(split, self.arguments.other_images))

    def _accuracy(self, logits: Logits) -> float:
        return float(np.mean(logits.argmax(axis=1) == self.labels))

    def add(self, name: str, method: dict[str, Any]) -> None:
        """Make and evaluate one row; a method that fails is named with its reason and left out."""
        path = self.folder / f"{name.replace(' ', '_').replace(',', '')}.onnx"
        first_of_ours = method["family"] == "ours" and not self.ceilings
        kept, wanted = path.with_suffix(".json"), json.loads(json.dumps({**self.question, **method}, default=str))
        if kept.is_file() and path.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["question"] == wanted and (found["ceilings"] or not first_of_ours):
                self.ceilings = self.ceilings or found["ceilings"]
                self.files[name] = path
                self.rows.append(found["row"])
                return
        request = {**self.request, **method, "fp32": str(self.fp32), "output": str(path), "ceilings": first_of_ours}
        if method["family"] == "nncf" and importlib.util.find_spec("nncf") is None:
            self.skipped[name] = "nncf is not installed (pip install nncf)"
            return
        try:
            made = _make(request, self.arguments.making_threads)
            logits = _run(path, self.images, self.preprocessing)
        except Exception as error:  # peers raise anything; the other rows must not be lost
            if method["family"] == "ours":
                raise
            self.skipped[name] = f"failed: {str(error).strip().splitlines()[-1]}"
            return
        torch_logits = {key: np.load(file) for key, file in made.pop("logits", {}).items()}
        graph = inspect_integer_graph(path)
        row = {
            "name": name,
            **method,
            **made,
            "accuracy": self._accuracy(logits),
            **self._compared(logits),
            "int8_mac_coverage": graph.int8_mac_coverage,
            "operators": dict(sorted(graph.op_counts.items())),
            "size_bytes": path.stat().st_size,
        }
        if self.other is not None and self.other_reference is not None:
            other = _run(path, self.other, self.preprocessing)
            row["other_agreement"] = top1_agreement(self.other_reference, other)
            row["other_sqnr_db"] = sqnr_db(self.other_reference, other)
        if "simulation" in torch_logits:
            row["torch_int8_agreement"] = top1_agreement(torch_logits["simulation"], logits)
            row["torch_int8_max_abs_diff"] = float(np.abs(torch_logits["simulation"] - logits).max())
        if first_of_ours:
            kinds = ("float weights", "float activations")
            self.ceilings = {kind: {**self._compared(torch_logits[kind]), "ranges_of": name} for kind in kinds}
        self.files[name] = path
        self.rows.append(row)
        answer = {"question": wanted, "row": row, "ceilings": self.ceilings if first_of_ours else {}}
        kept.write_text(json.dumps(answer, default=str), encoding="utf-8")

    def _compared(self, logits: Logits) -> dict[str, float]:
        return {"agreement": top1_agreement(self.reference, logits), "sqnr_db": sqnr_db(self.reference, logits)}

    def measure(self, threads: int) -> None:
        """Latency against fp32, a few files at a time beside it."""
        rows = {row["name"]: row for row in self.rows}
        names = [name for name in self.files if name != "fp32"]
        groups = [names[start : start + _SIDE_BY_SIDE] for start in range(0, len(names), _SIDE_BY_SIDE)]
        key = f"latency_{threads}"
        for group in groups:
            measured = measure_latency(
                {name: self._file_to_time(name) for name in ("fp32", *group)},
                threads=threads,
                providers=self.target.providers,
                input_npy=self.folder / "latency.npy",
                seconds=self.arguments.seconds,
            )
            rows["fp32"].setdefault(key, {"p50_ms": measured.percentile("fp32", 50).value})
            for name in group:
                ratio = measured.ratio("fp32", name)
                rows[name][key] = {
                    "p50_ms": measured.percentile(name, 50).value,
                    "ratio": ratio.ratio,
                    "ci95": [ratio.low, ratio.high],
                    "processes": measured.processes,
                }

    def _file_to_time(self, name: str) -> Path:
        """The row's file; ours with the kernels that `export` chooses, which change no answer, in a copy."""
        path = self.files[name]
        if not name.startswith(_OURS):
            return path
        timed = path.with_suffix(".kernels.onnx")
        if not timed.is_file():
            shutil.copyfile(path, timed)
            chosen = choose_conv_kernels(timed, self.target)
            if chosen is not None:
                Console(stderr=True).print(f"{name}: {chosen.sentence}")
                use_matrix_products(timed, chosen.nodes)
        return timed

    def closed_gap(self) -> dict[str, Any] | None:
        """How much of what lies between the best peer and the activations' ceiling each of our rows closes."""
        peers = [row for row in self.rows if row.get("family") in ("ort", "nncf")]
        if not peers or not self.ceilings:
            return None
        ceiling = self.ceilings["float weights"]
        best = {key: max(row[key] for row in peers) for key in ("agreement", "sqnr_db")}
        shares = {}
        for row in self.rows:
            if row.get("family") == "ours":
                shares[row["name"]] = {
                    key: (row[key] - best[key]) / (ceiling[key] - best[key]) if ceiling[key] > best[key] else None
                    for key in best
                }
        return {"best_peer": best, "shares": shares}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def _latency(entry: dict[str, Any] | None) -> tuple[str, str]:
    if entry is None:
        return "-", "-"
    low, high = entry.get("ci95", (None, None))
    return f"{entry['p50_ms']:.2f}", "-" if low is None else f"{entry['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def show(console: Console, bench: _Bench, threads: list[int]) -> None:
    """The table of one model, and the lines below it."""
    arguments = bench.arguments
    table = Table(title=f"{bench.name}, {len(bench.images)} images, {arguments.samples} calibration images")
    columns = ["", "images", "top-1", "agreement", "SQNR", "other: agreement", "SQNR"]
    for count in threads:
        columns += [f"{count} thread(s), ms", "fp32 / this"]
    for column in (*columns, "int8 MACs", "made in", "of CPU", "peak memory"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in bench.rows:
        latencies = [text for count in threads for text in _latency(row.get(f"latency_{count}"))]
        peak = row.get("peak_rss_bytes")
        table.add_row(
            row["name"],
            str(row.get("samples", "-")),
            _percent(row["accuracy"]),
            _percent(row.get("agreement")),
            _decibel(row.get("sqnr_db")),
            _percent(row.get("other_agreement")),
            _decibel(row.get("other_sqnr_db")),
            *latencies,
            _percent(row.get("int8_mac_coverage")),
            *(f"{row[key]:.1f} s" if key in row else "-" for key in ("seconds", "cpu_seconds")),
            f"{peak / 1e9:.2f} GB" if peak else "-",
        )
    console.print(table)
    for name, reason in bench.skipped.items():
        console.print(f"left out: {name}: {reason}")
    words = {"float weights": "8-bit activations alone", "float activations": "8-bit weights alone"}
    for kind, entry in bench.ceilings.items():
        console.print(
            f"ceiling, {words[kind]} ({kind}; {entry['ranges_of']}): {_percent(entry['agreement'])}, "
            f"{_decibel(entry['sqnr_db'])}"
        )
    gap = bench.closed_gap()
    if gap is not None:
        best = gap["best_peer"]
        console.print(f"best peer: {_percent(best['agreement'])}, {_decibel(best['sqnr_db'])}")
        for name, shares in gap["shares"].items():
            told = ", ".join(
                f"{label} {'the peer is past it' if shares[key] is None else format(shares[key], '.0%')}"
                for key, label in (("agreement", "agreement"), ("sqnr_db", "SQNR in dB"))
            )
            console.print(f"{name}: closes of the gap from the best peer to 8-bit activations alone: {told}")
    for row in bench.rows:
        if "torch_int8_agreement" in row:
            console.print(
                f"{row['name']}: PyTorch int8 against ONNX int8: {_percent(row['torch_int8_agreement'])} of answers, "
                f"largest difference of a logit {row['torch_int8_max_abs_diff']:.3f}; {row['correction']}; "
                f"{row['scheme']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="for instance timm/tf_efficientnet_lite0")
    parser.add_argument("--checkpoint", action="append", type=Path, default=[], help="one for each --model, in order")
    parser.add_argument("--data", type=Path, required=True, help="an image folder with train/ and val/")
    parser.add_argument("--class-index", type=Path)
    parser.add_argument("--other-data", type=Path, help="an image folder of another source; its labels are not used")
    parser.add_argument("--other-images", type=int, default=500, help="images of it, at most")
    parser.add_argument("--samples", type=int, default=128, help="calibration images")
    parser.add_argument("--peer-samples", type=int, default=64, help="the same for methods that keep every activation")
    parser.add_argument("--images", type=int, default=2000, help="images evaluated, at most")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="time for the latency of each group of files; 0: none"
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="thread counts of the latency columns")
    parser.add_argument("--making-threads", type=int, default=0, help="threads of PyTorch while making; 0: its default")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only rows whose name holds one of these")
    parser.add_argument("--json", type=Path, help="also write every number here")
    parser.add_argument("--keep", type=Path, help="keep the files and rows here, and use those that are")
    arguments = parser.parse_args()
    if arguments.checkpoint and len(arguments.checkpoint) != len(arguments.model):
        parser.error("give one --checkpoint for each --model, or none (random weights: only latency means anything)")
    rows = {
        name: method
        for name, method in methods(arguments.samples, arguments.peer_samples).items()
        if _wanted(name, arguments.only)
    }
    if not rows:
        known = ", ".join(methods(arguments.samples, arguments.peer_samples))
        parser.error(f"--only {' '.join(arguments.only)} matches no row; the rows are: {known}")
    checkpoints = arguments.checkpoint or [None] * len(arguments.model)
    console, notes = Console(width=200), Console(stderr=True)
    facts = describe_machine()
    found: list[dict[str, Any]] = []
    for number, (model, checkpoint) in enumerate(zip(arguments.model, checkpoints, strict=True)):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.keep or Path(temporary)) / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            bench = _Bench(arguments, model, checkpoint, folder)
            for name, method in rows.items():
                notes.print(f"{model}: {name}")
                bench.add(name, method)
            threads = arguments.threads if arguments.seconds > 0 else []
            for count in threads:
                notes.print(f"{model}: latency, {count} thread(s)")
                bench.measure(count)
            show(console, bench, threads)
        found.append(
            {"model": model, "rows": bench.rows, "skipped": bench.skipped, "ceilings": bench.ceilings}
            | {"images": len(bench.images), "samples": arguments.samples, "closed_gap": bench.closed_gap()}
        )
        if arguments.json is not None:
            document = {"machine": facts, "versions": versions(), "models": found}
            arguments.json.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    console.print(f"machine: {summarize_machine(facts)}; VNNI: {'yes' if has_vnni() else 'no'}; versions: {versions()}")


if __name__ == "__main__":
    main()
