"""What each layer costs in float and in int8, in the order in which the layers run: by time, by work, by bytes.

What enters: a mixed model, each layer's noise, and the runtime's profile where the target is at hand. What leaves: the
costs that placements are predicted from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from edgecompress.errors import ProfileError
from edgecompress.int8.mixed import MixedModel, constant_of
from edgecompress.int8.placement import LayerCost
from edgecompress.int8.quantizer import module_name
from edgecompress.measure.operator_times import OperatorTimes

aten = torch.ops.aten
_WEIGHTED = {aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default, aten.linear.default}
_INT8_TIME = 0.5  # of a multiply-accumulate against float, where nothing can be measured


def weighted_nodes(mixed: MixedModel) -> list[Node]:
    """The layers with weights in the order in which they run, those that stay in float included."""
    return [
        node
        for node in mixed.reference.graph.nodes
        if node.target in _WEIGHTED and isinstance(node.args[1], Node) and node.args[1].op == "get_attr"
    ]


def costs_by_time(mixed: MixedModel, noises: Mapping[str, float], times: OperatorTimes) -> list[LayerCost]:
    """Milliseconds by the runtime's own profile. Raises ProfileError where the layers do not correspond."""
    nodes = weighted_nodes(mixed)
    if len(nodes) != len(times.segments):
        raise ProfileError(f"the files have {len(times.segments)} layers, the model {len(nodes)}")
    changes = [times.change_cost(number) for number in range(len(nodes))]
    pairs = [(segment.fp32_ms, segment.int8_ms) for segment in times.segments]
    return _costs(mixed, nodes, noises, pairs, changes)


def costs_by_macs(mixed: MixedModel, noises: Mapping[str, float]) -> list[LayerCost]:
    """Millions of multiply-accumulates, half as dear in int8: a stand-in for a device that is not at hand."""
    nodes = weighted_nodes(mixed)
    macs = [_macs(mixed, node) / 1e6 for node in nodes]
    return _costs(mixed, nodes, noises, [(m, _INT8_TIME * m) for m in macs], [0.0] * len(nodes))


def costs_by_size(mixed: MixedModel, noises: Mapping[str, float]) -> list[LayerCost]:
    """Bytes of weights: four each in float, one in int8."""
    nodes = weighted_nodes(mixed)
    sizes = [constant_of(mixed.reference, node.args[1]).numel() for node in nodes]  # type: ignore[arg-type]
    return _costs(mixed, nodes, noises, [(4.0 * size, float(size)) for size in sizes], [0.0] * len(nodes))


def _costs(
    mixed: MixedModel,
    nodes: Sequence[Node],
    noises: Mapping[str, float],
    pairs: Sequence[tuple[float, float]],
    changes: Sequence[float],
) -> list[LayerCost]:
    int8_layers = set(mixed.layers)
    names = [module_name(node) for node in nodes]
    return [
        LayerCost(
            layer=name,
            float_cost=in_float,
            int8_cost=in_int8,
            change_cost=change,
            noise=noises.get(name, 0.0) / names.count(name),
            may_be_int8=name in int8_layers,
        )
        for name, (in_float, in_int8), change in zip(names, pairs, changes, strict=True)
    ]


def _macs(mixed: MixedModel, node: Node) -> int:
    """Multiply-accumulates of one image: the weights, once for each place of the output they are applied at."""
    assert isinstance(node.args[1], Node)
    weights = constant_of(mixed.reference, node.args[1]).numel()
    value = node.meta.get("val")
    if value is None:
        return weights
    if node.target is not aten.linear.default:
        return weights * math.prod(int(size) for size in value.shape[2:])
    images = next(n for n in mixed.reference.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    return weights * int(math.prod(value.shape[:-1]) // images)  # a linear layer on tokens has a row for each
