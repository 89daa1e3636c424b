"""Where the time goes: ONNX Runtime's own profile of a float file and its int8 twin, layer by layer.

What enters: two ONNX files of one network. What leaves: the milliseconds that each layer with weights, and what
follows it up to the next one, takes in float and in int8, and what a change between the two costs. Kernels are
mapped back to layers by name: the optimizer names a fused kernel after a node or a tensor of the file, and what it
adds of its own (a change of layout) belongs to the kernel before it.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from edgecompress.errors import ProfileError

_MIN_RUNS, _MAX_RUNS = 10, 300
# A low quantile: whatever else the machine does only ever makes a kernel slower.
_QUANTILE = 0.1
_CHANGES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
_WEIGHTED = {"Conv", "Gemm", "MatMul", "ConvTranspose"}
_OPTIMIZER_MARKS = re.compile(r"(_token_\d+|_nchwc|/duplicated\S*)+$")


@dataclass(frozen=True)
class KernelTime:
    """One kernel of the optimized graph: its operator, the layer (by number) it works for, ms, elements written."""

    operator: str
    segment: int
    milliseconds: float
    elements: int


@dataclass(frozen=True)
class SegmentTime:
    """One layer with weights and what follows it up to the next: ms in each form, and the kernels that took them."""

    fp32_ms: float
    int8_ms: float
    fp32_operators: dict[str, int]
    int8_operators: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OperatorTimes:
    """The segments in order, and the cost of one change of form: `change_ms + change_ms_per_element * elements`.

    `output_elements[k]` is the size of the tensor that the k-th segment hands on, at batch 1.
    """

    segments: tuple[SegmentTime, ...]
    output_elements: tuple[int, ...]
    change_ms: float
    change_ms_per_element: float

    def change_cost(self, segment: int) -> float:
        """ms of a change of form behind a segment: one pass over the tensor for its values, one for its layout."""
        return 2 * (self.change_ms + self.change_ms_per_element * self.output_elements[segment])


def operator_times(fp32: Path, int8: Path, *, threads: int, input_npy: Path | None, seconds: float) -> OperatorTimes:
    """Profile both files for `seconds` each. Raises ProfileError where their layers do not correspond."""
    counts = {path: _weighted_nodes(onnx.load(str(path)).graph) for path in (fp32, int8)}
    if counts[fp32] != counts[int8] or not counts[fp32]:
        raise ProfileError(
            f"{fp32.name} has {counts[fp32]} layers and {int8.name} {counts[int8]}; their times cannot be compared"
        )
    kernels = {path: _kernels(path, threads=threads, input_npy=input_npy, seconds=seconds) for path in (fp32, int8)}
    size = counts[fp32]
    totals = {path: _per_segment(kernels[path], size) for path in kernels}
    operators = {path: _operators(kernels[path], size) for path in kernels}
    change = [kernel for path in kernels for kernel in kernels[path] if kernel.operator in _CHANGES]
    fixed, slope = _fit_changes(change)
    return OperatorTimes(
        segments=tuple(
            SegmentTime(totals[fp32][k], totals[int8][k], operators[fp32][k], operators[int8][k]) for k in range(size)
        ),
        output_elements=tuple(_last_elements(kernels[int8], size)),
        change_ms=fixed,
        change_ms_per_element=slope,
    )


def _kernels(path: Path, *, threads: int, input_npy: Path | None, seconds: float) -> list[KernelTime]:
    """Every kernel of one file with its time, in the order in which they run."""
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: _image(session.get_inputs()[0], input_npy)}
            deadline = time.monotonic() + seconds
            for count in range(_MAX_RUNS):
                session.run(None, feed)
                if count >= _MIN_RUNS and time.monotonic() > deadline:
                    break
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # the binding raises a type of its own per status code, with no common base
            raise ProfileError(f"{path}: ONNX Runtime {ort.__version__} does not profile it: {error}") from error
    segment_of = _segments_by_name(onnx.load(str(path)).graph)
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    facts: dict[tuple[str, str], tuple[int, int]] = {}
    segment = 0
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        name, operator = name.removesuffix("_kernel_time"), str(event["args"].get("op_name", ""))
        segment = segment_of.get(_OPTIMIZER_MARKS.sub("", name), segment)
        durations[name, operator].append(float(event["dur"]))
        facts.setdefault((name, operator), (segment, _elements(event["args"].get("output_type_shape"))))
    return [
        KernelTime(key[1], facts[key][0], float(np.quantile(times, _QUANTILE)) / 1e3, facts[key][1])
        for key, times in durations.items()
    ]


def _image(node: ort.NodeArg, input_npy: Path | None) -> np.ndarray[Any, Any]:
    if input_npy is not None:
        return np.array(np.load(input_npy, mmap_mode="r", allow_pickle=False)[:1])
    shape = [1, *(int(size) for size in node.shape[1:])]
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _elements(shapes: Any) -> int:
    """Elements of the first output, from the profile's own notation: [{"float": [1, 16, 8, 8]}]."""
    first: Any = next(iter(shapes or []), {})
    dims: list[Any] = next(iter(first.values()), []) if isinstance(first, dict) else []
    return int(np.prod([int(size) for size in dims])) if dims else 0


def _is_weighted(node: onnx.NodeProto, constants: set[str]) -> bool:
    return node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in constants


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Initializers, constants, and what is only read back from them."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(name in constants for name in node.input if name)):
            constants.update(node.output)
    return constants


def _weighted_nodes(graph: onnx.GraphProto) -> int:
    constants = _constants(graph)
    return sum(_is_weighted(node, constants) for node in graph.node)


def _segments_by_name(graph: onnx.GraphProto) -> dict[str, int]:
    """For each node and tensor of a file the number of the layer it belongs to: the last one before it in the file."""
    constants = _constants(graph)
    current, found = -1, {}
    for node in graph.node:
        current += _is_weighted(node, constants)
        if not all(name in constants for name in node.output):
            found.update(dict.fromkeys((node.name, *node.output), max(current, 0)))
    return found


def _per_segment(kernels: Sequence[KernelTime], size: int) -> list[float]:
    totals = [0.0] * size
    for kernel in kernels:
        totals[kernel.segment] += kernel.milliseconds
    return totals


def _operators(kernels: Sequence[KernelTime], size: int) -> list[dict[str, int]]:
    counts: list[Counter[str]] = [Counter() for _ in range(size)]
    for kernel in kernels:
        counts[kernel.segment][kernel.operator] += 1
    return [dict(count) for count in counts]


def _last_elements(kernels: Sequence[KernelTime], size: int) -> list[int]:
    last = [0] * size
    for kernel in kernels:
        last[kernel.segment] = kernel.elements or last[kernel.segment]
    return last


def _fit_changes(kernels: Sequence[KernelTime]) -> tuple[float, float]:
    """Fixed ms and ms per element of kernels that only change a tensor's form.

    The fixed part is the quickest of them, the slope a median: a few kernels that were interrupted must not decide.
    """
    sized = [(kernel.elements, kernel.milliseconds) for kernel in kernels if kernel.elements]
    if not sized:
        return 0.0, 0.0
    sizes, times = np.array(sized, dtype=np.float64).T
    fixed = float(times.min())
    return fixed, float(np.median((times - fixed) / sizes))
