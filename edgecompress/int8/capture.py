"""A module as a graph: what `torch.export` captures, with the pitfalls of quantizing it removed.

What enters: a float module and an example batch. What leaves: a graph that shares no parameter with the module.
"""

from __future__ import annotations

import copy
import operator
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.multiprocessing.reductions import StorageWeakRef
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from edgecompress import console
from edgecompress.errors import EdgeCompressError, QuantizationError

aten = torch.ops.aten

# What PT2E folds a batch norm into, beside linear layers on matrices.
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}
_TRANSPOSED_GROUPS = 6  # position of `groups` among their arguments
_FOLDING = {
    *(aten.conv1d.default, aten.conv1d.padding),
    *(aten.conv2d.default, aten.conv2d.padding),
    *_TRANSPOSED,
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
        if _writes_through_views(program):
            program = program.run_decompositions({})  # leaves no operator in place
        captured = program.module()
        _restore_batch_norms(captured)
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
                name = str(counted_by[symbol].target).removesuffix(".default")
                raise QuantizationError(
                    f"the model's operator {name} gives as many values as it finds in an image, and the captured "
                    f"graph holds only for some counts ({expression}); return the logits from before {name}, and "
                    "do what follows it outside of the model"
                )


def prepare(captured: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Fold batch norms and put observers where the quantizer wants them (torchao's `prepare_pt2e`).

    Raises QuantizationError where torchao cannot.
    """
    try:
        prepared = prepare_pt2e(captured, quantizer)
    except EdgeCompressError:
        raise
    except Exception as error:  # torchao raises whatever its graph surgery meets
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise QuantizationError(
            f"the model's graph cannot be prepared for int8: torchao stopped with {type(error).__name__}: {lines[0]}; "
            "give it a model of plain Conv2d, Linear and BatchNorm2d modules, unusual batch norms folded beforehand"
        ) from error
    assert isinstance(prepared, GraphModule)
    return prepared


def _writes_through_views(program: torch.export.ExportedProgram) -> bool:
    """Whether a tensor is read that an operator changed in place under another name: `y.flatten(1).relu_(); use(y)`.

    Each reader of a quantized tensor gets floats of its own, so it would not see what was written to another's; and
    an operator whose result nobody reads looks like one that does nothing. `y.relu_(); use(y)` is captured as a read
    of the operator's result.
    """
    written: dict[object, set[Node]] = {}  # memory -> the names under which it holds what was written last
    for node in program.graph.nodes:
        if any(source not in written.get(_memory(source), {source}) for source in node.all_input_nodes):
            return True
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            written[_memory(node)] = {node}
        elif _memory(node) in written:
            written[_memory(node)].add(node)
    return False


def _memory(node: Node) -> object:
    """What tensors that are views of each other have in common; None for what is no tensor."""
    value = node.meta.get("val")
    return StorageWeakRef(value.untyped_storage()) if isinstance(value, Tensor) else None  # type: ignore[no-untyped-call]


def _restore_batch_norms(captured: GraphModule) -> None:
    """Batch norms as `torch.export` writes them, where `run_decompositions` made operators of three outputs of them."""
    for node in [n for n in captured.graph.nodes if n.target is aten._native_batch_norm_legit_no_training.default]:
        (norm,) = node.users
        with captured.graph.inserting_before(node):
            arguments = (*node.args[:5], False, *node.args[5:7], False)
            restored = captured.graph.call_function(aten.batch_norm.default, arguments)
        restored.meta = dict(norm.meta)
        norm.replace_all_uses_with(restored)
        captured.graph.erase_node(norm)
        captured.graph.erase_node(node)
    captured.recompile()


def _free_batch_norms(captured: GraphModule) -> None:
    """Write each batch norm that cannot be folded as operators equal to it up to float rounding.

    There is no integer batch norm, but a 1x1 depthwise convolution is QLinearConv, takes the relu behind it along, and
    its one weight a channel is exact in int8. Batch norms of that kind stand before their convolution (DenseNet) or
    behind a convolution that others read too, where PT2E would fold all the same and change what those read.
    """
    for node in [node for node in captured.graph.nodes if node.target is aten.batch_norm.default]:
        value, uses_batch_statistics = node.args[0].meta.get("val"), node.args[5]
        if value is None:
            continue
        is_folded = _is_folded(node.args[0], value.dim())
        if uses_batch_statistics:
            norm = _unfoldable(captured, node)
        elif is_folded and _may_be_folded(node.args[0]):
            continue
        elif value.dim() == 4:
            norm = _as_convolution(captured, node)
        elif is_folded:
            norm = _as_product_and_sum(captured, node, value.dim())
        else:
            continue
        node.replace_all_uses_with(norm)
        captured.graph.erase_node(node)
    captured.recompile()


def _is_folded(layer: Node, axes: int) -> bool:
    """Whether PT2E folds a batch norm of a tensor with so many axes into the layer that gives it, rightly or not."""
    return layer.target in _FOLDING or (layer.target is aten.linear.default and axes == 2)


def _may_be_folded(layer: Node) -> bool:
    """Whether that is right: nobody else reads the layer, its weights are constants, and PT2E finds their channels."""
    is_transposed = layer.target in _TRANSPOSED
    groups = layer.args[_TRANSPOSED_GROUPS] if is_transposed and len(layer.args) > _TRANSPOSED_GROUPS else 1
    parameters = [argument for argument in layer.args[1:3] if isinstance(argument, Node)]
    return len(layer.users) == 1 and bool(groups == 1) and all(parameter.op == "get_attr" for parameter in parameters)


def _unfoldable(captured: GraphModule, node: Node) -> Node:
    """A batch norm by the batch's own statistics, under the operator that PT2E does not try to fold."""
    arguments: list[Any] = list(node.args)
    source, weight, bias, _, _, _, momentum, epsilon, *_ = arguments
    with captured.graph.inserting_before(node):
        whole = captured.graph.call_function(
            aten._native_batch_norm_legit.no_stats, (source, weight, bias, True, momentum, epsilon)
        )
        norm = captured.graph.call_function(operator.getitem, (whole, 0))
    whole.meta = {key: fact for key, fact in node.meta.items() if key != "val"}
    norm.meta = dict(node.meta)
    return norm


def _as_convolution(captured: GraphModule, node: Node) -> Node:
    """A batch norm of maps [N, C, H, W] as a 1x1 depthwise convolution."""
    factor, shift = _factor_and_shift(captured, node)
    with captured.graph.inserting_before(node):
        weight = _new_parameter(captured, f"_{node.name}_weight", factor.view(-1, 1, 1, 1))
        bias = _new_parameter(captured, f"_{node.name}_bias", shift)
        settings = ([1, 1], [0, 0], [1, 1], len(factor))
        convolution = captured.graph.call_function(aten.conv2d.default, (node.args[0], weight, bias, *settings))
    convolution.meta = dict(node.meta)
    return convolution


def _as_product_and_sum(captured: GraphModule, node: Node, axes: int) -> Node:
    """A batch norm of [N, C] or [N, C, L] as x * factor + shift, in float."""
    factor, shift = (part.view(-1, *[1] * (axes - 2)) for part in _factor_and_shift(captured, node))
    with captured.graph.inserting_before(node):
        weight = _new_parameter(captured, f"_{node.name}_weight", factor)
        bias = _new_parameter(captured, f"_{node.name}_bias", shift)
        product = captured.graph.call_function(aten.mul.Tensor, (node.args[0], weight))
        total = captured.graph.call_function(aten.add.Tensor, (product, bias))
    product.meta, total.meta = dict(node.meta), dict(node.meta)
    return total


def _factor_and_shift(captured: GraphModule, node: Node) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies each channel by, and what it adds then; in float64."""
    arguments: list[Any] = list(node.args)
    _, weight, bias, mean_name, variance_name, _, _, epsilon, *_ = arguments
    mean, variance = (_tensor(captured, name).double() for name in (mean_name, variance_name))
    factor = torch.rsqrt(variance + epsilon)
    if weight is not None:
        factor = factor * _tensor(captured, weight).double()
    shift = -mean * factor
    if bias is not None:
        shift = shift + _tensor(captured, bias).double()
    return factor, shift


def _new_parameter(captured: GraphModule, name: str, value: Tensor) -> Node:
    captured.register_parameter(name, nn.Parameter(value.float(), requires_grad=False))
    node = captured.graph.get_attr(name)
    node.meta = {}
    return node


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
