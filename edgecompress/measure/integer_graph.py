"""What ONNX Runtime really runs: which share of a model's arithmetic is done by integer kernels.

What enters: an ONNX file. What leaves: operator counts, multiply-accumulates (MACs) and the share of them on
integers, and the islands that stayed in float. A QDQ file only asks for integers; whether it gets them is
decided by the runtime's own optimizer, so its optimized graph is what is read here.

The optimizer runs twice. Operators are counted in the graph as it runs (all optimizations). MACs are counted
one level below, since the layout pass pads channels to the vector width and would make layers look larger
than they are; it moves no layer between float and integers. Shapes are not inferred (the fused operators
belong to no standard) but read off one run with every tensor exposed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ProfileError
from edgecompress.exporting.preprocessing_graph import PIXEL_FORM, PREFIX
from edgecompress.measure.measure_worker import DTYPES, input_shape
from edgecompress.settings.target import INT8_ACTIVATIONS_KEY

# Position of the weights among the inputs, for each operator that multiplies and accumulates.
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "NhwcConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_TRANSPOSED_CONVOLUTIONS = {"ConvTranspose": 1, "ConvTransposeWithDynamicPads": 1, "QLinearConvTranspose": 3}
_MATRIX_PRODUCTS = {
    **dict.fromkeys(
        ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FusedMatMulActivation", "GemmFloat8"),
        1,
    ),
    **dict.fromkeys(("MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), 1),
    **dict.fromkeys(("QGemm", "QLinearMatMul"), 3),
}
_MAC_OPERATORS = _CONVOLUTIONS | _TRANSPOSED_CONVOLUTIONS | _MATRIX_PRODUCTS
_TRANSPOSED_B = {"Gemm", "FusedGemm", "QGemm", "FusedMatMul", "FusedMatMulActivation", "GemmFloat8"}
_DYNAMIC_INTEGER = {"ConvInteger", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
# They multiply too, but their work does not follow from one weight; named so that a share is not overstated.
_UNCOUNTED = {"Attention", "MultiHeadAttention", "QAttention", "LSTM", "GRU", "RNN", "Einsum", "MatMulNBits"}
_BOUNDARIES = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
# Operators that only move or name values: they join islands and make none.
_MOVERS = {
    "Cast",
    "Concat",
    "Constant",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Pad",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
# Float operators for which the CPU provider has an integer twin, so that staying in float has another cause.
_HAVE_INTEGER_KERNELS = {
    *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul", "Concat"),
    *("AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Softmax"),
    *("Where", "ArgMax", "Resize"),
}
_FLOATS = (np.float16, np.float32, np.float64)
_NAMED_NODES = 8  # an island of a float model is the whole model; its first nodes name it well enough


@dataclass(frozen=True)
class IntegerGraph:
    """The optimized graph of one model, counted.

    `op_counts` has the operators as they run; `macs` is per image; `int8_mac_coverage` is the share of MACs
    that integer kernels run (0 for a model without MACs). `float_islands` are connected groups of float operators,
    heaviest first: `op_types`, `nodes` (the first few), `node_count`, `macs_share`, and `reason`, why
    they are in float. `weights_bytes` is the memory
    of the constants that the runtime keeps. `uncounted_ops` multiply, but their MACs are in no number here.
    """

    op_counts: dict[str, int]
    integer_nodes: int
    quantize_nodes: int
    dequantize_nodes: int
    macs: int
    int8_mac_coverage: float
    float_islands: list[dict[str, Any]]
    weights_bytes: int
    uncounted_ops: list[str]


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    is_float: bool


def inspect_integer_graph(
    model: Path,
    *,
    threads: int = 1,
    int8_activations: bool = False,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
) -> IntegerGraph:
    """Optimize a model as the CPU provider would, and count what it runs. Raises ProfileError.

    `int8_activations` fuses them as well, as Arm builds do by default and x86 builds where they are asked.

    The inputs' axes beside the batch must be fixed, or given a size by `shapes` [input], but for a file of ours with
    its preprocessing inside. The result holds for the kind of CPU at hand: fusions are the same on every CPU, layouts
    are not.
    """
    if not model.is_file():
        raise ProfileError(f"{model}: no such file; export the model first")
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as folder:
        all_passes = _options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL, threads, int8_activations)
        extended = _options(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, threads, int8_activations)
        running = _optimized(model, all_passes, Path(folder) / "all.onnx")
        fused = _optimized(model, extended, Path(folder) / "fused.onnx")
    tensors = _tensors(fused, model, threads, shapes or {})
    nodes = list(fused.graph.node)
    macs = [_macs(node, tensors) for node in nodes]
    total = sum(macs)
    integers = sum(count for node, count in zip(nodes, macs, strict=True) if _is_integer(node))
    counts = Counter(node.op_type for node in running.graph.node)
    return IntegerGraph(
        op_counts=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        integer_nodes=sum(_is_integer(node) for node in running.graph.node),
        quantize_nodes=counts["QuantizeLinear"] + counts["DynamicQuantizeLinear"],
        dequantize_nodes=counts["DequantizeLinear"],
        macs=total,
        int8_mac_coverage=integers / total if total else 0.0,
        float_islands=_float_islands(nodes, macs, tensors),
        weights_bytes=sum(_constant_bytes(constant) for constant in fused.graph.initializer),
        uncounted_ops=sorted(set(counts) & _UNCOUNTED),
    )


def _options(level: ort.GraphOptimizationLevel, threads: int, int8_activations: bool = False) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.add_session_config_entry(INT8_ACTIVATIONS_KEY, "1" if int8_activations else "0")
    options.intra_op_num_threads = threads
    options.graph_optimization_level = level
    options.log_severity_level = 3  # it warns that a layout-optimized file is for this machine alone
    return options


def _optimized(model: Path, options: ort.SessionOptions, output: Path) -> onnx.ModelProto:
    options.optimized_model_filepath = str(output)
    try:
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a type of its own per status code, with no common base
        raise ProfileError(f"{model}: ONNX Runtime {ort.__version__} does not load it: {error}") from error
    return onnx.load(str(output))


def _is_integer(node: onnx.NodeProto) -> bool:
    """Whether a node computes on integers: QLinear*, QGemm, *Integer."""
    return node.op_type.startswith("QLinear") or node.op_type == "QGemm" or node.op_type in _DYNAMIC_INTEGER


def _constant_bytes(constant: onnx.TensorProto) -> int:
    return int(math.prod(constant.dims) * onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize)


def _tensors(
    fused: onnx.ModelProto, source: Path, threads: int, shapes: Mapping[str, Sequence[int | None]]
) -> dict[str, _Tensor]:
    """Shape and kind of every tensor at batch 1: of constants, and of the rest from one run with all exposed."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(fused)
    already = {output.name for output in exposed.graph.output}
    names = [name for node in exposed.graph.node for name in node.output if name and name not in already]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL, threads)
    try:
        session = ort.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
        given = {name: list(sizes) for name, sizes in shapes.items()}
        side = input_side(fused)
        feeds = {node.name: _blank(node, source, given, side) for node in session.get_inputs()}
        values = session.run(None, feeds)
    except ProfileError:
        raise
    except Exception as error:  # the binding raises a type of its own per status code, with no common base
        raise ProfileError(f"{source}: the optimized graph does not run on one blank image: {error}") from error
    outputs = [node.name for node in session.get_outputs()]
    known = {**feeds, **dict(zip(outputs, values, strict=True))}
    tensors = {
        name: _Tensor(tuple(value.shape), value.dtype in _FLOATS)
        for name, value in known.items()
        if isinstance(value, np.ndarray)
    }
    for constant in fused.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(constant.data_type)
        tensors[constant.name] = _Tensor(tuple(constant.dims), dtype in _FLOATS)
    return tensors


