"""A module as a graph: what `torch.export` captures, with the pitfalls of quantizing it removed.

What enters: a float module and an example batch. What leaves: a graph that shares no parameter with the module.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgecompress.errors import QuantizationError


def capture(module: nn.Module, example: Tensor) -> GraphModule:
    """Capture a module with `torch.export`, batch dimension dynamic. Works on a deep copy.

    The copy matters: a captured graph shares its parameters with the module, and PT2E folds batch norm into
    them. `example` is a float batch [N, C, H, W] with N at least 2.
    """
    twin = copy.deepcopy(module).eval().to("cpu").float().to(memory_format=torch.contiguous_format)
    try:
        program = torch.export.export(twin, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        captured = program.module()
        _unshare_weights(captured)
    except Exception as error:  # torch.export raises many unrelated types for code it cannot trace
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise QuantizationError(
            f"the model cannot be captured by torch.export: {lines[0]}; "
            "its forward must not depend on tensor values, and must take one image batch of any size"
        ) from error
    assert isinstance(captured, GraphModule)
    return captured


def _unshare_weights(captured: GraphModule) -> None:
    """Give every use of a parameter its own copy.

    A layer that runs twice has inputs of two scales, so its int32 bias needs two; and a batch norm after each call
    would be folded into the same weights twice.
    """
    for node in [node for node in captured.graph.nodes if node.op == "get_attr"]:
        folder, _, leaf = str(node.target).rpartition(".")
        owner = captured.get_submodule(folder)
        value = getattr(owner, leaf)
        if not isinstance(value, nn.Parameter):
            continue
        for number, user in enumerate(list(node.users)[1:], start=2):
            owner.register_parameter(f"{leaf}_use{number}", nn.Parameter(value.detach().clone(), requires_grad=False))
            with captured.graph.inserting_before(user):
                own = captured.graph.get_attr(f"{node.target}_use{number}")
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
    captured.recompile()
