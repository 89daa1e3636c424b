"""Channels that never say anything: the same value on every image and at every place.

What enters: the float graph and calibration images. What leaves: for each layer how many of its channels are dead. They
cost time and say nothing; pruning takes them for free, and int8 gives them a scale that no other value fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from edgecompress.int8.quantizer import module_name

IMAGES = 64


class _Watch(Interpreter):
    """Runs a graph and looks at what each activation function gives, channel by channel."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.ends: dict[Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.dim() == 4 and _is_last_of_its_layer(n):
            low, high = value.amin(dim=(0, 2, 3)), value.amax(dim=(0, 2, 3))
            if n in self.ends:
                low, high = torch.minimum(low, self.ends[n][0]), torch.maximum(high, self.ends[n][1])
            self.ends[n] = (low, high)
        return value


_ACTIVATIONS = ("relu", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "elu", "clamp", "hardsigmoid", "mish")


def _is_last_of_its_layer(node: Node) -> bool:
    """An activation function, or a convolution that none follows."""
    name = _name_of(node)
    if name in _ACTIVATIONS:
        return True
    followers = [str(user.target) for user in node.users]
    return name.startswith("conv") and not any(word in text for text in followers for word in (*_ACTIVATIONS, "norm"))


def _name_of(node: Node) -> str:
    """The operator of a node, as `relu` or `conv2d`."""
    return str(node.target).rpartition("::")[2].removeprefix("aten.").partition(".")[0].rstrip("_")


def dead_channels(graph: GraphModule, images: Tensor) -> dict[str, tuple[int, int]]:
    """Dead and all channels of each layer that has dead ones, by its module's name; images [N, C, H, W], normalized."""
    watch = _Watch(graph)
    with torch.no_grad():
        for part in torch.split(images[:IMAGES], 8):
            watch.run(part)
    counted = {node: (int((low == high).sum()), len(low)) for node, (low, high) in watch.ends.items()}
    return {layer_behind(node): pair for node, pair in counted.items() if pair[0]}


def layer_behind(node: Node) -> str:
    """The module that a value comes from: of an activation function, which several may share, its convolution."""
    here = node
    while not _name_of(here).startswith(("conv", "linear", "addmm")):
        above = next((source for source in here.args if isinstance(source, Node)), None)
        if above is None or len(above.users) > 1 or above.op == "placeholder":
            return module_name(node)  # a sum, a pool: it has a name of its own
        here = above
    return module_name(here)


def dead_sentence(dead: dict[str, tuple[int, int]], images: int) -> str:
    """What was found, in words; the layers with most of them first."""
    ranked = sorted(dead.items(), key=lambda item: -item[1][0])
    named = ", ".join(f"{name} ({count} of {total})" for name, (count, total) in ranked[:3])
    more = f" and {len(ranked) - 3} more layers" if len(ranked) > 3 else ""
    total = sum(count for count, _ in dead.values())
    return (
        f"{total} channels give one value whatever the image shows, on {images} training images: {named}"
        f"{more}. They cost time for nothing; a prune stage takes them out"
    )