def input_side(model: onnx.ModelProto) -> int | None:
    """The side in pixels that a file with preprocessing inside resizes its images to, from its metadata."""
    facts = {entry.key: entry.value for entry in model.metadata_props}
    if facts.get("edgecompress.input_form") != PIXEL_FORM or "edgecompress.preprocessing" not in facts:
        return None
    return Preprocessing.from_dict(json.loads(facts["edgecompress.preprocessing"])).input_size


def _blank(
    node: ort.NodeArg, source: Path, given: dict[str, list[int | None]], side: int | None
) -> np.ndarray[Any, Any]:
    if node.type not in DTYPES:
        raise ProfileError(f"{source}: input '{node.name}' is {node.type}; known are {', '.join(DTYPES)}")
    free = [axis for axis, size in enumerate(node.shape) if not isinstance(size, int)]
    if side is not None and free == [0, 1, 2] and node.name not in given:
        given = {node.name: [1, side, side, node.shape[3]]}
    try:
        return np.zeros(input_shape(node.name, node.shape, batch=1, given=given), dtype=DTYPES[node.type])
    except ValueError as error:
        raise ProfileError(f"{source}: {error}: export with a size") from error


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return int(next((attribute.i for attribute in node.attribute if attribute.name == name), 0))


def _macs(node: onnx.NodeProto, tensors: dict[str, _Tensor]) -> int:
    """Multiply-accumulates of one node, without the bias: output elements times the length of each sum."""
    position = _MAC_OPERATORS.get(node.op_type)
    if position is None:
        return 0
    weight = tensors[node.input[position]].shape
    output = tensors[node.output[0]].shape
    if node.op_type in _CONVOLUTIONS:  # weight [out, in / groups, kernel...]
        return math.prod(output) * math.prod(weight[1:])
    if node.op_type in _TRANSPOSED_CONVOLUTIONS:  # weight [in, out / groups, kernel...]: each input value spreads
        return math.prod(tensors[node.input[0]].shape) * math.prod(weight[1:])
    is_transposed = node.op_type in _TRANSPOSED_B and _attribute(node, "transB") == 1
    length = weight[-1] if is_transposed or len(weight) == 1 else weight[-2]
    return math.prod(output) * length


