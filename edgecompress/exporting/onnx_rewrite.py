"""Exact rewrites of an exported ONNX graph towards operators that have an integer kernel.

What enters: an ONNX model as the exporter wrote it. What leaves: the same function with fewer or faster nodes.
Each rewrite is equal in exact arithmetic: zero padding moves into the convolution, where the zero point pads
for free; a mean over height and width becomes GlobalAveragePool (ReduceMean has no integer kernel in ONNX
Runtime, GlobalAveragePool has); a hard-sigmoid between integers becomes an addition that saturates; and GELU is
written in the order in which ONNX Runtime knows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper


class GraphIndex:
    """Producers, consumers and constants of a graph, by tensor name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.producer = {output: node for node in graph.node for output in node.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or a Constant node, or None."""
        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name])
        node = self.producer.get(name)
        if node is not None and node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    return numpy_helper.to_array(attribute.t)
        return None

    def only_consumer(self, name: str) -> NodeProto | None:
        """The single node that reads a tensor which is no graph output, or None."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def rewrite(model: onnx.ModelProto) -> dict[str, int]:
    """Rewrite `model` in place; returns how often each rewrite was made."""
    made = {
        "pad_into_conv": _pads_into_convs(model.graph),
        "mean_as_global_pool": _means_as_pools(model.graph),
        "hard_sigmoid_as_sum": _hard_sigmoids_as_sums(model.graph),
        "gelu_regrouped": _regroup_gelus(model.graph),
    }
    _remove_unused(model.graph)
    return made


def _attribute(node: NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _remove(graph: onnx.GraphProto, nodes: Iterable[NodeProto]) -> None:
    gone = {id(node) for node in nodes}
    kept = [node for node in graph.node if id(node) not in gone]
    del graph.node[:]
    graph.node.extend(kept)


def _forget_shapes(graph: onnx.GraphProto, names: set[str]) -> None:
    for value in [value for value in graph.value_info if value.name in names]:
        graph.value_info.remove(value)


def _pads_into_convs(graph: onnx.GraphProto) -> int:
    """Pad with zero before Conv, alone or with a quantize-dequantize pair between, becomes Conv's own pads.

    Between the pair, the padded zero is the zero point, which is also what a quantized convolution pads with.
    """
    count = 0
    while True:
        index = GraphIndex(graph)
        found = next((node for node in graph.node if node.op_type == "Pad" and _fold_pad(index, node)), None)
        if found is None:
            return count
        count += 1


def _fold_pad(index: GraphIndex, pad: NodeProto) -> bool:
    mode = _attribute(pad, "mode")
    if mode is not None and mode.s != b"constant":
        return False
    amounts = index.constant(pad.input[1])
    value = index.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
    if amounts is None or value is None or amounts.size != 8 or np.any(value != 0) or len(pad.input) > 3:
        return False
    if np.any(amounts[[0, 1, 4, 5]] != 0) or np.any(amounts < 0):
        return False
    removed = [pad]
    reader, entry = index.only_consumer(pad.output[0]), pad.output[0]
    quantize = None
    if reader is not None and reader.op_type == "QuantizeLinear":
        quantize = reader
        dequantize = index.only_consumer(quantize.output[0])
        if dequantize is None or not _same_scale(index, dequantize, quantize):
            return False
        reader, entry = index.only_consumer(dequantize.output[0]), dequantize.output[0]
        before = index.producer.get(pad.input[0])
        if before is not None and before.op_type == "DequantizeLinear":
            if not _same_scale(index, before, quantize):
                return False  # ONNX Runtime would merge the two scales that then meet, and not exactly
            removed += [quantize, dequantize]  # the values were on this grid before the pad
            quantize = None
    if reader is None or reader.op_type != "Conv" or reader.input[0] != entry:
        return False
    after = reader
    auto_pad = _attribute(after, "auto_pad")
    if auto_pad is not None and auto_pad.s not in (b"NOTSET", b""):
        return False
    own = _attribute(after, "pads")
    old = list(own.ints) if own is not None else [0, 0, 0, 0]
    extra = [int(amounts[i]) for i in (2, 3, 6, 7)]
    if own is not None:
        after.attribute.remove(own)
    after.attribute.append(onnx.helper.make_attribute("pads", [a + b for a, b in zip(old, extra, strict=True)]))
    if quantize is None:
        after.input[0] = pad.input[0]
    else:
        quantize.input[0] = pad.input[0]
        _forget_shapes(index.graph, {quantize.output[0], entry})  # smaller now by the padding
    _remove(index.graph, removed)
    return True


def _same_scale(index: GraphIndex, dequantize: NodeProto, quantize: NodeProto) -> bool:
    if dequantize.op_type != "DequantizeLinear":
        return False
    for left, right in zip(dequantize.input[1:], quantize.input[1:], strict=False):
        a, b = index.constant(left), index.constant(right)
        if a is None or b is None or a.dtype != b.dtype or not np.array_equal(a, b):
            return False
    return len(dequantize.input) == len(quantize.input)


def _means_as_pools(graph: onnx.GraphProto) -> int:
    """ReduceMean over axes 2 and 3 becomes GlobalAveragePool, with Flatten where the axes are not kept.

    The integer pool must give its integers itself, so a Flatten goes behind a quantize-dequantize pair of its own,
    made from the pair that follows the mean: rounding twice to one scale is rounding once.
    """
    shapes = {value.name: value.type.tensor_type.shape for value in graph.value_info}
    index = GraphIndex(graph)
    count = 0
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "ReduceMean":
            continue
        axes = index.constant(node.input[1]) if len(node.input) > 1 else None
        shape = shapes.get(node.input[0])
        if axes is None or shape is None or len(shape.dim) != 4 or sorted(int(a) % 4 for a in axes.flat) != [2, 3]:
            continue
        keep = _attribute(node, "keepdims")
        keeps_axes = keep is None or keep.i == 1
        pooled = node.output[0] if keeps_axes else f"{node.output[0]}_pooled"
        replacement = [onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name)]
        if not keeps_axes:
            quantize = index.only_consumer(node.output[0])
            dequantize = index.only_consumer(quantize.output[0]) if quantize is not None else None
            if (
                quantize is not None
                and dequantize is not None
                and quantize.op_type == "QuantizeLinear"
                and _same_scale(index, dequantize, quantize)
            ):
                for original, suffix in ((quantize, "quantized"), (dequantize, "dequantized")):
                    twin = onnx.NodeProto()
                    twin.CopyFrom(original)
                    twin.name = f"{original.name}_pooled"
                    twin.input[0] = replacement[-1].output[0]
                    twin.output[0] = f"{pooled}_{suffix}"
                    replacement.append(twin)
            behind = replacement[-1].output[0]
            flat = onnx.helper.make_node("Flatten", [behind], [node.output[0]], name=f"{node.name}_flatten", axis=1)
            replacement.append(flat)
        del graph.node[position]
        for new in reversed(replacement):
            graph.node.insert(position, new)
        count += 1
    return count


def _hard_sigmoids_as_sums(graph: onnx.GraphProto) -> int:
    """A hard-sigmoid that is quantized to [0, 1] becomes a sum that is quantized to [0, 6] and read back as [0, 1].

    clip(x / 6 + 1 / 2, 0, 1) / s = clip(x + 3, 0, 6) / (6 s), and quantizing clips by itself. After a convolution
    the 3 goes into the int32 bias, rounded to a step of the accumulator, and the hard-sigmoid costs nothing; after
    other integers the sum is QLinearAdd, which is several times faster than a way through float.
    """
    count = 0
    while True:
        index = GraphIndex(graph)
        found = next((n for n in graph.node if n.op_type == "HardSigmoid" and _saturating_sum(index, n)), None)
        if found is None:
            return count
        count += 1


def _saturating_sum(index: GraphIndex, node: NodeProto) -> bool:
    quantize = index.only_consumer(node.output[0])
    source = index.producer.get(node.input[0])
    if quantize is None or source is None or quantize.op_type != "QuantizeLinear" or len(quantize.input) < 3:
        return False
    scale, zero_point = index.constant(quantize.input[1]), index.constant(quantize.input[2])
    if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype not in (np.uint8, np.int8):
        return False
    limits = np.iinfo(zero_point.dtype)
    if int(zero_point) != limits.min or abs(float(scale) * 255 - 1) > 1e-5 or quantize.output[0] in index.outputs:
        return False
    readers = index.consumers[quantize.output[0]]
    if not all(_same_scale(index, reader, quantize) for reader in readers):
        return False
    if any(after.op_type == "QuantizeLinear" for reader in readers for after in index.consumers[reader.output[0]]):
        return False  # ONNX Runtime would merge the two pairs into one of a single scale
    found_alpha, found_beta = _attribute(node, "alpha"), _attribute(node, "beta")
    alpha = found_alpha.f if found_alpha is not None else 0.2  # the operator's own default
    beta = found_beta.f if found_beta is not None else 0.5
    if alpha <= 0 or beta <= 0:
        return False
    graph, shift = index.graph, np.float32(beta / alpha)
    wider = numpy_helper.from_array((scale / np.float32(alpha)).astype(np.float32), f"{node.output[0]}_unscaled")
    if source.op_type == "DequantizeLinear":
        constant = f"{node.output[0]}_shift"
        names = (f"{constant}_integer", f"{constant}_scale", f"{constant}_zero_point")
        values = (np.array(limits.max, zero_point.dtype), np.array(shift / 255, np.float32), zero_point.reshape(()))
        graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(values, names, strict=True))
        dequantize = onnx.helper.make_node("DequantizeLinear", names, [constant], name=f"{node.name}_shift")
        total = onnx.helper.make_node("Add", [node.input[0], constant], [node.output[0]], name=f"{node.name}_sum")
        quantize.input[1] = wider.name
        position = next(i for i, other in enumerate(graph.node) if other is node)
        del graph.node[position]
        graph.node.insert(position, total)
        graph.node.insert(position, dequantize)
    elif (
        source.op_type == "Conv"
        and index.only_consumer(source.output[0]) is node
        and _raise_bias(index, source, float(shift))
    ):
        quantize.input[0], quantize.input[1] = source.output[0], wider.name
        _remove(graph, [node])
    else:
        return False
    graph.initializer.append(wider)
    return True


