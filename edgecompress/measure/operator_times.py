"""What int8 changes, layer by layer: the runtime's profile of a float file beside that of its int8 twin.

What enters: two ONNX files of one network. What leaves: the milliseconds that each layer with weights, and what
follows it up to the next one, takes in float and in int8, and what a change between the two costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgecompress.errors import ProfileError
from edgecompress.measure.kernel_times import kernel_times

_CHANGES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"}
_WEIGHTED = {"Conv", "Gemm", "MatMul", "ConvTranspose"}


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


def segment_times(path: Path, *, threads: int, seconds: float) -> list[float]:
    """ms of each layer with weights and of what follows it up to the next, in the file's order. Raises ProfileError."""
    kernels = _kernels(path, threads=threads, input_npy=None, seconds=seconds)
    return _per_segment(kernels, _weighted_nodes(onnx.load(str(path)).graph))


def _kernels(path: Path, *, threads: int, input_npy: Path | None, seconds: float) -> list[KernelTime]:
    """Every kernel of one file with its time, in the order in which they run.

    A low quantile of the times: whatever else the machine does only ever makes a kernel slower.
    """
    providers = ["CPUExecutionProvider"]
    times = kernel_times(path, threads=threads, providers=providers, input_npy=input_npy, seconds=seconds)
    segment_of = _segments_by_name(onnx.load(str(path)).graph)
    found, segment = [], 0
    for kernel in times.kernels:
        segment = segment_of.get(kernel.name or "", segment)
        found.append(KernelTime(kernel.operator, segment, kernel.ms_low, kernel.elements))
    return found


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