def _float_islands(
    nodes: Sequence[onnx.NodeProto], macs: Sequence[int], tensors: dict[str, _Tensor]
) -> list[dict[str, Any]]:
    """Connected groups of operators that compute in float, heaviest first; preprocessing is not the model's."""
    members = [index for index, node in enumerate(nodes) if _handles_floats(node, tensors)]
    parent = {index: index for index in members}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    producer = {name: index for index in members for name in nodes[index].output if name}
    for index in members:
        for name in nodes[index].input:
            if name in producer:
                parent[root(index)] = root(producer[name])
    groups: dict[int, list[int]] = {}
    for index in members:
        if nodes[index].op_type not in _MOVERS:
            groups.setdefault(root(index), []).append(index)
    total = sum(macs)
    rounded = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    is_quantized = bool(rounded) or any(_is_integer(node) for node in nodes)
    islands = []
    for group in groups.values():
        first = [nodes[index].name or nodes[index].output[0] for index in group[:_NAMED_NODES]]
        share = sum(macs[index] for index in group) / total if total else 0.0
        types = dict(Counter(nodes[index].op_type for index in group).most_common())
        reason = _why_in_float([nodes[index] for index in group], rounded, is_quantized)
        island = {"op_types": types, "nodes": first, "node_count": len(group), "macs_share": share, "reason": reason}
        islands.append(island)
    return sorted(islands, key=lambda island: (-island["macs_share"], -island["node_count"]))


def _why_in_float(group: Sequence[onnx.NodeProto], rounded: set[str], is_quantized: bool) -> str:
    """The cause that explains an island: of several, the one that a user can do most about."""
    if not is_quantized:
        return "nothing in this file is rounded to integers"
    asked = sorted({node.op_type for node in group if node.input and all(n in rounded for n in node.input[:2] if n)})
    heavy = sorted({node.op_type for node in group if node.op_type in _MAC_OPERATORS})
    unfused = [name for name in asked if name in _HAVE_INTEGER_KERNELS]
    if unfused:
        return f"the file rounds around {', '.join(unfused)}, but ONNX Runtime did not fuse it into an integer kernel"
    if heavy:
        return f"the file leaves {', '.join(heavy)} in float: no rounding stands around it"
    without = sorted({node.op_type for node in group} - _HAVE_INTEGER_KERNELS)
    if without:
        return f"the CPU provider has no integer kernel for {', '.join(without)}"
    return "no rounding stands around it in the file"


def _handles_floats(node: onnx.NodeProto, tensors: dict[str, _Tensor]) -> bool:
    if node.op_type in _BOUNDARIES or _is_integer(node) or node.name.startswith(PREFIX):
        return False
    return any(name in tensors and tensors[name].is_float for name in node.output)
