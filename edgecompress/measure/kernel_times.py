"""Where one file's time goes: ONNX Runtime's own profile, by operator and by the module of the network.

What enters: an ONNX file and how to run it. What leaves: every kernel of the optimized graph with its milliseconds, and
their sums. The optimizer names a fused kernel after a node or a tensor of the file, so the file says which module it
works for; what it adds of its own (a change of layout) belongs to the kernel before it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgecompress.exporting.node_names import modules_of
from edgecompress.measure.measuring import ask_worker

MOST_MODULES = 20
_OPTIMIZER_MARKS = re.compile(r"(_token_\d+|_nchwc|/duplicated\S*)+$")
_MULTIPLIES = ("Conv", "Gemm", "MatMul")
_FUSED_BEHIND = 4  # a convolution swallows at most an addition and an activation, and the rounding of each
Json = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the optimized graph.

    `name` is the node or tensor of the file that it is named after, or None where the optimizer made it up; `module`
    the part of the network it works for. `ms` is a median over inferences, `ms_low` their tenth percentile;
    `elements` counts the first output.
    """

    operator: str
    provider: str | None
    name: str | None
    module: str
    ms: float
    ms_low: float
    elements: int


@dataclass(frozen=True)
class KernelTimes:
    """The kernels of one file in the order in which they run, and the median of whole inferences while profiling."""

    kernels: tuple[Kernel, ...]
    inference_ms: float
    inferences: int


def kernel_times(
    path: Path,
    *,
    threads: int,
    providers: Sequence[str],
    input_npy: Path | None,
    seconds: float,
    session: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
) -> KernelTimes:
    """Profile one file for `seconds` in a process of its own. Raises ProfileError."""
    answer = ask_worker(
        "kernels",
        path,
        what=f"the operators of {path.name}",
        threads=threads,
        providers=providers,
        input_npy=input_npy,
        session=session,
        shapes=shapes,
        seconds=seconds,
    )
    model = onnx.load(str(path), load_external_data=False)
    places = _Places(model)
    kernels: list[Kernel] = []
    module = "model"
    for found in answer["kernels"]:
        name = places.known(found["name"])
        if name is not None:
            module = places.module(name, found["operator"])
        times = {"ms": found["ms"], "ms_low": found["ms_low"]}
        kernels.append(Kernel(found["operator"], found["provider"], name, module, elements=_elements(found), **times))
    return KernelTimes(tuple(kernels), answer["inference_ms"], answer["inferences"])


class _Places:
    """From the name of a kernel to the file's node or tensor, and to the module."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.modules = modules_of(model)
        self.writers = {output: node for node in model.graph.node for output in node.output}
        self.nodes = {node.name: node for node in model.graph.node if node.name}

    def known(self, kernel: str) -> str | None:
        return next((name for name in (kernel, _OPTIMIZER_MARKS.sub("", kernel)) if name in self.modules), None)

    def module(self, name: str, operator: str) -> str:
        """A convolution fused with what follows may be named after that; it still is the convolution's time."""
        node = self.nodes.get(name) or self.writers.get(name)
        for _ in range(_FUSED_BEHIND if any(word in operator for word in _MULTIPLIES) else 0):
            if node is None:
                break
            if any(word in node.op_type for word in _MULTIPLIES):
                return self.modules.get(node.name or node.output[0], self.modules[name])
            before = [self.writers[tensor] for tensor in node.input if tensor in self.writers]
            heavy = [n for n in before if any(word in n.op_type for word in _MULTIPLIES)]
            node = next(iter(heavy or before), None)
        return self.modules[name]


def _elements(kernel: Json) -> int:
    """Elements of the first output, from the profile's own notation: [{"float": [1, 16, 8, 8]}]."""
    first: Any = next(iter(kernel["output"] or []), {})
    sizes: list[Any] = next(iter(first.values()), []) if isinstance(first, dict) else []
    return math.prod(int(size) for size in sizes) if sizes else 0


def by_operator(times: KernelTimes) -> list[Json]:
    """Milliseconds and share of each kind of operator, the dearest first."""
    total = sum(kernel.ms for kernel in times.kernels) or 1.0
    milliseconds: Counter[str] = Counter()
    for kernel in times.kernels:
        milliseconds[kernel.operator] += kernel.ms  # type: ignore[assignment]
    counts = Counter(kernel.operator for kernel in times.kernels)
    return [
        {"operator": operator, "count": counts[operator], "ms": ms, "share": ms / total}
        for operator, ms in milliseconds.most_common()
    ]


def by_module(times: KernelTimes, most: int = MOST_MODULES) -> list[Json]:
    """Milliseconds and share of each module, the dearest first; beyond `most` of them the rest is one row.

    `operators` counts the kernels that work for a module; the row of the rest has `module` null and `modules`, how
    many it stands for.
    """
    total = sum(kernel.ms for kernel in times.kernels) or 1.0
    groups: dict[str, list[Kernel]] = {}
    for kernel in times.kernels:
        groups.setdefault(kernel.module, []).append(kernel)
    ordered = sorted(groups.items(), key=lambda item: -sum(kernel.ms for kernel in item[1]))
    rows = [_row(name, kernels, total) for name, kernels in ordered[:most]]
    rest = [kernel for _, kernels in ordered[most:] for kernel in kernels]
    if rest:
        rows.append(_row(None, rest, total) | {"modules": len(ordered) - most})
    return rows


def _row(name: str | None, kernels: Sequence[Kernel], total: float) -> Json:
    ms = sum(kernel.ms for kernel in kernels)
    operators = dict(Counter(kernel.operator for kernel in kernels).most_common())
    return {"module": name, "ms": ms, "share": ms / total, "operators": operators, "modules": 1}
