"""A module as a graph: what `torch.export` captures, with the pitfalls of quantizing it removed.

What enters: a float module and an example batch. What leaves: a graph that shares no parameter with the module.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from edgecompress import console
from edgecompress.errors import QuantizationError

aten = torch.ops.aten

# What PT2E folds a batch norm into.
_FOLDING = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
}
_SCALABLE = {aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
_VIEWS = {aten.reshape.default, aten.view.default, aten.unsqueeze.default}


def capture(module: nn.Module, example: Tensor) -> GraphModule:
    """Capture a module with `torch.export`, batch dimension dynamic. Works on a deep copy.

    The copy matters: a captured graph shares its parameters with the module, and PT2E folds batch norm into
    them. `example` is a float batch [N, C, H, W] with N at least 2.
    """
    twin = copy.deepcopy(module).eval().to("cpu").float().to(memory_format=torch.contiguous_format)
    try:
        with console.busy("capturing the model"), _failures_unprinted():
            program = torch.export.export(twin, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        captured = program.module()
        _free_batch_norms(captured)
        _unshare_weights(captured)
        _fold_layer_scales(captured)
    except Exception as error:  # torch.export raises many unrelated types for code it cannot trace
        raise QuantizationError(
            f"the model cannot be captured by torch.export: {_why_not_captured(error)}; "
            "its forward must not depend on tensor values, and must take one image batch of any size"
        ) from error
    assert isinstance(captured, GraphModule)
    _require_any_count(captured)
    return captured


@contextmanager
def _failures_unprinted() -> Iterator[None]:
    """Within the block torch.export does not tell of its internals when it gives up, nor print the graph so far.

    It prints to stderr, where this package's own progress is shown at the same time, so the stream cannot be caught.
    Its logs are silenced here, since torch sets their levels when it is imported, which may be after a command began.
    """
    from torch.export import _trace  # slow to import, and export imports it too

    unprinted = patch.object(_trace, "print", lambda *_, **__: None, create=True)
    with console.library_logs_silenced(), unprinted, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`create_unbacked_symint` is deprecated")  # torchvision's nms
        yield


def _why_not_captured(error: Exception) -> str:
    """The reason in one line, with the place in the model's code where torch names it."""
    text = str(error).strip()
    place = re.search(r'raised this error:\s+File "(.+)", line (\d+), in (\w+)', text)
    where = f" ({place[1]}, line {place[2]}, in {place[3]})" if place else ""
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"it branches on the values of a tensor{where}"
    return f"{text.splitlines()[0] if text else type(error).__name__}{where}"


def _require_any_count(captured: GraphModule) -> None:
    """Refuse a graph that runs only where an operator such as nms happens to find enough in an image.

    Operators whose output's size depends on values (nms, nonzero, a boolean index) are fine where any size will do.
    torch.export assumes of some that they find two or more, asserts that in the graph, and the first image with
    fewer would end calibration. Raises QuantizationError that names the operator.
    """
    counted_by: dict[object, Node] = {}
    for node in captured.graph.nodes:
        counted_by |= dict.fromkeys(node.meta.get("unbacked_bindings") or (), node)
        condition = node.args[0] if node.target is aten._assert_scalar.default else None
        value = condition.meta.get("val") if isinstance(condition, Node) else None
        if not isinstance(value, torch.SymBool):
            continue
        expression = value.node.expr
        for symbol in expression.free_symbols & counted_by.keys():
            if any(expression.subs(symbol, count) == False for count in (0, 1)):  # noqa: E712  # sympy's own false
                operator = str(counted_by[symbol].target).removesuffix(".default")
                raise QuantizationError(
                    f"the model's operator {operator} gives as many values as it finds in an image, and the captured "
                    f"graph holds only for some counts ({expression}); return the logits from before {operator}, and "
                    "do what follows it outside of the model"
                )