def _raise_bias(index: GraphIndex, conv: NodeProto, shift: float) -> bool:
    """Add `shift` to every channel of a quantized convolution, in its int32 bias; whether that was possible."""
    dequantize = index.producer.get(conv.input[2]) if len(conv.input) > 2 else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    bias, scale = index.constant(dequantize.input[0]), index.constant(dequantize.input[1])
    if bias is None or scale is None or bias.dtype != np.int32 or np.any(scale <= 0):
        return False
    raised = bias.astype(np.float64) + np.rint(shift / scale.astype(np.float64))
    if np.abs(raised).max() >= 2**31 or len(index.consumers[dequantize.output[0]]) != 1:
        return False
    # Under a name of its own: the exporter merges equal constants, so others may read the old one.
    name = f"{dequantize.output[0]}_raised"
    index.graph.initializer.append(numpy_helper.from_array(raised.astype(np.int32), name))
    dequantize.input[0] = name
    return True


def _regroup_gelus(graph: onnx.GraphProto) -> int:
    """x * (0.5 * (1 + erf(x / sqrt(2)))) becomes (x * 0.5) * (1 + erf(x / sqrt(2))), which ONNX Runtime fuses into one
    kernel; the exporter's order stays five. Halving is exact in floats, so the results are equal.

    The optimizer gives every reader of a DequantizeLinear its own copy, and then sees two inputs where GELU has one. So
    the scale moves out into a product behind it: (q - z) * 1 * s is what DequantizeLinear computes.
    """
    index = GraphIndex(graph)
    count = 0
    for erf in [node for node in graph.node if node.op_type == "Erf"]:
        found = _gelu_around(index, erf)
        if found is None:
            continue
        divide, half, product = found
        value, one_more = divide.input[0], next(name for name in half.input if index.constant(name) is None)
        factor = next(name for name in half.input if name != one_more)
        half.input[:] = [value, factor]
        product.input[:] = [half.output[0], one_more]
        dequantize = index.producer.get(value)
        scale = index.constant(dequantize.input[1]) if dequantize is not None and len(dequantize.input) > 1 else None
        count += 1
        has_other_readers = len(index.consumers[value]) > 2 or value in index.outputs  # who may want the pair whole
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or has_other_readers:
            continue
        if scale is not None and scale.size == 1:
            _split_scale(graph, dequantize, scale)
    return count


