"""Small ONNX models with MACs that can be counted by hand, for the tests of the measuring modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

SIZE = 8
CLASSES = 6


def _constant(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
    return numpy_helper.from_array(values.astype(np.float32), name)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    shape: list[int | str | None],
    *,
    output_axes: int = 4,
) -> Path:
    """Write a model with one float input `input` of this shape and the output `logits`."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [f"axis{axis}" for axis in range(output_axes)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def residual_net(path: Path, channels: int = 8, size: int = SIZE) -> Path:
    """Conv-Relu, depthwise conv in a residual, global pool, Gemm."""
    pads = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["input", "stem.weight"], ["stem"], name="stem", **pads),
        helper.make_node("Relu", ["stem"], ["stem.relu"]),
        helper.make_node("Conv", ["stem.relu", "dw.weight"], ["dw"], name="dw", group=channels, **pads),
        helper.make_node("Add", ["dw", "stem.relu"], ["sum"], name="sum"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], name="head", transB=1),
    ]
    constants = [
        _constant("stem.weight", channels, 3, 3, 3),
        _constant("dw.weight", channels, 1, 3, 3),
        _constant("head.weight", CLASSES, channels),
        _constant("head.bias", CLASSES),
    ]
    return save(path, nodes, constants, ["N", 3, size, size], output_axes=2)


def residual_net_macs(channels: int = 8, size: int = SIZE) -> dict[str, int]:
    """MACs of each layer of `residual_net` for one image."""
    area = size * size
    return {"stem": area * channels * 3 * 9, "dw": area * channels * 9, "head": channels * CLASSES}


class _Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, size: int) -> None:
        generator = np.random.default_rng(0)
        self.images = iter([generator.standard_normal((1, 3, size, size)).astype(np.float32) for _ in range(4)])

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        image = next(self.images, None)
        return None if image is None else {"input": image}


def quantized(source: Path, path: Path, *, exclude: list[str] | None = None, size: int = SIZE) -> Path:
    """The same model in QDQ form, uint8 activations and int8 weights."""
    quantize_static(
        source,
        path,
        _Images(size),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=exclude or [],
    )
    return path
