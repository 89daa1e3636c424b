"""Quantization-aware training: an int8 graph whose weights and scales learn.

What enters: an int8 model made by post-training quantization. What leaves: `TrainableInt8`, the same graph with float
weights, biases and steps to train, and from it an int8 model with the same nodes and better numbers. So export,
parity and the files on disk cannot tell which way a model was made, and training begins exactly where post-training
quantization ended.

Batch norm is folded before training, hence frozen: on a graph already at float's accuracy, its moving statistics would
only add noise (torchao's own recipe freezes them too, but later). Steps are learned (Esser et al., 2020, "Learned
Step Size Quantization"); zero points stay where calibration found them. What the runtime's fusions presuppose holds
all along: tensors on one grid stay on one, a range ends within its clamp, and a hard-sigmoid's grid is [0, 1].
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgecompress.errors import QuantizationError
from edgecompress.int8.operators import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.quantizer import is_share, limits_of

aten = torch.ops.aten
_INT32_LIMIT = 2**31 - 1


class _RoundToStep(torch.autograd.Function):
    """step * clamp(round(x / step), low, high), with LSQ's gradients (Esser et al., 2020, equations 3 and 5).

    `step` broadcasts against `x`. torch's own learnable fake-quantize is an order of magnitude slower on CPUs.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        scaled = values / step
        context.save_for_backward(scaled, step)
        context.bounds = (low, high)
        return scaled.round().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scaled, step = context.saved_tensors
        low, high = context.bounds
        gradient = gradients[0]
        # Straight through inside the range, nothing outside: a clamp's own gradient.
        passed = aten.hardtanh_backward(gradient, scaled, low - 0.5, high + 0.5)
        moved = scaled.round().clamp_(low, high).mul_(gradient).sub_(passed * scaled)
        return passed, moved.sum_to_size(step.shape), None, None


class _Step(nn.Module):
    """A positive step, or one per channel, learned as a factor e^x so that one learning rate fits every size.

    `largest` bounds it where the range must end within a clamp's.
    """

    def __init__(self, start: Tensor, largest: float = math.inf) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.start: Tensor
        self.largest = largest
        self.factor = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        step: Tensor = (self.start * self.factor.exp()).clamp(max=self.largest)
        return step


class _Activation(nn.Module):
    """A quantize-dequantize pair. Several pairs may share one step, as the runtime's movers want it."""

    def __init__(self, step: _Step, zero_point: int, low: int, high: int) -> None:
        super().__init__()
        self.step = step
        self.low, self.high = low - zero_point, high - zero_point

    def forward(self, values: Tensor) -> Tensor:
        rounded: Tensor = _RoundToStep.apply(values, self.step(), self.low, self.high)
        return rounded


class _FixedActivation(nn.Module):
    """A quantize-dequantize pair whose grid means something by itself: nothing to learn in it."""

    def __init__(self, step: float, zero_point: int, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(step))
        self.step: Tensor
        self.low, self.high = low - zero_point, high - zero_point

    def forward(self, values: Tensor) -> Tensor:
        rounded: Tensor = _RoundToStep.apply(values, self.step, self.low, self.high)
        return rounded