def _gelu_around(index: GraphIndex, erf: NodeProto) -> tuple[NodeProto, NodeProto, NodeProto] | None:
    """The division, the halving and the last product of the GELU that `erf` belongs to, or None."""
    divide, add = index.producer.get(erf.input[0]), index.only_consumer(erf.output[0])
    half = index.only_consumer(add.output[0]) if add is not None else None
    product = index.only_consumer(half.output[0]) if half is not None else None
    if divide is None or add is None or half is None or product is None:
        return None
    if [node.op_type for node in (divide, add, half, product)] != ["Div", "Add", "Mul", "Mul"]:
        return None
    for node, wanted in ((divide, 2**0.5), (add, 1.0), (half, 0.5)):
        constants = [value for value in map(index.constant, node.input) if value is not None]
        if len(constants) != 1 or constants[0].size != 1 or abs(float(constants[0].reshape(())) - wanted) > 1e-6:
            return None
    if index.only_consumer(divide.output[0]) is not erf or index.constant(divide.input[1]) is None:
        return None
    return (divide, half, product) if sorted(product.input) == sorted([divide.input[0], half.output[0]]) else None


def _split_scale(graph: onnx.GraphProto, dequantize: NodeProto, scale: np.ndarray) -> None:
    value = dequantize.output[0]
    graph.initializer.append(numpy_helper.from_array(np.ones_like(scale), f"{value}_unit"))
    product = onnx.helper.make_node(
        "Mul", [f"{value}_steps", dequantize.input[1]], [value], name=f"{dequantize.name}_scale"
    )
    dequantize.input[1], dequantize.output[0] = f"{value}_unit", f"{value}_steps"
    position = next(i for i, other in enumerate(graph.node) if other is dequantize)
    graph.node.insert(position + 1, product)


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Drop initializers and value infos that no node reads any more."""
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    written = {name for node in graph.node for name in node.output}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
    for value in [v for v in graph.value_info if v.name not in written]:
        graph.value_info.remove(value)
