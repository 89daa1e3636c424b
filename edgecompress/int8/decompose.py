"""Operators as others that integer kernels can do.

What enters: a captured float graph. What leaves: the same function, with x * hard_sigmoid(x) for hard-swish and
x * sigmoid(x) for SiLU, linear layers on matrices only, and padding by itself before average pools that overhang.
Hard-swish and SiLU have no integer kernel in ONNX Runtime, but both factors have: a product is QLinearMul, a sigmoid
QLinearSigmoid (a table), and a hard-sigmoid a saturating requantization (`onnx_rewrite`). Done before annotation, so
that every graph made from this one has the same node names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_GATES = {
    aten.hardswish.default: aten.hardsigmoid.default,
    aten.hardswish_.default: aten.hardsigmoid.default,
    aten.silu.default: aten.sigmoid.default,
    aten.silu_.default: aten.sigmoid.default,
}
_IN_PLACE = {aten.hardswish_.default, aten.silu_.default}
# An average pool's input, kernel, stride (none: the kernel), padding, ceil_mode, count_include_pad, divisor_override.
_POOL_DEFAULTS: tuple[Any, ...] = (None, None, [], [0, 0], False, True, None)


def decompose_activations(model: GraphModule) -> GraphModule:
    """Replace hard-swish and SiLU in place; returns `model`.

    One that overwrites a tensor which others read too is left alone, since they may read what it wrote.
    """
    for node in list(model.graph.nodes):
        gate = _GATES.get(node.target)
        source = node.args[0] if node.args else None
        if gate is None or not isinstance(source, Node) or (node.target in _IN_PLACE and len(source.users) > 1):
            continue
        with model.graph.inserting_before(node):
            share = model.graph.call_function(gate, (source,))
            product = model.graph.call_function(aten.mul.Tensor, (source, share))
        share.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        model.graph.erase_node(node)
    model.recompile()
    return model


def flatten_linears(model: GraphModule) -> GraphModule:
    """Give linear layers on [N, T, C] or more axes a matrix [N * T, C]; returns `model`.

    On a matrix they are exported as Gemm and run as QGemm, bias included; otherwise as MatMul, whose integer kernel
    leaves the bias to a float addition. Reshaping copies nothing.
    """
    for node in [node for node in model.graph.nodes if node.target is aten.linear.default]:
        source = node.args[0]
        value, result = source.meta.get("val"), node.meta.get("val")
        if value is None or result is None or value.dim() < 3 or not all(isinstance(n, int) for n in result.shape[1:]):
            continue
        with model.graph.inserting_before(node):
            flat = model.graph.call_function(aten.reshape.default, (source, [-1, value.shape[-1]]))
        with model.graph.inserting_after(node):
            shaped = model.graph.call_function(aten.reshape.default, (node, [-1, *result.shape[1:]]))
        node.replace_all_uses_with(shaped, delete_user_cb=lambda user, shaped=shaped: user is not shaped)
        node.replace_input_with(source, flat)
        shaped.meta, flat.meta = dict(node.meta), {**source.meta, "val": value.flatten(0, -2)}
        node.meta["val"] = result.flatten(0, -2)
    model.recompile()
    return model


def pad_pools(model: GraphModule) -> GraphModule:
    """Pad by an operator of its own before average pools whose last window reaches beyond the padding; returns `model`.

    Such windows come from ceil_mode. PyTorch divides their sum by the cells within the padding, ONNX Runtime's integer
    kernel (QLinearAveragePool) by all of the window's. It runs even where the pool is left in float, since the runtime
    moves quantization towards it. With only true cells counted, on a map that was padded before, both do the same.
    """
    for node in [node for node in model.graph.nodes if node.target is aten.avg_pool2d.default]:
        source = node.args[0]
        before, after = source.meta.get("val"), node.meta.get("val")
        kernel, stride, padding, _, counts_padding, divisor = [*node.args, *_POOL_DEFAULTS[len(node.args) :]][1:]
        if before is None or after is None or divisor is not None or not counts_padding:
            continue
        kernel, stride, padding = (list(sizes) * (2 // len(sizes)) for sizes in (kernel, stride or kernel, padding))
        axes = list(zip(before.shape[-2:], after.shape[-2:], kernel, stride, padding, strict=True))
        # Where the last window ends, from the padded map's first cell.
        ends = [(windows - 1) * step + width for _, windows, width, step, _ in axes]
        if all(end <= size + 2 * pad for end, (size, *_, pad) in zip(ends, axes, strict=True)):
            continue
        if any(padding):
            # No more behind the map than windows need, or there would be room for another one.
            behind = [max(0, min(pad, end - size - pad)) for end, (size, *_, pad) in zip(ends, axes, strict=True)]
            with model.graph.inserting_before(node):
                sides = [padding[1], behind[1], padding[0], behind[0]]
                padded = model.graph.call_function(aten.constant_pad_nd.default, (source, sides, 0.0))
            padded.meta = {**node.meta, "val": aten.constant_pad_nd.default(before, sides, 0.0)}
            source = padded
        node.args = (source, kernel, stride, [0, 0], True, False)
    model.recompile()
    return model
