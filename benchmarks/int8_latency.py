"""Full int8 against onnxruntime's own `quantize_static`, architecture by architecture: latency first.

    python benchmarks/int8_latency.py
    python benchmarks/int8_latency.py --models torchvision/mobilenet_v3_small --seconds 120 --folder files --details

Weights are random and seeded, batch norm statistics are those of a few batches of the images used, and the images are
smooth random ones: enough for speed and for where the noise of int8 goes, not for accuracy. Prints, for fp32, ours
(full int8, `effort: fast`, min-max ranges) and ORT's (uint8 activations, int8 weights per channel, MinMax, QDQ, after
`quant_pre_process`): latency of one image with the 95 % intervals of the ratios, measured interleaved in fresh
processes; the share of MACs in int8; the SQNR of logits; and how many nodes run on integers, convert, or stay in
float after ONNX Runtime's optimizer. `--folder` keeps the files and uses those that are there already.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, Provenance, export_onnx, open_session
from edgecompress.exporting.parity import sqnr_db
from edgecompress.int8.conv_kernels import choose_conv_kernels, use_matrix_products
from edgecompress.int8.post_training import quantize
from edgecompress.int8.scheme import resolve_scheme
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.integer_graph import IntegerGraph, inspect_integer_graph
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.measuring import measure_latency
from edgecompress.settings.recipe import QuantizeStage
from edgecompress.settings.target import Target, load_target

MODELS = (
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/mobilenet_v3_large",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/regnet_x_400mf",
    "torchvision/regnet_y_400mf",
    "torchvision/mnasnet1_0",
    "torchvision/densenet121",
    "timm/tf_efficientnet_lite0",
    "timm/efficientnet_b0",
    "timm/convnext_atto",
    "timm/deit_tiny_patch16_224",
    "timm/mobilenetv4_conv_small",
    "timm/repvgg_a0",
)
SIZE = 224
BATCH = 8
BATCHES = 4
_MOVERS = {"Reshape", "Flatten", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Gather", "Concat", "MaxPool"}
_CONVERTERS = {"QuantizeLinear", "DequantizeLinear"}


def images(count: int, seed: int) -> Tensor:
    """Normalized images [count, 3, 224, 224]: coarse blobs, finer blobs and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, SIZE, SIZE)
    for cells, strength in ((4, 1.0), (14, 0.6), (56, 0.3), (SIZE, 0.1)):
        blobs = strength * torch.randn(count, 3, cells, cells, generator=generator)
        total += functional.interpolate(blobs, size=SIZE, mode="bilinear")
    return total.clamp(-2.1, 2.6)


