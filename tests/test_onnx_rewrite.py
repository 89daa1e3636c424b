"""Graph rewrites: the same outputs with fewer nodes, and hands off where they would change something."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgecompress.exporting.onnx_rewrite import rewrite
from edgecompress.measure.integer_graph import inspect_integer_graph

SHAPE = [2, 3, 7, 9]
PAD = [0, 0, 0, 1, 0, 0, 2, 3]  # begins of each axis, then ends: nothing above, 1 left, 2 below, 3 right


class Graph:
    """A small graph under construction; operators return the name of their output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.outputs: list[str] = []
        self.generator = np.random.default_rng(0)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"node_{output}", **attributes))
        return output

    def pad(self, source: str, pads: list[int] = PAD, value: float | None = 0.0, **attributes: Any) -> str:
        inputs = [source, self.constant(pads, np.int64)]
        return self.node("Pad", *inputs, *([] if value is None else [self.constant(value)]), **attributes)

    def conv(self, source: str, channels: int = 3, **attributes: Any) -> str:
        weight = self.generator.normal(size=(4, channels, 3, 3))
        return self.node("Conv", source, self.constant(weight), **attributes)

    def quantize(self, source: str, scale: float = 0.03, zero_point: int = 117, dtype: Any = np.uint8) -> str:
        return self.node("QuantizeLinear", source, self.constant(scale), self.constant(zero_point, dtype))

    def dequantize(self, source: str, scale: float = 0.03, zero_point: int = 117, dtype: Any = np.uint8) -> str:
        return self.node("DequantizeLinear", source, self.constant(scale), self.constant(zero_point, dtype))

    def pair(self, source: str, scale: float = 0.03, zero_point: int = 117) -> str:
        return self.dequantize(self.quantize(source, scale, zero_point), scale, zero_point)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE[1:]])],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            self.constants,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        made = onnx.shape_inference.infer_shapes(made, strict_mode=True)
        onnx.checker.check_model(made)
        return made


def outputs(model: onnx.ModelProto, *, optimized: bool) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    made: list[np.ndarray] = session.run(None, {"input": batch})
    return made


def rewritten(model: onnx.ModelProto, *, tie: float = 0.0) -> tuple[dict[str, int], Counter[str]]:
    """Rewrite, check that the outputs stayed, and count what is left.

    Integers must be equal; one in twenty may move by `tie`, the step of a value that lay just between two.
    """
    before = [outputs(model, optimized=optimized) for optimized in (False, True)]
    integers = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    made = rewrite(model)
    onnx.checker.check_model(model, full_check=True)
    for optimized, wanted in zip((False, True), before, strict=True):
        for left, right in zip(wanted, outputs(model, optimized=optimized), strict=True):
            if tie:
                assert np.abs(left - right).max() <= 1.001 * tie
                assert (left != right).mean() < 0.05
            elif integers:
                np.testing.assert_array_equal(left, right)
            else:
                np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    used = {name for node in model.graph.node for name in node.input}
    assert all(tensor.name in used for tensor in model.graph.initializer)
    return made, Counter(node.op_type for node in model.graph.node)


def counts(*, pads: int = 0, means: int = 0, sums: int = 0, gelus: int = 0) -> dict[str, int]:
    return {
        "pad_into_conv": pads,
        "mean_as_global_pool": means,
        "hard_sigmoid_as_sum": sums,
        "gelu_regrouped": gelus,
    }


def pads_of_conv(model: onnx.ModelProto) -> list[int]:
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    return next(list(attribute.ints) for attribute in conv.attribute if attribute.name == "pads")


@pytest.mark.parametrize("own", [None, [1, 1, 1, 1], [0, 2, 1, 0]])
@pytest.mark.parametrize("value", [0.0, None])
def test_float_pad_moves_into_the_convolution(own: list[int] | None, value: float | None) -> None:
    graph = Graph()
    attributes = {} if own is None else {"pads": own}
    model = graph.model(graph.conv(graph.pad("input", value=value), strides=[2, 1], **attributes))
    made, left = rewritten(model)
    assert made == counts(pads=1)
    assert left == {"Conv": 1}
    assert pads_of_conv(model) == [a + b for a, b in zip(own or [0, 0, 0, 0], [0, 1, 2, 3], strict=True)]


