"""Which of ONNX Runtime's two integer kernels a convolution runs through, chosen by measuring both.

What enters: an exported int8 file and the machine it is for. What leaves: the same function to the last bit, faster.
The CPU provider takes a kernel of its own for convolutions whose weights have the zero point 0, and multiplies
matrices for all others (qlinearconv.cc, `TryConvSymPrepack`). The first is made of VNNI or dot-product instructions;
the matrix product also has AMX on x86 and i8mm on Arm, and with those it is up to twice as fast where a sum is long,
and half as fast where it is short. Weights q with the zero point 0 are the same numbers as q - 1 with the zero
point -1, so the choice is free: no answer changes.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from edgecompress.errors import ExportError
from edgecompress.exporting.onnx_export import open_session
from edgecompress.exporting.onnx_rewrite import GraphIndex
from edgecompress.machine import isa_features
from edgecompress.measure.kernel_times import kernel_times
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.profiling import not_at_hand
from edgecompress.run_directory import atomic_path
from edgecompress.settings.target import Target

MATRIX_FEATURES = ("amx_int8", "i8mm")
"""CPU features that the matrix product's kernels use and the convolution's own do not."""

_SHIFT = -1
_LEAST_MACS = 2_000_000  # below, a kernel takes a few microseconds and starting it is most of that
_LEAST_GAIN = 0.05  # of a kernel's time; less is noise
_PROFILE_SECONDS, _LATENCY_SECONDS, _NARROW = 1.5, 8.0, 0.01
Json = dict[str, Any]


@dataclass(frozen=True)
class KernelChoice:
    """The convolutions that run as matrix products, of how many that could, and what that gains.

    `speedup` is the latency without the choice over that with it, `speedup_ci95` its 95 % interval; None where no
    convolution gains.
    """

    nodes: tuple[str, ...]
    candidates: int
    speedup: float | None
    speedup_ci95: tuple[float, float] | None

    @property
    def sentence(self) -> str:
        """The choice in words."""
        if self.speedup is None or self.speedup_ci95 is None:
            return f"all {self.candidates} convolutions keep the kernel of their own: matrix products gain nothing"
        low, high = self.speedup_ci95
        return (
            f"{len(self.nodes)} of {self.candidates} convolutions run as matrix products: {self.speedup:.2f} times as "
            f"fast as before (95 % interval {low:.2f} to {high:.2f}), with the same answers"
        )

    def to_dict(self) -> Json:
        """JSON-able."""
        interval = None if self.speedup_ci95 is None else list(self.speedup_ci95)
        names = {"nodes": list(self.nodes), "candidates": self.candidates}
        return names | {"speedup": self.speedup, "speedup_ci95": interval}


def choose_conv_kernels(path: Path, target: Target) -> KernelChoice | None:
    """Measure both kernels for every convolution of an int8 file that is worth it.

    None where there is nothing to choose: the target says `symmetric`, is not the machine at hand, has none of
    `MATRIX_FEATURES`, or no convolution is large enough. Raises ExportError, ProfileError.
    """
    features = set(isa_features() or ())
    if target.int8.conv_kernels != "auto" or not_at_hand(target) or not features & set(MATRIX_FEATURES):
        return None
    model = onnx.load(str(path))
    names = sorted(_candidates(model))
    if not names:
        return None
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
        shifted, mixed = Path(scratch) / "shifted.onnx", Path(scratch) / "mixed.onnx"
        onnx.save(_shifted(model, names), str(shifted))
        own, product = (_times(file, target) for file in (path, shifted))
        faster = [n for n in names if n in own and product.get(n, math.inf) < (1 - _LEAST_GAIN) * own[n]]
        if not faster:
            return KernelChoice((), len(names), None, None)
        onnx.save(_shifted(onnx.load(str(path)), faster), str(mixed))
        _require_equal(path, mixed, target)
        measured = measure_latency(
            {"before": path, "after": mixed},
            threads=target.threads,
            providers=target.providers,
            input_npy=None,
            seconds=_LATENCY_SECONDS,
            narrow_enough=_NARROW,
            session=target.session_settings(),
            what="the kernels of convolutions",
        )
    ratio = measured.ratio("before", "after")
    if ratio.low <= 1:
        return KernelChoice((), len(names), None, None)
    return KernelChoice(tuple(faster), len(names), ratio.ratio, (ratio.low, ratio.high))


def use_matrix_products(path: Path, names: Collection[str]) -> int:
    """Let the named convolutions of an int8 file run as matrix products, those of them that the file has in integers;
    returns how many they are."""
    if not names:
        return 0
    model = onnx.load(str(path))
    present = sorted(set(names) & set(_sites(model)))
    with atomic_path(path) as temporary:
        onnx.save(_shifted(model, present), str(temporary))
    return len(present)


def _sites(model: onnx.ModelProto) -> dict[str, tuple[NodeProto, NodeProto]]:
    """Ungrouped convolutions with symmetric int8 weights that nothing else reads: the node and its weights' scaling."""
    index, found = GraphIndex(model.graph), {}
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        grouped = any(a.name == "group" and a.i != 1 for a in node.attribute)
        scaling = index.producer.get(node.input[1]) if node.op_type == "Conv" and not grouped else None
        if scaling is None or scaling.op_type != "DequantizeLinear" or uses[scaling.output[0]] != 1:
            continue
        weight = index.constant(scaling.input[0])
        zero = index.constant(scaling.input[2]) if len(scaling.input) > 2 and scaling.input[2] else None
        is_symmetric = zero is None or not zero.any()
        shared = uses[scaling.input[0]] != 1
        if weight is not None and weight.dtype == np.int8 and is_symmetric and not shared and weight.min() > -128:
            found[node.name] = (node, scaling)
    return found


