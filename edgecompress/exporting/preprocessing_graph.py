"""Preprocessing as part of the ONNX file: photographs in, logits out.

What enters: an exported model that reads normalized floats, and the preprocessing it was trained with. What leaves: the
same model reading `input`, uint8 [N, H, W, C] of any size, with resize, centre crop and normalization in front, and
softmax and top-k behind if asked. So a device needs no image library that happens to resize as PIL does.

ONNX's Resize with `antialias` and `exclude_outside` on uint8 is PIL's own algorithm: a pass along each axis, width
first as `Preprocessing` goes, weights normalized at the border, rounded to 8 bits between the passes. What differs is
sums that lie on the edge between two grey levels, by one level, since its weights are float32 and PIL's double: a few
pixels in ten thousand, more where the ratio of the sizes is simple (3 in a hundred from 224 to 256). With float32
pixels instead, one in seven differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ExportError

InputForm = Literal["float32_nchw", "uint8_nhwc"]
FLOAT_FORM: InputForm = "float32_nchw"
PIXEL_FORM: InputForm = "uint8_nhwc"
PREFIX = "preprocessing/"
_INPUT = "input"
_LOGITS = "logits"
_NORMALIZED = f"{PREFIX}normalized"
_PROPERTY = "edgecompress."
# The attributes that agree best with PIL, whose cubic has a = -0.5.
_RESIZE: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "linear", "antialias": 1, "exclude_outside": 1},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "antialias": 1, "exclude_outside": 1},
}


def embed_preprocessing(
    model: onnx.ModelProto,
    preprocessing: Preprocessing,
    *,
    any_size: bool = True,
    softmax: bool = False,
    top_k: int | None = None,
) -> onnx.ModelProto:
    """A copy of `model` that reads uint8 [N, H, W, C] pixels; its first output stays `logits`, bit for bit.

    With `any_size`, images of any size are resized and cropped as `Preprocessing.prepare` does; without it, H and W
    are fixed to the input size and the pixels are only normalized. `softmax` adds the output `probabilities`,
    float32 [N, classes]; `top_k` adds `top_k_probabilities` and `top_k_indices`, float32 and int64 [N, top_k], best
    first. The metadata stay and say what the file now reads and gives. Raises ExportError for a model that does not
    read one float32 [N, C, size, size] tensor called `input`, and for a `top_k` beyond the classes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _check_input(made, preprocessing)
    graph = made.graph
    builder = _Builder(graph)
    _rename_input(graph)
    pixels = _resize_and_crop(builder, preprocessing) if any_size else _INPUT
    size, channels = preprocessing.input_size, preprocessing.channels
    planes = builder.node("Transpose", [pixels], "planes", perm=[0, 3, 1, 2])
    if any_size:
        # The runtime does not know what a crop leaves; told so, it plans memory as for the plain file.
        shape = builder.constant("planes_shape", np.array([0, channels, size, size], np.int64))
        planes = builder.node("Reshape", [planes, shape], "sized_planes")
    _normalize(builder, planes, preprocessing)
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*builder.nodes, *kept])
    del graph.input[:]
    height, width = ("height", "width") if any_size else (size, size)
    graph.input.append(helper.make_tensor_value_info(_INPUT, TensorProto.UINT8, ["batch", height, width, channels]))
    del graph.value_info[:]
    if softmax or top_k is not None:
        add_answers(graph, softmax=softmax, top_k=top_k)
    describe_signature(made)
    return made


def input_form(model: onnx.ModelProto) -> InputForm:
    """What a model of ours reads: normalized floats, or pixels. Raises ExportError for any other input."""
    kind = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.input}.get(_INPUT)
    forms: dict[int | None, InputForm] = {TensorProto.FLOAT: FLOAT_FORM, TensorProto.UINT8: PIXEL_FORM}
    if kind not in forms:
        raise ExportError(f"the model has no input '{_INPUT}' of float32 or uint8; export it with edgecompress export")
    return forms[kind]


def describe_signature(model: onnx.ModelProto) -> None:
    """Write names, dtypes and shapes of inputs and outputs, and the form of the input, into the model's metadata."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    entries[f"{_PROPERTY}input_form"] = input_form(model)
    entries[f"{_PROPERTY}inputs"] = json.dumps([_signature(value) for value in model.graph.input])
    entries[f"{_PROPERTY}outputs"] = json.dumps([_signature(value) for value in model.graph.output])
    helper.set_model_props(model, entries)


def _signature(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return {"name": value.name, "dtype": dtype, "shape": _shape(value)}


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]


class _Builder:
    """New nodes in order, and their constants in the graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        full = f"{PREFIX}{name}"
        self.graph.initializer.append(numpy_helper.from_array(value, full))
        return full

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{PREFIX}{output}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"{PREFIX}{output}", **attributes))
        return name


def _check_input(model: onnx.ModelProto, preprocessing: Preprocessing) -> None:
    if input_form(model) == PIXEL_FORM:
        raise ExportError("the model reads uint8 already: its preprocessing is inside; export it without")
    size, channels = preprocessing.input_size, preprocessing.channels
    (found,) = [_shape(value) for value in model.graph.input if value.name == _INPUT]
    if len(model.graph.input) != 1 or len(found) != 4 or found[1:] != [channels, size, size]:
        raise ExportError(
            f"the model reads {found}, its preprocessing gives [batch, {channels}, {size}, {size}]; "
            "export both from the same run"
        )
    if not model.graph.output or model.graph.output[0].name != _LOGITS:
        raise ExportError(f"the model's first output is not '{_LOGITS}'; export it with edgecompress export")