def test_two_pads_in_a_row_both_move() -> None:
    graph = Graph()
    model = graph.model(graph.conv(graph.pad(graph.pad("input"), [0, 0, 1, 1, 0, 0, 1, 1])))
    made, left = rewritten(model)
    assert made["pad_into_conv"] == 2
    assert left == {"Conv": 1}
    assert pads_of_conv(model) == [1, 2, 3, 4]


def test_pad_between_integers_moves_and_its_pair_goes() -> None:
    graph = Graph()
    inner = graph.pair(graph.pad(graph.pair("input")))
    made, left = rewritten(graph.model(graph.quantize(graph.conv(inner), 0.1, 128)))
    assert made["pad_into_conv"] == 1
    assert left == {"QuantizeLinear": 2, "DequantizeLinear": 1, "Conv": 1}


def test_pad_before_the_first_quantize_moves_and_the_pair_stays() -> None:
    graph = Graph()
    made, left = rewritten(graph.model(graph.quantize(graph.conv(graph.pair(graph.pad("input"))), 0.1, 128)))
    assert made["pad_into_conv"] == 1
    assert left == {"QuantizeLinear": 2, "DequantizeLinear": 1, "Conv": 1}


def _second_reader(graph: Graph) -> list[str]:
    padded = graph.pad("input")
    return [graph.conv(padded), graph.node("Neg", padded)]


def _second_reader_of_pair(graph: Graph) -> list[str]:
    inner = graph.pair(graph.pad(graph.pair("input")))
    return [graph.conv(inner), graph.node("Neg", inner)]


def _second_reader_of_integers(graph: Graph) -> list[str]:
    integers = graph.quantize(graph.pad(graph.pair("input")))
    return [graph.conv(graph.dequantize(integers)), graph.dequantize(integers)]


def _pad_is_an_output(graph: Graph) -> list[str]:
    padded = graph.pad("input")
    return [graph.conv(padded), padded]


def _pair_is_an_output(graph: Graph) -> list[str]:
    inner = graph.pair(graph.pad(graph.pair("input")))
    return [graph.conv(inner), inner]


def _read_back_at_another_scale(graph: Graph) -> list[str]:
    integers = graph.quantize(graph.pad(graph.pair("input")))
    return [graph.conv(graph.dequantize(integers, 0.06, 117))]


def _read_back_at_another_zero_point(graph: Graph) -> list[str]:
    integers = graph.quantize(graph.pad(graph.pair("input")))
    return [graph.conv(graph.dequantize(integers, 0.03, 100))]


HANDS_OFF_PADS = {
    "value": lambda graph: [graph.conv(graph.pad("input", value=0.5))],
    "value of integers": lambda graph: [graph.conv(graph.pair(graph.pad(graph.pair("input"), value=0.3)))],
    "reflect": lambda graph: [graph.conv(graph.pad("input", value=None, mode="reflect"))],
    "edge": lambda graph: [graph.conv(graph.pad("input", value=None, mode="edge"))],
    "channels": lambda graph: [graph.conv(graph.pad("input", [0, 1, 0, 0, 0, 0, 0, 0]), channels=4)],
    "batch": lambda graph: [graph.conv(graph.pad("input", [1, 0, 0, 0, 0, 0, 0, 0]))],
    "crop": lambda graph: [graph.conv(graph.pad("input", [0, 0, -1, 1, 0, 0, 0, 1]))],
    "no conv": lambda graph: [graph.node("Neg", graph.pad("input"))],
    "auto_pad": lambda graph: [graph.conv(graph.pad("input"), auto_pad="SAME_UPPER")],
    "two scales": lambda graph: [graph.conv(graph.pair(graph.pad(graph.pair("input")), 0.05, 117))],
    "two zero points": lambda graph: [graph.conv(graph.pair(graph.pad(graph.pair("input")), 0.03, 90))],
    "second reader": _second_reader,
    "second reader of the pair": _second_reader_of_pair,
    "second reader of integers": _second_reader_of_integers,
    "graph output": _pad_is_an_output,
    "graph output of the pair": _pair_is_an_output,
    "read back at another scale": _read_back_at_another_scale,
    "read back at another zero point": _read_back_at_another_zero_point,
}