class _Weight(nn.Module):
    """Integers of a layer as floats to train, in units of the largest weight that each channel's first step can hold.

    In these units one learning rate moves every channel by the same share of its range, which folding batch norm into
    the weights would otherwise spread over orders of magnitude.
    """

    def __init__(self, integers: Tensor, scale: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.step = _Step(scale)
        self.register_buffer("unit", _channels_first(scale * high, integers.dim()))
        self.unit: Tensor
        self.values = nn.Parameter(integers.float() / high)

    def forward(self) -> Tensor:
        step = _channels_first(self.step(), self.values.dim())
        rounded: Tensor = _RoundToStep.apply(self.values * self.unit, step, self.low, self.high)
        return rounded

    def integers(self) -> Tensor:
        step = _channels_first(self.step(), self.values.dim())
        integers: Tensor = (self.values * self.unit / step).round().clamp(self.low, self.high).to(torch.int8)
        return integers


class _Bias(nn.Module):
    """A bias as floats: its int32 step is too fine to be felt. In units of one full-scale product a channel."""

    def __init__(self, integers: Tensor, scale: Tensor, weight_limit: int, activation_limit: int) -> None:
        super().__init__()
        self.register_buffer("unit", scale * (weight_limit * activation_limit))
        self.unit: Tensor
        self.values = nn.Parameter(integers.float() / (weight_limit * activation_limit))

    def forward(self) -> Tensor:
        bias: Tensor = self.values * self.unit
        return bias

    def integers(self, scale: Tensor) -> Tensor:
        integers: Tensor = (self().double() / scale.double()).round().clamp(-_INT32_LIMIT, _INT32_LIMIT).to(torch.int32)
        return integers


def _channels_first(scale: Tensor, dims: int) -> Tensor:
    return scale.view([-1] + [1] * (dims - 1))


@dataclass(frozen=True)
class _Layer:
    """A layer's constants in the converted graph, by name, and the step of the tensor it reads."""

    name: str
    integers: str
    scale: str
    bias: str | None
    bias_scale: str | None
    source: str  # the dequantize node of its input


class TrainableInt8(nn.Module):
    """An int8 model to train: float [N, C, H, W] to logits, through the roundings that the device makes.

    Raises QuantizationError when the graph is not as post-training quantization leaves it.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        self._model = model
        self._layers = list(_layers(model.graph))
        twin = copy.deepcopy(model.graph)
        self._steps = _insert_activations(twin)
        self._weights: dict[str, _Weight] = {}
        self._biases: dict[str, _Bias] = {}
        high = model.scheme.activation_range[1] - model.scheme.activation_range[0]
        for layer in self._layers:
            self._insert_layer(twin, layer, high)
        twin.graph.eliminate_dead_code()
        # A new GraphModule holds only what the graph uses, and may change between train and eval, which is
        # forbidden to one that torch.export made.
        self.graph = GraphModule(twin, twin.graph)
        for parameter in self.graph.parameters():
            parameter.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.graph(images)
        return logits

    def _insert_layer(self, twin: GraphModule, layer: _Layer, activation_limit: int) -> None:
        node = _node(twin, layer.name)
        read_back = node.args[1]
        assert isinstance(read_back, Node)
        low, high = int(read_back.args[4]), int(read_back.args[5])  # type: ignore[arg-type]
        weight = _Weight(_tensor(twin, layer.integers), _tensor(twin, layer.scale).float(), low, high)
        self._weights[layer.name] = weight
        _replace_by_call(twin, read_back, f"_learned_{read_back.name}", weight)
        if layer.bias is None or layer.bias_scale is None:
            return
        bias_node = node.args[2]
        assert isinstance(bias_node, Node)
        bias = _Bias(_tensor(twin, layer.bias), _tensor(twin, layer.bias_scale).float(), high, activation_limit)
        self._biases[layer.name] = bias
        _replace_by_call(twin, bias_node, f"_learned_{bias_node.name}", bias)

    @torch.no_grad()
    def quantized(self, correction: str) -> QuantizedModel:
        """The int8 model that this one has become; `correction` says in words how."""
        self.to("cpu")
        graph = copy.deepcopy(self._model.graph)
        steps = {name: float(step()) for name, step in self._steps.items()}
        for node in graph.graph.nodes:
            if node.name in steps:
                node.args = (node.args[0], steps[node.name], *node.args[2:])
        for layer in self._layers:
            weight = self._weights[layer.name]
            scale = weight.step()
            _tensor(graph, layer.integers).copy_(weight.integers())
            _tensor(graph, layer.scale).copy_(scale)
            if layer.bias is not None and layer.bias_scale is not None:
                # The accumulator's own scale, as the quantizer derives it.
                bias_scale = scale * _scale_of(_node(graph, layer.source))[0]
                _tensor(graph, layer.bias).copy_(self._biases[layer.name].integers(bias_scale))
                _tensor(graph, layer.bias_scale).copy_(bias_scale)
        learned = dict(self.graph.named_parameters())
        for node in graph.graph.nodes:  # layers that stayed in float learned too
            if node.op == "get_attr" and str(node.target) in learned:
                _tensor(graph, str(node.target)).copy_(learned[str(node.target)])
        graph.recompile()
        return dataclasses.replace(self._model, graph=graph, correction=correction)


def _layers(graph: GraphModule) -> Iterator[_Layer]:
    """Every layer that reads int8 weights, in graph order."""
    for node in graph.graph.nodes:
        weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if not isinstance(weight, Node) or weight.target is not DEQUANTIZE_CHANNELS:
            continue
        source = node.args[0]
        if not isinstance(source, Node) or source.target is not DEQUANTIZE or weight.args[3] != 0:
            raise QuantizationError(
                f"{node.name}: quantization-aware training needs an int8 input and weights per output"
            )
        bias = node.args[2] if len(node.args) > 2 else None
        has_bias = isinstance(bias, Node) and bias.target is DEQUANTIZE_CHANNELS
        yield _Layer(
            name=str(node.name),
            integers=_target(weight.args[0]),
            scale=_target(weight.args[1]),
            bias=_target(bias.args[0]) if has_bias else None,  # type: ignore[union-attr]
            bias_scale=_target(bias.args[1]) if has_bias else None,  # type: ignore[union-attr]
            source=str(source.name),
        )


def _insert_activations(twin: GraphModule) -> dict[str, _Step]:
    """Put a module in the place of every quantize-dequantize pair; returns the step of each node, by its name.

    Pairs with the same scale and zero point share a step: the observers that PT2E shared are no longer known
    in a converted graph, and two tensors with equal ranges lose nothing by it.
    """
    pairs = [node for node in twin.graph.nodes if node.target is DEQUANTIZE and _is_quantized(node)]
    largest = _largest_steps([node.args[0] for node in pairs])
    steps: dict[tuple[float, int], _Step] = {}
    of_node: dict[str, _Step] = {}
    for node in pairs:
        written = node.args[0]
        key, low, high = _scale_of(written), int(written.args[3]), int(written.args[4])
        if _scale_of(node) != key:
            raise QuantizationError(f"{node.name}: quantization-aware training needs one grid to write and to read")
        activation: nn.Module
        if is_share(*key, low, high):
            # A hard-sigmoid's, or as good for one: only on this grid is it exported as part of an integer kernel.
            activation = _FixedActivation(key[0], key[1], low, high)
        else:
            if key not in steps:
                steps[key] = _Step(torch.tensor(key[0]), largest[key])
            activation = _Activation(steps[key], key[1], low, high)
            of_node[str(node.name)] = of_node[str(written.name)] = steps[key]
        _replace_by_call(twin, node, f"_learned_{node.name}", activation, written.args[0])
    return of_node


def _largest_steps(written: list[Any]) -> dict[tuple[float, int], float]:
    """How far the step of each grid may grow: where a range ends within its clamp, the runtime drops the clamp.

    A range that did not when training began, such as one that a wider tensor shares, may stay as it is.
    """
    largest: dict[tuple[float, int], float] = {}
    for node in written:
        (scale, zero_point), low, high = _scale_of(node), int(node.args[3]), int(node.args[4])
        least, most = limits_of(node.args[0])
        bound = min(_step_within(-least, zero_point - low), _step_within(most, high - zero_point))
        key = scale, zero_point
        largest[key] = min(largest.get(key, math.inf), max(bound, scale))
    return largest


def _step_within(limit: float, count: int) -> float:
    """The largest step of which `count` come to no more than `limit`, in float32 as the runtime multiplies them."""
    if count == 0 or math.isinf(limit):
        return math.inf
    end = torch.tensor(limit, dtype=torch.float32)
    step = end / count
    while step * count > end:
        step = torch.nextafter(step, torch.tensor(-math.inf))
    return float(step)


def _is_quantized(node: Node) -> bool:
    source = node.args[0]
    return isinstance(source, Node) and source.target is QUANTIZE


def _scale_of(node: Any) -> tuple[float, int]:
    return float(node.args[1]), int(node.args[2])


def _replace_by_call(twin: GraphModule, node: Node, name: str, module: nn.Module, *arguments: Any) -> None:
    twin.add_submodule(name, module)
    with twin.graph.inserting_before(node):
        call = twin.graph.call_module(name, arguments)
    node.replace_all_uses_with(call)
    twin.graph.erase_node(node)


def _node(graph: GraphModule, name: str) -> Node:
    found: Node = next(node for node in graph.graph.nodes if node.name == name)
    return found


def _target(node: Any) -> str:
    assert isinstance(node, Node)
    assert node.op == "get_attr"
    return str(node.target)


def _tensor(graph: GraphModule, name: str) -> Tensor:
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value
