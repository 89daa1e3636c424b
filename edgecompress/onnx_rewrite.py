"""Exact rewrites of an exported ONNX graph towards operators that have an integer kernel.

What enters: an ONNX model as the exporter wrote it. What leaves: the same function with fewer or faster nodes.
Each rewrite is equal in exact arithmetic: zero padding moves into the convolution, where the zero point pads
for free, and a mean over height and width becomes GlobalAveragePool (ReduceMean has no integer kernel in ONNX
Runtime, GlobalAveragePool has).
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
    made = {"pad_into_conv": _pads_into_convs(model.graph), "mean_as_global_pool": _means_as_pools(model.graph)}
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


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Drop initializers and value infos that no node reads any more."""
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    written = {name for node in graph.node for name in node.output}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
    for value in [v for v in graph.value_info if v.name not in written]:
        graph.value_info.remove(value)