@pytest.mark.parametrize("case", HANDS_OFF_PADS)
def test_pads_that_mean_something_else_stay(case: str) -> None:
    graph = Graph()
    model = graph.model(*HANDS_OFF_PADS[case](graph))
    before = [node.SerializeToString() for node in model.graph.node]
    made, _ = rewritten(model)
    assert made == counts()
    assert [node.SerializeToString() for node in model.graph.node] == before


def mean(graph: Graph, source: str, axes: list[int], **attributes: int) -> str:
    return graph.node("ReduceMean", source, graph.constant(axes, np.int64), **attributes)


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [-2, 3]])
@pytest.mark.parametrize("keepdims", [0, 1, None])
def test_mean_over_the_image_becomes_a_pool(axes: list[int], keepdims: int | None) -> None:
    graph = Graph()
    attributes = {} if keepdims is None else {"keepdims": keepdims}
    pooled = mean(graph, graph.node("Neg", "input"), axes, **attributes)
    model = graph.model(graph.node("Neg", pooled))
    made, left = rewritten(model)
    assert made == counts(means=1)
    assert left == {"Neg": 2, "GlobalAveragePool": 1} | ({"Flatten": 1} if keepdims == 0 else {})
    assert outputs(model, optimized=False)[0].shape == ((2, 3) if keepdims == 0 else (2, 3, 1, 1))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_integer_mean_becomes_an_integer_pool(keepdims: int) -> None:
    graph = Graph()
    pooled = mean(graph, graph.pair(graph.node("Neg", "input")), [2, 3], keepdims=keepdims)
    model = graph.model(graph.dequantize(graph.quantize(pooled, 0.01, 130), 0.01, 130))
    made, _ = rewritten(model)
    assert made["mean_as_global_pool"] == 1
    index = {output: node for node in model.graph.node for output in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    (pool,) = [node for node in model.graph.node if node.op_type == "GlobalAveragePool"]
    assert index[pool.input[0]].op_type == "DequantizeLinear"
    assert readers[pool.output[0]].op_type == "QuantizeLinear"


def test_two_means_are_both_rewritten() -> None:
    graph = Graph()
    source = graph.node("Neg", "input")
    model = graph.model(mean(graph, source, [2, 3], keepdims=0), mean(graph, source, [2, 3], keepdims=1))
    made, left = rewritten(model)
    assert made["mean_as_global_pool"] == 2
    assert left == {"Neg": 1, "GlobalAveragePool": 2, "Flatten": 1}


@pytest.mark.parametrize("axes", [[1], [2], [3], [1, 2], [1, 2, 3], [0, 2, 3], [1, -1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_over_other_axes_stay(axes: list[int], keepdims: int) -> None:
    graph = Graph()
    model = graph.model(mean(graph, graph.node("Neg", "input"), axes, keepdims=keepdims))
    made, left = rewritten(model)
    assert made["mean_as_global_pool"] == 0
    assert left == {"Neg": 1, "ReduceMean": 1}


def test_mean_of_three_axes_stays() -> None:
    graph = Graph()
    shape = graph.constant([0, 3, 63], np.int64)
    model = graph.model(mean(graph, graph.node("Reshape", "input", shape), [1, 2], keepdims=0))
    made, left = rewritten(model)
    assert made["mean_as_global_pool"] == 0
    assert left == {"Reshape": 1, "ReduceMean": 1}


def hard_sigmoid(graph: Graph, source: str, *, scale: float = 1 / 255, zero_point: int = 0, **attributes: Any) -> str:
    """Between integers: quantized to `scale` and read back."""
    attributes = {"alpha": 1 / 6, "beta": 0.5} | attributes
    return graph.pair(graph.node("HardSigmoid", source, **attributes), scale, zero_point)


def quantized_conv(graph: Graph, source: str) -> str:
    """A convolution of integers with an int32 bias at the accumulator's scale, per channel."""
    weight = graph.generator.integers(-127, 128, size=(4, 3, 3, 3))
    scales = np.array([0.01, 0.02, 0.005, 0.03], np.float32)
    zeros = graph.constant([0] * 4, np.int8)
    read_weight = graph.node("DequantizeLinear", graph.constant(weight, np.int8), graph.constant(scales), zeros, axis=0)
    bias = graph.constant([-4000, 0, 900, 12000], np.int32)
    read_bias = graph.node("DequantizeLinear", bias, graph.constant(0.03 * scales), axis=0)
    return graph.node("Conv", graph.pair(source), read_weight, read_bias)


@pytest.mark.parametrize(("alpha", "beta"), [(1 / 6, 0.5), (0.2, 0.5), (1.0, 0.25)])
def test_hard_sigmoid_of_integers_becomes_a_sum(alpha: float, beta: float) -> None:
    graph = Graph()
    model = graph.model(hard_sigmoid(graph, graph.pair("input"), alpha=alpha, beta=beta))
    made, left = rewritten(model, tie=1 / 255)  # zero gives 127.5 steps, and is common
    assert made == counts(sums=1)
    assert left == {"QuantizeLinear": 2, "DequantizeLinear": 3, "Add": 1}


def test_hard_swish_of_integers_stays_the_same_and_runs_on_integers(tmp_path: Path) -> None:
    graph = Graph()
    values = graph.pair("input")
    model = graph.model(graph.pair(graph.node("Mul", values, hard_sigmoid(graph, values))))
    made, _ = rewritten(model)
    assert made == counts(sums=1)
    onnx.save(model, tmp_path / "net.onnx")
    found = inspect_integer_graph(tmp_path / "net.onnx").op_counts
    assert found == {"DequantizeLinear": 1, "QLinearAdd": 1, "QLinearMul": 1, "QuantizeLinear": 1}


def test_hard_sigmoid_behind_a_convolution_costs_nothing() -> None:
    graph = Graph()
    model = graph.model(hard_sigmoid(graph, quantized_conv(graph, "input")))
    wanted = outputs(model, optimized=False)[0]
    assert {0.0, 1.0} < set(np.unique(wanted).tolist())  # both ends clamp, and there is something between
    assert rewrite(model) == counts(sums=1)
    assert "HardSigmoid" not in Counter(node.op_type for node in model.graph.node)
    onnx.checker.check_model(model, full_check=True)
    for optimized in (False, True):
        difference = np.abs(outputs(model, optimized=optimized)[0] - wanted) * 255
        # The 3 in the bias is rounded to a step of the accumulator, which moves a value that sat next to a tie.
        assert difference.max() <= 1.001
        assert (difference > 0.5).mean() < 0.01


def _quantized_twice(graph: Graph) -> list[str]:
    return [graph.pair(hard_sigmoid(graph, graph.pair("input")), 0.02, 3)]


def _hard_sigmoid_is_an_output(graph: Graph) -> list[str]:
    share = graph.node("HardSigmoid", graph.pair("input"), alpha=1 / 6, beta=0.5)
    return [graph.pair(share, 1 / 255, 0), share]


def _integers_are_read_raw(graph: Graph) -> list[str]:
    share = graph.node("HardSigmoid", graph.pair("input"), alpha=1 / 6, beta=0.5)
    return [graph.quantize(share, 1 / 255, 0)]


HANDS_OFF_HARD_SIGMOIDS = {
    "float": lambda graph: [graph.node("HardSigmoid", "input")],
    "float before": lambda graph: [hard_sigmoid(graph, graph.node("Neg", "input"))],
    "narrower": lambda graph: [hard_sigmoid(graph, graph.pair("input"), scale=0.5 / 255)],
    "wider": lambda graph: [hard_sigmoid(graph, graph.pair("input"), scale=2 / 255)],
    "zero point": lambda graph: [hard_sigmoid(graph, graph.pair("input"), zero_point=1)],
    "falling": lambda graph: [hard_sigmoid(graph, graph.pair("input"), alpha=-0.2)],
    "float convolution": lambda graph: [hard_sigmoid(graph, graph.conv("input"))],
    "two pairs": _quantized_twice,
    "graph output": _hard_sigmoid_is_an_output,
    "raw integers": _integers_are_read_raw,
}


@pytest.mark.parametrize("case", HANDS_OFF_HARD_SIGMOIDS)
def test_hard_sigmoids_that_mean_something_else_stay(case: str) -> None:
    graph = Graph()
    model = graph.model(*HANDS_OFF_HARD_SIGMOIDS[case](graph))
    before = [node.SerializeToString() for node in model.graph.node]
    made, _ = rewritten(model)
    assert made == counts()
    assert [node.SerializeToString() for node in model.graph.node] == before


def gelu(graph: Graph, source: str, *, half: float = 0.5, one: float = 1.0, root: float = 2**0.5) -> str:
    """As the exporter writes it."""
    error = graph.node("Erf", graph.node("Div", source, graph.constant(root)))
    share = graph.node("Mul", graph.constant(half), graph.node("Add", error, graph.constant(one)))
    return graph.node("Mul", source, share)


@pytest.mark.parametrize("integers", [False, True])
def test_gelu_becomes_one_kernel(tmp_path: Path, integers: bool) -> None:
    graph = Graph()
    source = graph.pair("input") if integers else graph.node("Neg", "input")
    activated = gelu(graph, source)
    model = graph.model(graph.pair(activated, 0.02, 9) if integers else activated)
    made, _ = rewritten(model)
    assert made == counts(gelus=1)
    onnx.save(model, tmp_path / "net.onnx")
    found = inspect_integer_graph(tmp_path / "net.onnx").op_counts
    if integers:
        assert found == {"QuantizeLinear": 2, "DequantizeLinear": 2, "Mul": 1, "Gelu": 1}
    else:
        assert found == {"Neg": 1, "Gelu": 1}


def test_gelu_of_a_tensor_that_others_read_keeps_its_scale() -> None:
    graph = Graph()
    source = graph.pair("input")
    activated = graph.pair(gelu(graph, source), 0.02, 9)
    made, left = rewritten(graph.model(activated, graph.node("Neg", source)))
    assert made == counts(gelus=1)
    assert left["DequantizeLinear"] == 2
    assert left["Mul"] == 2


def _share_is_an_output(graph: Graph) -> list[str]:
    source = graph.node("Neg", "input")
    product = gelu(graph, source)
    return [product, graph.nodes[-1].input[1]]


HANDS_OFF_GELUS = {
    "other half": lambda graph: [gelu(graph, "input", half=0.4)],
    "other one": lambda graph: [gelu(graph, "input", one=2.0)],
    "other root": lambda graph: [gelu(graph, "input", root=1.5)],
    "graph output": _share_is_an_output,
    "another factor": lambda graph: [graph.node("Mul", graph.node("Neg", "input"), graph.node("Erf", "input"))],
}


@pytest.mark.parametrize("case", HANDS_OFF_GELUS)
def test_what_is_no_gelu_stays(case: str) -> None:
    graph = Graph()
    model = graph.model(*HANDS_OFF_GELUS[case](graph))
    before = [node.SerializeToString() for node in model.graph.node]
    made, _ = rewritten(model)
    assert made == counts()
    assert [node.SerializeToString() for node in model.graph.node] == before