def _rename_input(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == _INPUT:
                node.input[position] = _NORMALIZED


def _resize_and_crop(builder: _Builder, preprocessing: Preprocessing) -> str:
    """The arithmetic of `Preprocessing.prepare` on the shape of the input, then the resizing, then Slice."""
    size = preprocessing.input_size
    if preprocessing.crop_fraction == 1.0:
        sizes = builder.constant("sizes", np.array([size, size], np.int64))
        return _resize(builder, sizes, preprocessing.interpolation)
    sides = builder.node("Shape", [_INPUT], "sides", start=1, end=3)  # [H, W]
    shorter = builder.constant("shorter", np.array([round(size / preprocessing.crop_fraction)], np.int64))
    smallest = builder.node("ReduceMin", [sides], "smallest_side", keepdims=1)
    # In whole numbers: the short side comes out as `shorter`, and the long one is rounded down.
    scaled = builder.node("Mul", [sides, shorter], "scaled_sides")
    sizes = builder.node("Div", [scaled, smallest], "sizes")
    resized = _resize(builder, sizes, preprocessing.interpolation)
    # Half of what is cut off, with halves rounded to even, as Python and so torchvision and timm round.
    side = builder.constant("size", np.array([size, size], np.int64))
    surplus = builder.node("Sub", [sizes, side], "surplus")
    surplus = builder.node("Cast", [surplus], "surplus_float", to=TensorProto.FLOAT)
    half = builder.node("Mul", [surplus, builder.constant("half", np.array(0.5, np.float32))], "half_surplus")
    start = builder.node("Cast", [builder.node("Round", [half], "rounded")], "start", to=TensorProto.INT64)
    end = builder.node("Add", [start, side], "end")
    axes = builder.constant("crop_axes", np.array([1, 2], np.int64))
    return builder.node("Slice", [resized, start, end, axes], "cropped")


def _resize(builder: _Builder, sizes: str, interpolation: str) -> str:
    """Resize [N, H, W, C] to `sizes`, a tensor [height, width]."""
    if interpolation == "nearest":
        rows = builder.node("Gather", [_INPUT, _nearest(builder, sizes, 0)], "rows", axis=1)
        return builder.node("Gather", [rows, _nearest(builder, sizes, 1)], "resized", axis=2)
    fixed = {"coordinate_transformation_mode": "half_pixel", "axes": [1, 2]}
    return builder.node("Resize", [_INPUT, "", "", sizes], "resized", **fixed, **_RESIZE[interpolation])


def _nearest(builder: _Builder, sizes: str, axis: int) -> str:
    """The pixel under each new pixel's centre: PIL adds up steps of double precision, and so does this."""
    name = ("row", "column")[axis]
    place = builder.constant(f"{name}_place", np.array([axis], np.int64))
    count = builder.node("Gather", [sizes, place], f"{name}s_out", axis=0)
    given = builder.node("Shape", [_INPUT], f"{name}s_in", start=1 + axis, end=2 + axis)
    to_double = {"to": TensorProto.DOUBLE}
    before, after = (
        builder.node("Cast", [value], f"{value.removeprefix(PREFIX)}_double", **to_double) for value in (given, count)
    )
    step = builder.node("Div", [before, after], f"{name}_step")
    half = builder.constant(f"{name}_half", np.array([0.5]))
    first = builder.node("Mul", [step, half], f"{name}_first")
    others = builder.node("Sub", [count, builder.constant(f"{name}_one", np.array([1], np.int64))], f"{name}_others")
    steps = builder.node(
        "Concat", [first, builder.node("Expand", [step, others], f"{name}_rest")], f"{name}_steps", axis=0
    )
    centres = builder.node(
        "CumSum", [steps, builder.constant(f"{name}_axis", np.array(0, np.int64))], f"{name}_centres"
    )
    return builder.node("Cast", [centres], f"{name}_index", to=TensorProto.INT64)


def _normalize(builder: _Builder, planes: str, preprocessing: Preprocessing) -> None:
    """(x / 255 - mean) / std as (x - 255 mean) / (255 std)."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    channelwise = (1, preprocessing.channels, 1, 1)
    pixels = builder.node("Cast", [planes], "float_planes", to=TensorProto.FLOAT)
    mean_pixel = builder.constant("mean_pixel", (255 * mean).astype(np.float32).reshape(channelwise))
    centred = builder.node("Sub", [pixels, mean_pixel], "centred")
    scale = builder.constant("inverse_std", (1 / (255 * std)).astype(np.float32).reshape(channelwise))
    builder.node("Mul", [centred, scale], _NORMALIZED.removeprefix(PREFIX))


def add_answers(graph: onnx.GraphProto, *, softmax: bool, top_k: int | None) -> None:
    """Add the outputs that `embed_preprocessing` describes to a graph whose first output is the logits."""
    batch, classes = _shape(graph.output[0])
    if top_k is not None and not (1 <= top_k <= (classes if isinstance(classes, int) else top_k)):
        raise ExportError(f"top_k is {top_k}, the model has {classes} classes; choose from 1 to {classes}")
    graph.node.append(helper.make_node("Softmax", [_LOGITS], ["probabilities"], name="answers/probabilities", axis=-1))
    if softmax:
        graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, classes]))
    if top_k is None:
        return
    graph.initializer.append(numpy_helper.from_array(np.array([top_k], np.int64), "answers/k"))
    names = ["top_k_probabilities", "top_k_indices"]
    graph.node.append(helper.make_node("TopK", ["probabilities", "answers/k"], names, name="answers/top_k", axis=-1))
    for name, kind in zip(names, (TensorProto.FLOAT, TensorProto.INT64), strict=True):
        graph.output.append(helper.make_tensor_value_info(name, kind, [batch, top_k]))
