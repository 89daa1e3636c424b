"""Operators as others that integer kernels can do.

What enters: a captured float graph. What leaves: the same function, with x * hard_sigmoid(x) for hard-swish and
x * sigmoid(x) for SiLU, and linear layers on matrices only. Hard-swish and SiLU have no integer kernel in ONNX
Runtime, but both factors have: a product is QLinearMul, a sigmoid QLinearSigmoid (a table), and a hard-sigmoid a
saturating requantization (`onnx_rewrite`). Done before annotation, so that every graph made from this one has the
same node names.
"""

from __future__ import annotations

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