def create(name: str) -> nn.Module:
    """The architecture with seeded random weights whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    library, _, architecture = name.partition("/")
    if library == "timm":
        module = timm.create_model(architecture)
    else:
        module = torchvision.models.get_model(architecture, weights=None)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in module.named_parameters():
        if key.endswith("gamma"):  # ConvNeXt starts with blocks switched off; trained ones are on
            nn.init.uniform_(parameter, 0.1, 0.5, generator=generator)
        elif key.endswith("weight") and not bool(parameter.any()):  # mixers start with a head of zeros
            nn.init.normal_(parameter, std=0.02, generator=generator)
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    module.eval()
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, std=0.2, generator=generator)
        norm.momentum = None  # the plain mean over the batches below
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for seed in range(2 if norms else 0):
            module(images(BATCH, 100 + seed))
    module.eval()
    return module if library != "timm" else timm.utils.reparameterize_model(module)


class _Reader(CalibrationDataReader):
    """Calibration images one by one, as quantize_static wants them."""

    def __init__(self) -> None:
        self._images = (
            {INPUT_NAME: image.numpy()} for seed in range(BATCHES) for image in images(BATCH, seed).split(1)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._images, None)


def write_onnx(module: nn.Module, path: Path, target: Target) -> None:
    """Export with fixed facts."""
    preprocessing = Preprocessing(SIZE, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    export_onnx(
        module,
        images(2, 0),
        path,
        target=target,
        preprocessing=preprocessing,
        provenance=Provenance((), "benchmark", "", versions()),
        extra_metadata={},
    )


def write_ours(module: nn.Module, path: Path, target: Target) -> None:
    """Full int8 of ours, rounded to nearest, with min-max ranges."""
    calibration = {"method": "minmax"}  # as the other: what differs is then where int8 goes, not its ranges
    stage = QuantizeStage.model_validate(
        {"kind": "quantize", "id": "int8", "effort": "fast", "calibration": calibration}
    )

    def batches() -> Iterator[Tensor]:
        return (images(BATCH, seed) for seed in range(BATCHES))

    scheme, _ = resolve_scheme(stage, target)
    made = quantize(module, stage=stage, scheme=scheme, calibration=batches, batches=BATCHES, example=images(2, 0))
    write_onnx(made.graph, path, target)
    chosen = choose_conv_kernels(path, target)  # as `export` does
    if chosen is not None:
        Console(stderr=True).print(f"{path.name}: {chosen.sentence}")
        use_matrix_products(path, chosen.nodes)


def _theirs(fp32: Path, path: Path) -> None:
    prepared = path.with_suffix(".prepared.onnx")
    # Its symbolic shape inference stops at some graphs; without it the quantizer infers what it needs itself.
    try:
        quant_pre_process(str(fp32), str(prepared))
    except Exception as error:  # it raises bare exceptions
        Console(stderr=True).print(f"quant_pre_process with symbolic shapes failed on {fp32.name}: {error}")
        quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        _Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def make_files(name: str, folder: Path, target: Target) -> dict[str, Path]:
    """The three files of one architecture; those that are there already stay."""
    stem = re.sub(r"\W", "_", name)
    files = {kind: folder / f"{stem}.{kind}.onnx" for kind in ("fp32", "ours", "ORT")}
    if not all(path.is_file() for path in files.values()):
        module = create(name)
        if not files["fp32"].is_file():
            write_onnx(module, files["fp32"], target)
        if not files["ours"].is_file():
            write_ours(module, files["ours"], target)
        if not files["ORT"].is_file():
            _theirs(files["fp32"], files["ORT"])
    return files


def _nodes(graph: IntegerGraph) -> str:
    others = sum(graph.op_counts.values()) - graph.integer_nodes - graph.quantize_nodes - graph.dequantize_nodes
    moves = sum(count for operator, count in graph.op_counts.items() if operator in _MOVERS)
    return f"{graph.integer_nodes} / {graph.quantize_nodes + graph.dequantize_nodes} / {others - moves}"


def _interval(measured: LatencyMeasurement, slower: str, faster: str) -> str:
    ratio = measured.ratio(slower, faster)
    return f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="LIBRARY/NAME")
    parser.add_argument("--seconds", type=float, default=40.0, help="time for the latency of one architecture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--folder", type=Path, help="where files are kept; a temporary folder otherwise")
    parser.add_argument("--details", action="store_true", help="also the operators of each int8 graph")
    parser.add_argument("--no-latency", action="store_true", help="only make the files and inspect them")
    arguments = parser.parse_args()
    console = Console(width=170)
    target = load_target(arguments.target)
    table = Table(title=f"batch 1, {arguments.threads} thread(s)")
    columns = ("", "fp32 ms", "ORT int8 ms", "ours ms", "ORT int8 / ours", "fp32 / ours")
    for column in (*columns, "MACs in int8: ours, ORT", "SQNR dB: ours, ORT", "nodes: ours", "nodes: ORT"):
        table.add_column(column, justify="left" if column == "" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        held_out = images(2 * BATCH, 50).numpy()
        np.save(folder / "input.npy", held_out)
        for name in arguments.models:
            files = make_files(name, folder, target)
            feeds: dict[str, Any] = {INPUT_NAME: held_out}
            logits = {kind: open_session(path).run([OUTPUT_NAME], feeds)[0] for kind, path in files.items()}
            graphs = {kind: inspect_integer_graph(files[kind]) for kind in ("ours", "ORT")}
            row = ["-"] * 5
            if not arguments.no_latency:
                measured = measure_latency(
                    files,
                    threads=arguments.threads,
                    providers=target.providers,
                    input_npy=folder / "input.npy",
                    seconds=arguments.seconds,
                )
                row = [f"{measured.percentile(kind, 50).value:.2f}" for kind in ("fp32", "ORT", "ours")]
                row += [_interval(measured, slower, "ours") for slower in ("ORT", "fp32")]
            row.append(", ".join(f"{graphs[kind].int8_mac_coverage:.1%}" for kind in ("ours", "ORT")))
            row.append(", ".join(f"{sqnr_db(logits['fp32'], logits[kind]):.1f}" for kind in ("ours", "ORT")))
            table.add_row(name, *row, *(_nodes(graphs[kind]) for kind in ("ours", "ORT")))
            console.print(name, *row)
            if arguments.details:
                for kind, graph in graphs.items():
                    console.print(f"  {kind}: {graph.op_counts}")
    console.print(table)
    console.print("nodes: on integers / converting / in float; ratios above 1 say that ours is faster")
    console.print(f"machine: {summarize_machine(describe_machine())}")
    console.print(f"versions: {versions()}")


if __name__ == "__main__":
    main()
