"""The names of an ONNX file's nodes, and the modules they stand for.

What enters: a file as the exporter wrote it, or any file at all. What leaves: nodes called `module/Operator`, so that
ONNX Runtime's profile, Netron and error messages speak of `layer1.0.conv1` and not of `node_Conv_294`; and the way back
from a node to its module, for files of other exporters too.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's own record of the modules around a node
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_MODEL = "model"  # what belongs to no module in particular


def name_nodes(model: onnx.ModelProto) -> None:
    """Call every node `module/Operator`, or `module/Operator_2` where a module has several.

    Modules come from the exporter's metadata, or for a layer whose batch norm was folded into it from its weight's
    name; what has neither (rounding, nodes of a rewrite) belongs to what it reads, weights' rounding to the layer.
    """
    modules = _modules(model.graph)
    counts: Counter[str] = Counter()
    for node, module in zip(model.graph.node, modules, strict=True):
        name = f"{module or _MODEL}/{node.op_type}"
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def modules_of(model: onnx.ModelProto) -> dict[str, str]:
    """The module of each node and of each tensor it writes, by name; best effort for files of other exporters.

    Known are our own names, the metadata and the scopes (`/layer1/layer1.0/conv1/Conv`) of PyTorch's exporters, and
    scopes in general; a node without any stands for itself.
    """
    graph = model.graph
    recorded = _modules(graph) if any(_scope(node) for node in graph.node) else [None] * len(graph.node)
    found: dict[str, str] = {}
    for node, module in zip(graph.node, recorded, strict=True):
        name = module or module_in_name(node.name) or node.name or next(iter(node.output), node.op_type)
        found.update(dict.fromkeys((node.name, *node.output), name))
    found.pop("", None)
    return found


def module_in_name(name: str) -> str | None:
    """The module in a node's name: `a.b` of `a.b/Conv_2`, `layer1.0.conv1` of `/layer1/layer1.0/conv1/Conv`."""
    parts = [part for part in name.split("/")[:-1] if part]
    module = ""
    for part in parts:  # PyTorch repeats the name of a Sequential in those of its members
        outer, _, last = module.rpartition(".")
        repeated = bool(last) and part.startswith(f"{last}.")
        module = ".".join(name for name in (outer if repeated else module, part) if name)
    return module or None


def _modules(graph: onnx.GraphProto) -> list[str | None]:
    writers = {output: index for index, node in enumerate(graph.node) for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    modules: list[str | None] = []
    for node in graph.node:
        modules.append(_weight_module(node, constants) or _scope(node))
    # Rounding of a weight comes before its layer, so the layer is looked up from its inputs.
    for index, node in enumerate(graph.node):
        for name in node.input[1:]:
            writer = writers.get(name)
            if writer is not None and modules[writer] is None and set(graph.node[writer].input[:1]) & constants:
                modules[writer] = modules[index]
    for index, node in enumerate(graph.node):
        if modules[index] is None:
            known = [modules[writers[name]] for name in node.input if name in writers]
            modules[index] = next((module for module in known if module), None)
    return modules


def _scope(node: onnx.NodeProto) -> str | None:
    """The innermost module that the exporter recorded; None for the model itself and where nothing is recorded."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    try:
        scopes = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # written by something else
        return None
    return next((str(scope) for scope in reversed(scopes[:-1]) if scope), None) if isinstance(scopes, list) else None


def _weight_module(node: onnx.NodeProto, constants: set[str]) -> str | None:
    if node.op_type not in _WEIGHTED or len(node.input) < 2 or node.input[1] not in constants:
        return None
    name = node.input[1]
    return name.removesuffix(".weight") if name.endswith(".weight") else None