def _candidates(model: onnx.ModelProto) -> list[str]:
    """Names of the sites with at least `_LEAST_MACS` multiply-accumulates an image."""
    shapes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    index = GraphIndex(model.graph)
    names = []
    for name, (node, scaling) in _sites(model).items():
        weight, shape = index.constant(scaling.input[0]), shapes.get(node.output[0])
        if weight is not None and shape is not None and math.prod(shape[2:]) * weight.size >= _LEAST_MACS:
            names.append(name)
    return names


def _shifted(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The model with the zero point -1 for the weights of the named convolutions; changes `model` itself."""
    sites, index = _sites(model), GraphIndex(model.graph)
    for name in names:
        scaling = sites[name][1]
        weight, scale = index.constant(scaling.input[0]), index.constant(scaling.input[1])
        assert weight is not None  # a site has constants
        assert scale is not None
        stem = scaling.input[0]
        made = {
            f"{stem}_shifted": weight + np.int8(_SHIFT),
            f"{stem}_zero_point": np.full(scale.shape, _SHIFT, np.int8),
        }
        model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in made.items())
        rest, (shifted, zero) = list(scaling.input[1:2]), made
        del scaling.input[:]
        scaling.input.extend([shifted, *rest, zero])
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _times(path: Path, target: Target) -> dict[str, float]:
    """Milliseconds of each convolution's kernel, by the node's name."""
    times = kernel_times(
        path,
        threads=target.threads,
        providers=target.providers,
        input_npy=None,
        seconds=_PROFILE_SECONDS,
        session=target.session_settings(),
    )
    return {kernel.name: kernel.ms for kernel in times.kernels if kernel.name and kernel.operator == "QLinearConv"}


def _require_equal(before: Path, after: Path, target: Target) -> None:
    """Both files give the same logits for the same images, to the last bit. Raises ExportError."""
    sessions = [open_session(path, target=target) for path in (before, after)]
    entry = sessions[0].get_inputs()[0]
    shape = [2, *(size if isinstance(size, int) else 1 for size in entry.shape[1:])]
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    first, second = (session.run(None, {entry.name: images})[0] for session in sessions)
    if not np.array_equal(first, second):
        raise ExportError(
            f"{before.name}: the runtime's two kernels for convolutions do not agree on this machine (by "
            f"{np.abs(first - second).max():.3g}); set int8.conv_kernels: symmetric in the target"
        )
