"""Linear layers in int8: static scales against dynamic ones, against 8-bit weights alone, and attention in int8.

    python benchmarks/int8_linear.py
    python benchmarks/int8_linear.py --models timm/deit_tiny_patch16_224 --threads 2 --seconds 120

All files of a model come from one static int8 model of ours (`effort: fast`, min-max ranges), so they hold the same
int8 weights (MatMulNBits apart, whose scales are per block):

- static: what `edgecompress` exports. Linear layers run as QGemm and give floats.
- dynamic: each linear layer's activation scale is found at run time (DynamicQuantizeLinear, MatMulInteger), which ONNX
  Runtime fuses to DynamicQuantizeMatMul. The scale belongs to the whole batch.
- weights, DQ: 8-bit weights per channel, DequantizeLinear and a float MatMul, which ONNX Runtime turns to MatMulNBits.
- weights, NBits: MatMulNBits by onnxruntime's own tool, blocks of 32, computing in float (l0) or int8 (l4).
- attention: the static file with both products of two activations on integers as well (MatMulIntegerToFloat).

Weights and images are random and seeded, as in int8_latency.py: enough for speed, size and for the noise of rounding,
not for accuracy. Prints latency of one image with the 95 % intervals of the ratios, file size, SQNR of logits, and by
how much an image's logits differ between batch 1 and a batch of 16, as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
from int8_latency import BATCH, BATCHES, create, images, write_onnx, write_ours
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from rich.console import Console
from rich.table import Table

from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, open_session
from edgecompress.exporting.onnx_rewrite import GraphIndex
from edgecompress.exporting.parity import sqnr_db
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.measure.measuring import measure_latency
from edgecompress.settings.target import load_target

MODELS = ("timm/deit_tiny_patch16_224", "timm/mixer_s32_224", "timm/resmlp_12_224")
_BLOCK = 32


class _Rewriter:
    """A graph whose nodes are replaced one by one, in order."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        self.graph = self.model.graph
        self.index = GraphIndex(self.graph)
        self._made = 0

    def constant(self, name: str) -> NDArray[np.float32] | NDArray[np.int8]:
        value = self.index.constant(name)
        if value is None:
            raise SystemExit(f"{name} is no constant; the export has changed")
        return value

    def add(self, value: NDArray[np.generic]) -> str:
        self._made += 1
        name = f"int8_linear_{self._made}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def replace(self, node: NodeProto, nodes: list[NodeProto]) -> None:
        position = next(i for i, other in enumerate(self.graph.node) if other is node)
        del self.graph.node[position]
        for new in reversed(nodes):
            self.graph.node.insert(position, new)

    def linears(self) -> list[NodeProto]:
        """The linear layers that read a float tensor's integers and give floats."""
        found = []
        for node in [node for node in self.graph.node if node.op_type == "Gemm"]:
            reader = self.index.only_consumer(node.output[0])
            if reader is None or reader.op_type != "QuantizeLinear":
                found.append(node)
        return found

    def float_source(self, node: NodeProto) -> str:
        """What the quantize-dequantize pair in front of a layer rounds."""
        dequantize = self.index.producer[node.input[0]]
        quantize = self.index.producer[dequantize.input[0]]
        while quantize.op_type in ("Reshape", "Transpose", "Flatten"):
            quantize = self.index.producer[quantize.input[0]]
        if quantize.op_type != "QuantizeLinear":
            raise SystemExit(f"{node.name}: reads {quantize.op_type}, no quantized float")
        return str(quantize.input[0])

    def weights(self, node: NodeProto) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
        """Int8 weights [in, out], their scales [out], and the bias in float."""
        weight, bias = self.index.producer[node.input[1]], self.index.producer[node.input[2]]
        values = self.constant(bias.input[0]).astype(np.float32) * self.constant(bias.input[1])
        integers = np.ascontiguousarray(self.constant(weight.input[0]).T)
        return integers, self.constant(weight.input[1]).astype(np.float32), values

    def save(self, path: Path) -> None:
        """Write what is still read; drops layers of quantize and dequantize nodes that nobody reads any more."""
        outputs = {value.name for value in self.graph.output}
        while True:
            read = {name for node in self.graph.node for name in node.input} | outputs
            dead = [node for node in self.graph.node if not read.intersection(node.output)]
            if not dead:
                break
            for node in dead:
                self.graph.node.remove(node)
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in read]:
            self.graph.initializer.remove(tensor)
        onnx.save(self.model, str(path))


