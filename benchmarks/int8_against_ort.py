"""Ours against onnxruntime's own `quantize_static`: same model, same images, same process, same clock.

    python benchmarks/int8_against_ort.py --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors \
        --data imagenette --class-index class_index.json

Prints, for fp32, ours (fast and balanced) and ORT's (uint8 activations, int8 weights per channel, MinMax; with 8-bit
weights and with reduce_range): top-1, agreement with fp32, logit SQNR, the integer nodes after ORT's optimizer, latency
with intervals, and seconds spent. The rows are measured interleaved in the same processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

from edgecompress.checkpoint import Checkpoint, example_input
from edgecompress.data import PreparedSplit, calibration_indices, open_data
from edgecompress.export import INPUT_NAME, Provenance, export_onnx
from edgecompress.int8.post_training import quantize
from edgecompress.int8.scheme import resolve_scheme
from edgecompress.integer_graph import inspect_integer_graph
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measuring import measure_latency
from edgecompress.models import create_model
from edgecompress.parity import run_onnx, sqnr_db, top1_agreement
from edgecompress.preprocessing import Preprocessing
from edgecompress.recipe import DataSettings, ModelSettings, QuantizeStage
from edgecompress.target import load_target


class _Reader(CalibrationDataReader):
    """Calibration images one by one, as quantize_static wants them."""

    def __init__(self, split: PreparedSplit, preprocessing: Preprocessing, indices: torch.Tensor) -> None:
        batches = split.batches(1, indices=indices)
        self._images = ({INPUT_NAME: preprocessing.normalize(images).numpy()} for images, _ in batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._images, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="for instance timm/tf_efficientnet_lite0")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="an image folder with train/ and val/")
    parser.add_argument("--class-index", type=Path)
    parser.add_argument("--samples", type=int, default=128, help="calibration images")
    parser.add_argument("--images", type=int, default=2000, help="images evaluated, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for latency")
    parser.add_argument("--target", default="x86")
    arguments = parser.parse_args()

    data = open_data(DataSettings(name="image_folder", root=arguments.data, class_index=arguments.class_index))
    torch.manual_seed(0)
    created = create_model(ModelSettings(name=arguments.model, checkpoint=arguments.checkpoint), data)
    architecture = created.architecture
    preprocessing = architecture.preprocessing
    train = data.splits["train"].prepare(preprocessing, cache=False)
    report = data.splits[data.report_split].prepare(preprocessing, cache=True)
    chosen = np.sort(np.random.default_rng(0).permutation(len(report))[: arguments.images])
    labels = report.labels.numpy()[chosen]
    indices = torch.from_numpy(calibration_indices(train.labels.numpy(), arguments.samples, 0))
    target = load_target(arguments.target)
    module = created.module.eval().to(memory_format=torch.channels_last)
    checkpoint = Checkpoint(module, architecture)
    example = example_input(architecture)

    def batches() -> Iterator[torch.Tensor]:
        for images, _ in train.batches(32, indices=indices):
            yield preprocessing.normalize(images).contiguous(memory_format=torch.channels_last)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files: dict[str, Path] = {"fp32": root / "fp32.onnx"}
        seconds: dict[str, float] = {"fp32": 0.0}
        provenance = Provenance((), "benchmark", "", versions())

        def write(model: torch.nn.Module, path: Path) -> None:
            export_onnx(
                model,
                example,
                path,
                target=target,
                preprocessing=preprocessing,
                provenance=provenance,
                extra_metadata={},
            )

        write(checkpoint.module, files["fp32"])
        for effort in ("fast", "balanced"):
            stage = QuantizeStage.model_validate({"kind": "quantize", "id": "int8", "effort": effort})
            scheme, why = resolve_scheme(stage, target)
            started = time.perf_counter()
            quantized = quantize(
                checkpoint.module,
                stage=stage,
                scheme=scheme,
                calibration=batches,
                batches=-(-len(indices) // 32),
                example=example,
            )
            name = f"ours, {effort}"
            seconds[name] = time.perf_counter() - started
            files[name] = root / f"ours_{effort}.onnx"
            write(quantized.graph, files[name])
        prepared = root / "prepared.onnx"
        quant_pre_process(str(files["fp32"]), str(prepared))
        for name, reduce_range in (("ORT static, 8-bit weights", False), ("ORT static, reduce_range", True)):
            started = time.perf_counter()
            files[name] = root / f"ort_{int(reduce_range)}.onnx"
            quantize_static(
                str(prepared),
                str(files[name]),
                _Reader(train, preprocessing, indices),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            seconds[name] = time.perf_counter() - started

        logits = {name: run_onnx(path, report, preprocessing, chosen) for name, path in files.items()}
        images = next(iter(report.batches(16)))[0]
        sample = root / "input.npy"
        np.save(sample, preprocessing.normalize(images).numpy())
        measured = measure_latency(
            files,
            threads=target.threads,
            providers=target.providers,
            input_npy=sample,
            seconds=arguments.seconds,
        )
        table = Table(title=f"{arguments.model}, {len(chosen)} images, {arguments.samples} calibration images")
        for column in ("", "top-1", "agreement", "SQNR", "p50 ms", "fp32 / this", "MACs in int8", "made in"):
            table.add_column(column, justify="left" if column == "" else "right")
        reference = logits["fp32"]
        console = Console(width=140)
        for name, path in files.items():
            ratio = measured.ratio("fp32", name) if name != "fp32" else None
            graph = inspect_integer_graph(path)
            table.add_row(
                name,
                f"{float(np.mean(logits[name].argmax(1) == labels)):.2%}",
                f"{top1_agreement(reference, logits[name]):.2%}",
                "-" if ratio is None else f"{sqnr_db(reference, logits[name]):.1f} dB",
                f"{measured.percentile(name, 50).value:.2f}",
                "-" if ratio is None else f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                f"{graph.int8_mac_coverage:.1%}",
                f"{seconds[name]:.0f} s",
            )
        console.print(table)
        ours, theirs = "ours, balanced", "ORT static, 8-bit weights"
        pair = measured.ratio(theirs, ours)
        console.print(f"latency, ORT's file over ours: {pair.ratio:.3f} [{pair.low:.3f}, {pair.high:.3f}]")
        for name in (ours, theirs):
            console.print(f"{name}: {dict(sorted(inspect_integer_graph(files[name]).op_counts.items()))}")
        console.print(f"int8 scheme of ours: {scheme.to_dict()} ({why})")
        console.print(f"machine: {summarize_machine(describe_machine())}; {measured.processes} processes")
        console.print(f"versions: {versions()}")


if __name__ == "__main__":
    main()
