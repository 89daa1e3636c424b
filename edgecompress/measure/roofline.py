"""The roofline: what the machine can do at most, measured in the same run, and how much of it each model reaches.

What enters: a target, and what each model costs and takes. What leaves: the float and the integer peak in GMAC/s and
the memory bandwidth in GB/s, for one thread and for the target's, and each model's share of them, so that one sees
what is left to gain. Peaks are those of ONNX Runtime's own kernels on shapes that suit them: a paper's figure for the
CPU would be a ceiling that no model on this runtime can come near (Williams, Waterman and Patterson, "Roofline", 2009).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgecompress.measure.measuring import copy_seconds, measure_latency

SIDE = 512  # of the square matrices: three of them in int8 or float fit a level-2 cache of a few MB
CHANNELS, EXTENT = 256, 28  # a 3 x 3 convolution as in the middle of a ResNet
COPY_BYTES = 128_000_000
PROCESSES = 2
# A peak is what the machine reaches when nothing disturbs it.
PEAK_PERCENTILE = 10
SECONDS = 2.0
Json = dict[str, Any]
_CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Ceiling:
    """One kernel that sets a peak: `float` or `int8`, what it is, and the multiply-accumulates of one run."""

    kind: str
    what: str
    macs: int


CEILINGS = {
    "float_product": Ceiling("float", "matrix_product", SIDE**3),
    "float_convolution": Ceiling("float", "convolution", EXTENT**2 * CHANNELS**2 * 9),
    "int8_product": Ceiling("int8", "matrix_product", SIDE**3),
    "int8_convolution": Ceiling("int8", "convolution", EXTENT**2 * CHANNELS**2 * 9),
}


def measure_peaks(*, threads: int, int8_activations: bool = False, memory_bytes: int | None = None) -> Json:
    """Peaks for one thread and for `threads`, from fresh processes; a few seconds. Raises ProfileError.

    `int8_activations` asks for int8 x int8 kernels, as on Arm, instead of uint8 x int8; `memory_bytes` bounds the copy.
    """
    counts = sorted({1, threads})
    size = COPY_BYTES if memory_bytes is None else min(COPY_BYTES, memory_bytes // 8)
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as folder:
        files = _write(Path(folder), np.dtype(np.int8 if int8_activations else np.uint8))
        models = {f"{name}@{count}": files[name] for name in CEILINGS for count in counts}
        measured = measure_latency(
            models,
            threads=threads,
            providers=_CPU,
            input_npy=None,
            processes=PROCESSES,
            seconds=SECONDS,
            what="the machine's peaks",
            settings={f"{name}@{count}": {"threads": count} for name in CEILINGS for count in counts},
        )
    peaks: Json = {}
    for count in counts:
        rates: dict[str, dict[str, float]] = {"float": {}, "int8": {}}
        for name, ceiling in CEILINGS.items():
            fastest = float(np.percentile(measured.latencies_ms(f"{name}@{count}"), PEAK_PERCENTILE))
            rates[ceiling.kind][ceiling.what] = ceiling.macs / fastest / 1e6
        peaks[str(count)] = {
            "float_gmacs_per_s": max(rates["float"].values()),
            "int8_gmacs_per_s": max(rates["int8"].values()),
            "float_gmacs_per_s_by_kernel": rates["float"],
            "int8_gmacs_per_s_by_kernel": rates["int8"],
            "memory_gb_per_s": 2 * size / copy_seconds(size, threads=count) / 1e9,
        }
    return {
        "threads": peaks,
        "copied_bytes": size,
        "how": (
            f"ONNX Runtime's own kernels on a {SIDE} x {SIDE} x {SIDE} matrix product and a 3 x 3 convolution of "
            f"{CHANNELS} channels at {EXTENT} x {EXTENT}, tenth percentile of {PROCESSES} fresh processes; memory by a "
            "large copy, bytes read and written"
        ),
    }


def model_share(model: Mapping[str, Any], peaks: Mapping[str, Any], *, threads: int) -> Json:
    """What of the peaks a model reaches: its rate, and the least time that its arithmetic would take at the peaks.

    `model` is its entry in a profile. `share_of_peak` is that least time over the median latency; integer and float
    MACs each count against their own peak. `share_of_convolution_peak` sets it against the convolution's rate, which
    is what a convolutional network could reach. `weights_ms` is the time to read the weights from memory once.
    """
    peak = peaks["threads"][str(threads)]
    median, macs = model["latency_ms"]["p50"], model["macs"]
    integer = macs * model["int8_mac_coverage"]

    def least_ms(float_rate: float, int8_rate: float) -> float:
        return float(((macs - integer) / float_rate + integer / int8_rate) / 1e6)

    at_peak = least_ms(peak["float_gmacs_per_s"], peak["int8_gmacs_per_s"])
    at_convolution = least_ms(
        peak["float_gmacs_per_s_by_kernel"]["convolution"], peak["int8_gmacs_per_s_by_kernel"]["convolution"]
    )
    weights_ms = model["weights_bytes"] / peak["memory_gb_per_s"] / 1e6
    return {
        "gmacs_per_s": macs / median / 1e6,
        "least_ms": at_peak,
        "share_of_peak": at_peak / median,
        "share_of_convolution_peak": at_convolution / median,
        "weights_ms": weights_ms,
        "threads": threads,
    }


def _write(folder: Path, activations: np.dtype[Any]) -> dict[str, Path]:
    """The four kernels as files: weights are constants, as in a model, so that the runtime may lay them out."""
    rng = np.random.default_rng(0)
    square, image, kernel = (SIDE, SIDE), (1, CHANNELS, EXTENT, EXTENT), (CHANNELS, CHANNELS, 3, 3)
    float_type, int_type = TensorProto.FLOAT, helper.np_dtype_to_tensor_dtype(activations)

    def integers(*shape: int) -> NDArray[np.int8]:
        return rng.integers(-127, 128, shape).astype(np.int8)

    def floats(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    rounding = {
        "scale": np.float32(0.1),
        "zero": activations.type(0),
        "weight_zero": np.int8(0),
        "out_scale": np.float32(100),
    }
    convolution: Json = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    integer_inputs = ["x", "scale", "zero", "w", "scale", "weight_zero", "out_scale", "zero"]
    made: dict[str, tuple[onnx.NodeProto, tuple[int, ...], int, Json]] = {
        "float_product": (helper.make_node("MatMul", ["x", "w"], ["y"]), square, float_type, {"w": floats(*square)}),
        "float_convolution": (
            helper.make_node("Conv", ["x", "w"], ["y"], **convolution),
            image,
            float_type,
            {"w": floats(*kernel)},
        ),
        "int8_product": (
            helper.make_node("MatMulInteger", ["x", "w"], ["y"]),
            square,
            int_type,
            {"w": integers(*square)},
        ),
        "int8_convolution": (
            helper.make_node("QLinearConv", integer_inputs, ["y"], **convolution),
            image,
            int_type,
            {"w": integers(*kernel), **rounding},
        ),
    }
    files = {}
    for name, (node, shape, kind, constants) in made.items():
        graph = helper.make_graph(
            [node],
            name,
            [helper.make_tensor_value_info("x", kind, shape)],
            [onnx.ValueInfoProto(name="y")],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
        )
        files[name] = folder / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), files[name])
    return files