def write_dynamic(static: Path, path: Path) -> None:
    """Linear layers whose activation scale is found at run time; everything else as in the static file."""
    file = _Rewriter(static)
    for node in file.linears():
        source, output = file.float_source(node), node.output[0]
        integers, scales, bias = file.weights(node)
        flat = [f"{output}_{name}" for name in ("x", "q", "s", "z", "sums", "float", "scale", "scaled")]
        x, q, s, z, sums, as_float, scale, scaled = flat
        shape = file.add(np.array([-1, len(integers)], np.int64))
        file.replace(
            node,
            [
                helper.make_node("Reshape", [source, shape], [x]),
                helper.make_node("DynamicQuantizeLinear", [x], [q, s, z]),
                helper.make_node(
                    "MatMulInteger", [q, file.add(integers), z, file.add(np.zeros(len(scales), np.int8))], [sums]
                ),
                helper.make_node("Cast", [sums], [as_float], to=onnx.TensorProto.FLOAT),
                helper.make_node("Mul", [s, file.add(scales)], [scale]),
                helper.make_node("Mul", [as_float, scale], [scaled]),
                helper.make_node("Add", [scaled, file.add(bias)], [output]),
            ],
        )
    file.save(path)


def write_dequantized_weights(static: Path, path: Path) -> None:
    """Linear layers with 8-bit weights and float activations."""
    file = _Rewriter(static)
    for node in file.linears():
        source, output = file.float_source(node), node.output[0]
        integers, scales, bias = file.weights(node)
        x, weight, product = (f"{output}_{name}" for name in ("x", "weight", "product"))
        inputs = [file.add(integers), file.add(scales), file.add(np.zeros(len(scales), np.int8))]
        file.replace(
            node,
            [
                helper.make_node("Reshape", [source, file.add(np.array([-1, len(integers)], np.int64))], [x]),
                helper.make_node("DequantizeLinear", inputs, [weight], axis=1),
                helper.make_node("MatMul", [x, weight], [product]),
                helper.make_node("Add", [product, file.add(bias)], [output]),
            ],
        )
    file.save(path)


def write_blocks(fp32: Path, path: Path, accuracy_level: int) -> None:
    """MatMulNBits with 8 bits, by onnxruntime's own tool, which takes MatMul alone."""
    file = _Rewriter(fp32)
    for node in [node for node in file.graph.node if node.op_type == "Gemm"]:
        weight = file.add(np.ascontiguousarray(file.constant(node.input[1]).T))
        has_bias = len(node.input) > 2
        product = f"{node.output[0]}_product" if has_bias else node.output[0]
        nodes = [helper.make_node("MatMul", [node.input[0], weight], [product], name=f"{node.name}_matmul")]
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
        file.replace(node, nodes)
    file.save(path)
    settings = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK, is_symmetric=True, accuracy_level=accuracy_level, bits=8, quant_format=QuantFormat.QOperator
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(str(path)), algo_config=settings)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def write_attention(static: Path, path: Path) -> int:
    """The static file, its products of two activations on integers as well; returns how many there are."""
    file = _Rewriter(static)
    products = [
        node
        for node in file.graph.node
        if node.op_type == "MatMul" and all(file.index.constant(name) is None for name in node.input)
    ]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(file.model)
    names = list(dict.fromkeys(name for node in products for name in node.input))
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(exposed, str(path))
    session = open_session(path)
    ranges = dict.fromkeys(names, (0.0, 0.0))
    for seed in range(BATCHES if names else 0):
        for name, value in zip(names, session.run(names, {INPUT_NAME: images(BATCH, seed).numpy()}), strict=True):
            low, high = ranges[name]
            ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))
    for node in products:
        pairs = []
        for position, name in enumerate(list(node.input)):
            low, high = ranges[name]
            scale = max(high - low, 1e-9) / 255
            numbers = [file.add(np.float32(scale)), file.add(np.uint8(np.clip(round(-low / scale), 0, 255)))]
            steps, rounded = f"{node.output[0]}_{position}_steps", f"{node.output[0]}_{position}_rounded"
            pairs.append(helper.make_node("QuantizeLinear", [name, *numbers], [steps]))
            pairs.append(helper.make_node("DequantizeLinear", [steps, *numbers], [rounded]))
            node.input[position] = rounded
        file.replace(node, [*pairs, node])
    file.save(path)
    return len(products)


