"""Error-compensated rounding of a whole graph: layer after layer, on the inputs that the layers before it give.

What enters: a converted int8 graph, the float graph it came from, and calibration images. What leaves: the same graph
with better integers at the same scales, so the file is as small and as fast as before, and biases moved by the mean
error that is left (Nagel et al., 2019, "Data-Free Quantization", section 4.2). Images go through in parts, each only as
far as a layer asks for: large maps have many positions and need few images, small ones need all, so memory stays flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from edgecompress import console
from edgecompress.int8.operators import DEQUANTIZE_CHANNELS
from edgecompress.int8.rounding import CONVOLUTIONS, round_compensated

_PART = 8  # images of a part
_BUDGET_BYTES = 2**28  # for the values of both graphs that are live at a layer, in all of its parts
_FEWEST_PARTS = 2  # so that the samples that decide on a ridge come from other images

aten = torch.ops.aten


@dataclass(frozen=True)
class _WeightSite:
    """Where a layer's integers live in the converted graph."""

    integers: Tensor  # int8 [out, in / groups, kh, kw] or [out, in]
    scale: Tensor  # float32 [out]
    low: int
    high: int
    bias_integers: Tensor | None  # int32 [out]
    bias_scale: Tensor | None


def compensate(converted: GraphModule, simulation: GraphModule, reference: GraphModule, images: Tensor) -> None:
    """Improve the integers of `converted` (and the floats of `simulation`) in place.

    `simulation` computes what `converted` computes, node for node under the same names; `reference` is
    the float graph under the same names. `images` is one normalized batch [N, C, H, W].
    """
    sites = dict(_weight_sites(converted))
    parts = [_Part(_Stepper(simulation, part), _Stepper(reference, part)) for part in torch.split(images, _PART)]
    with torch.no_grad(), console.progress("compensating rounding", len(sites)) as advance:
        for node in simulation.graph.nodes:
            if node.name in sites:
                _treat_layer(node, sites[node.name], _parts_for(node.name, parts))
                advance()


@dataclass(frozen=True)
class _Part:
    """Some of the images, half way through both graphs."""

    int8: _Stepper
    float: _Stepper


def _parts_for(name: str, parts: Sequence[_Part]) -> Sequence[_Part]:
    """As many parts as fit into the budget when each stands before the layer `name`, the first ones first."""
    parts[0].int8.input_of(name)
    parts[0].float.input_of(name)
    live = parts[0].int8.live_bytes() + parts[0].float.live_bytes()
    return parts[: max(_FEWEST_PARTS, _BUDGET_BYTES // max(1, live))]


class _Stepper:
    """Runs a graph node by node and drops each value after its last reader."""

    def __init__(self, graph: GraphModule, images: Tensor) -> None:
        self.graph = graph
        self._interpreter = Interpreter(graph)
        self._interpreter.args_iter = iter([images])
        self._nodes = list(graph.graph.nodes)
        self._position = 0
        self.values: dict[Node, Any] = self._interpreter.env

    def run_until(self, name: str) -> Any:
        """Run up to and with the node `name`; returns its value, also when it ran already."""
        while True:
            if self._position and self._nodes[self._position - 1].name == name:
                return self.values.get(self._nodes[self._position - 1])
            node = self._nodes[self._position]
            self._position += 1
            if node.op == "output":
                continue
            self.values[node] = self._interpreter.run_node(node)
            for dead in self._interpreter.user_to_last_uses.get(node, []):
                if dead is not node:
                    self.values.pop(dead, None)

    def input_of(self, name: str) -> Any:
        """Run up to the node `name` without it; returns the value of its first argument."""
        while self._nodes[self._position].name != name:
            self.run_until(self._nodes[self._position].name)
        return self.values[self._nodes[self._position].args[0]]

    def live_bytes(self) -> int:
        """Bytes of the values that later nodes still read, beside the graph's own constants."""
        tensors = (value for node, value in self.values.items() if node.op != "get_attr")
        return sum(value.nbytes for value in tensors if isinstance(value, Tensor))

    def constant(self, node: Node) -> Tensor:
        """The tensor that a get_attr node reads."""
        value: Any = self.graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value


def _weight_sites(converted: GraphModule) -> Iterator[tuple[str, _WeightSite]]:
    def constant(node: Any) -> Tensor:
        value: Any = converted
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    for node in converted.graph.nodes:
        if node.target not in CONVOLUTIONS and node.target is not aten.linear.default:
            continue
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.target is not DEQUANTIZE_CHANNELS:
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        has_bias = isinstance(bias, Node) and bias.target is DEQUANTIZE_CHANNELS
        yield (
            node.name,
            _WeightSite(
                integers=constant(weight.args[0]),
                scale=constant(weight.args[1]).float(),
                low=int(weight.args[4]),  # type: ignore[arg-type]
                high=int(weight.args[5]),  # type: ignore[arg-type]
                bias_integers=constant(bias.args[0]) if has_bias else None,  # type: ignore[union-attr]
                bias_scale=constant(bias.args[1]).float() if has_bias else None,  # type: ignore[union-attr]
            ),
        )


def _treat_layer(node: Node, site: _WeightSite, parts: Sequence[_Part]) -> None:
    """Round one layer's weights against its own inputs, then move its bias by the mean error that is left."""
    float_inputs = [part.float.input_of(node.name) for part in parts]
    int8_inputs = [part.int8.input_of(node.name) for part in parts]
    integers = round_compensated(
        _float_weight(parts[0].float, node.name),
        site.scale,
        int8_inputs,
        node,
        low=site.low,
        high=site.high,
        float_inputs=float_inputs,
    )
    site.integers.copy_(integers)
    read_back = node.args[1]
    assert isinstance(read_back, Node)
    scale = site.scale.view([-1] + [1] * (integers.dim() - 1))
    parts[0].int8.constant(read_back).copy_(integers.float() * scale)
    outputs = [(part.float.run_until(node.name), part.int8.run_until(node.name)) for part in parts]
    if site.bias_integers is None or site.bias_scale is None:
        return
    # A convolution's channels are axis 1, a linear layer's the last one, however many axes there are.
    dims = outputs[0][0].dim()
    channel_axis = 1 if node.target in CONVOLUTIONS else dims - 1
    others = [axis for axis in range(dims) if axis != channel_axis]
    summed = torch.stack([(wanted - got).sum(dim=others, dtype=torch.float64) for wanted, got in outputs]).sum(dim=0)
    error = summed * len(summed) / sum(wanted.numel() for wanted, _ in outputs)
    steps = torch.round(error / site.bias_scale).to(torch.int64)
    limit = 2**31 - 1
    corrected = (site.bias_integers.to(torch.int64) + steps).clamp(-limit, limit).to(torch.int32)
    moved = (corrected.double() - site.bias_integers.double()) * site.bias_scale.double()
    site.bias_integers.copy_(corrected)
    bias_node = node.args[2]
    assert isinstance(bias_node, Node)
    parts[0].int8.constant(bias_node).copy_(corrected.float() * site.bias_scale)
    for _, output in outputs:
        output += moved.float().view([-1] + [1] * (dims - 1 - channel_axis))


def _float_weight(steps: _Stepper, layer: str) -> Tensor:
    """The float weight of a layer, which observers may stand before."""
    node: Any = next(node for node in steps.graph.graph.nodes if node.name == layer).args[1]
    while node.op != "get_attr":
        node = node.args[0]
    return steps.constant(node).detach().float()