def _free_batch_norms(captured: GraphModule) -> None:
    """Turn each batch norm that cannot be folded into a 1x1 depthwise convolution, equal up to float rounding.

    There is no integer batch norm, but a depthwise convolution is QLinearConv, takes the relu behind it along, and
    its one weight a channel is exact in int8. Batch norms of that kind stand before their convolution (DenseNet)
    or behind a convolution that others read too, where PT2E would fold all the same and change what those read.
    """
    for node in [node for node in captured.graph.nodes if node.target is aten.batch_norm.default]:
        source, *names = node.args[:5]
        if source.target in _FOLDING and len(source.users) == 1:
            continue
        value, training, epsilon = source.meta.get("val"), node.args[5], node.args[7]
        if value is None or value.dim() != 4 or training:
            continue
        mean, variance = (_tensor(captured, name).double() for name in names[2:])
        factor = torch.rsqrt(variance + epsilon)
        if names[0] is not None:
            factor = factor * _tensor(captured, names[0]).double()
        shift = -mean * factor
        if names[1] is not None:
            shift = shift + _tensor(captured, names[1]).double()
        constants = {"weight": factor.view(-1, 1, 1, 1), "bias": shift}
        with captured.graph.inserting_before(node):
            arguments = []
            for kind, constant in constants.items():
                name = f"_{node.name}_{kind}"
                captured.register_parameter(name, nn.Parameter(constant.float(), requires_grad=False))
                arguments.append(captured.graph.get_attr(name))
                arguments[-1].meta = {}
            settings = ([1, 1], [0, 0], [1, 1], len(mean))
            convolution = captured.graph.call_function(aten.conv2d.default, (source, *arguments, *settings))
        convolution.meta = dict(node.meta)
        node.replace_all_uses_with(convolution)
        captured.graph.erase_node(node)
    captured.recompile()


def _fold_layer_scales(captured: GraphModule) -> None:
    """A constant factor for each channel behind a layer goes into its weights (ConvNeXt's and CaiT's layer scale).

    Saves the product, and the rounding of a tensor before it. Weights must be shared by no other layer.
    """
    for node in [node for node in captured.graph.nodes if node.target in (aten.mul.Tensor, aten.mul_.Tensor)]:
        for value, factor in (node.args, node.args[::-1]):
            if isinstance(value, Node) and isinstance(factor, Node) and _fold_factor(captured, value, factor):
                node.replace_all_uses_with(value)
                captured.graph.erase_node(node)
                break
    captured.graph.eliminate_dead_code()
    captured.recompile()


def _fold_factor(captured: GraphModule, value: Node, factor: Node) -> bool:
    """Multiply the layer that gives `value`, perhaps through dropouts, by a constant; whether that was possible."""
    layer = value
    while layer.target in (aten.dropout.default, aten.dropout_.default) and len(layer.users) == 1:
        assert isinstance(layer.args[0], Node)
        layer = layer.args[0]
    constant = _constant(captured, factor)
    if constant is None or layer.target not in _SCALABLE or len(layer.users) != 1 or len(value.users) != 1:
        return False
    parameters = [argument for argument in layer.args[1:3] if isinstance(argument, Node)]
    if any(parameter.op != "get_attr" for parameter in parameters):
        return False
    tensors = [_tensor(captured, parameter) for parameter in parameters]
    result = layer.meta.get("val")
    channel_axis = -1 if layer.target is aten.linear.default else -3
    if result is None or not _scales_channels(constant, result.dim(), channel_axis, len(tensors[0])):
        return False
    flat = constant.flatten()
    for tensor in tensors:
        tensor.copy_(tensor * flat.view(-1, *[1] * (tensor.dim() - 1)))
    return True


def _scales_channels(constant: Tensor, axes: int, channel_axis: int, channels: int) -> bool:
    """Whether a factor of a layer's output, which has so many axes, is one for all of it or one a channel.

    A factor with more axes, or with more channels than the one there is, would give the product another shape.
    """
    shape = [1] * (axes - constant.dim()) + list(constant.shape)
    return len(shape) == axes and shape[channel_axis] in (1, channels) and constant.numel() == shape[channel_axis]


def _constant(captured: GraphModule, node: Node) -> Tensor | None:
    """The value of a parameter, perhaps seen in another shape, or None."""
    if node.op == "get_attr":
        return _tensor(captured, node)
    if node.target not in _VIEWS or not isinstance(node.args[0], Node):
        return None
    source = _constant(captured, node.args[0])
    if source is None or any(isinstance(argument, Node) for argument in node.args[1:]):
        return None
    assert callable(node.target)
    shaped = node.target(source, *node.args[1:])
    assert isinstance(shaped, Tensor)
    return shaped


def _tensor(captured: GraphModule, node: Node) -> Tensor:
    folder, _, leaf = str(node.target).rpartition(".")
    value = getattr(captured.get_submodule(folder), leaf)
    assert isinstance(value, Tensor)
    return value.detach()


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