def make_files(name: str, folder: Path) -> dict[str, Path]:
    """The files of one architecture, those that are there already kept."""
    target = load_target("x86")
    stem = re.sub(r"\W", "_", name)
    kinds = ("fp32", "static", "dynamic", "weights, DQ", "weights, NBits l0", "weights, NBits l4", "attention")
    files = {kind: folder / f"{stem}.{re.sub('[^a-z0-9]+', '_', kind.lower())}.onnx" for kind in kinds}
    if not all(files[kind].is_file() for kind in kinds[:2]):
        module = create(name)
        write_onnx(module, files["fp32"], target)
        write_ours(module, files["static"], target)
    write_dynamic(files["static"], files["dynamic"])
    write_dequantized_weights(files["static"], files["weights, DQ"])
    for level in (0, 4):
        write_blocks(files["fp32"], files[f"weights, NBits l{level}"], level)
    if not write_attention(files["static"], files["attention"]):
        files.pop("attention").unlink()
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="LIBRARY/NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the latency of one architecture")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where files are kept; a temporary folder otherwise")
    parser.add_argument("--details", action="store_true", help="also the operators of each file as it runs")
    parser.add_argument("--no-latency", action="store_true", help="only make the files and compare their answers")
    arguments = parser.parse_args()
    console = Console(width=170)
    threads: list[int] = [] if arguments.no_latency else arguments.threads
    table = Table(title="linear layers in int8, one image")
    for column in ("", "SQNR dB", "size MB", "MACs in int8", "batch 1 against 16"):
        table.add_column(column, justify="left" if column == "" else "right")
    for count in threads:
        table.add_column(f"ms, {count} thread(s)", justify="right")
        table.add_column("fp32 / this [95 %]", justify="right")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        held_out = images(2 * BATCH, 50).numpy()
        np.save(folder / "input.npy", held_out)
        for name in arguments.models:
            files = make_files(name, folder)
            sessions = {kind: open_session(path) for kind, path in files.items()}
            logits = {kind: one.run([OUTPUT_NAME], {INPUT_NAME: held_out})[0] for kind, one in sessions.items()}
            measured = [
                measure_latency(
                    files,
                    threads=count,
                    providers=["CPUExecutionProvider"],
                    input_npy=folder / "input.npy",
                    seconds=arguments.seconds,
                )
                for count in threads
            ]
            table.add_row(name)
            for kind, path in files.items():
                alone = sessions[kind].run([OUTPUT_NAME], {INPUT_NAME: held_out[:1]})[0]
                moved = float(np.abs(alone - logits[kind][:1]).max() / np.abs(logits[kind]).max())
                graph = inspect_integer_graph(path)
                row = [f"{sqnr_db(logits['fp32'], logits[kind]):.1f}", f"{path.stat().st_size / 1e6:.2f}"]
                row += ["not counted" if graph.uncounted_ops else f"{graph.int8_mac_coverage:.1%}", f"{moved:.1e}"]
                for one in measured:
                    ratio = one.ratio("fp32", kind)
                    row.append(f"{one.percentile(kind, 50).value:.2f}")
                    row.append("" if kind == "fp32" else f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
                table.add_row(f"  {kind}", *row)
                if arguments.details:
                    console.print(name, kind, graph.op_counts)
    console.print(table)
    console.print("ratios above 1 say that the file is faster than fp32")
    console.print(f"machine: {summarize_machine(describe_machine())}")
    console.print(f"versions: {versions()}")


if __name__ == "__main__":
    main()
