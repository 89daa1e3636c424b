"""The captured graph computes what the module computes, whatever was removed from it on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgecompress.int8.capture import aten, capture
from int8_models import CLASSES, SIZE, conv, images, quantized, seeded


def targets(graph: torch.fx.GraphModule) -> list[object]:
    """What each node of a graph calls."""
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def assert_same(module: nn.Module, graph: torch.fx.GraphModule) -> None:
    """The graph gives what the module gives, up to float rounding."""
    with torch.no_grad():
        torch.testing.assert_close(graph(images(4)), module(images(4)), rtol=1e-5, atol=1e-5)


# --- Constant factors behind a layer.


class Factor(nn.Module):
    """A layer on tokens [N, 16, 16], or behind their mean on [N, 16], or a convolution, times a constant."""

    def __init__(self, shape: tuple[int, ...], place: str, outputs: int = 16) -> None:
        super().__init__()
        self.place, self.stem = place, nn.Conv2d(3, 16, 2, 2)
        self.layer = conv(16, outputs) if place == "maps" else nn.Linear(16, outputs)
        self.factor = nn.Parameter(torch.linspace(0.1, 2.0, torch.Size(shape).numel()).reshape(shape))
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.place != "maps":
            x = x.flatten(2).transpose(1, 2)
        if self.place == "vector":
            x = x.mean(1)
        return self.head((self.layer(x) * self.factor).reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("shape", "place", "outputs", "folded"),
    [
        ((), "tokens", 16, True),
        ((1, 1), "tokens", 16, True),
        ((16,), "tokens", 16, True),
        ((1, 1, 16), "tokens", 16, True),
        ((16, 1), "tokens", 16, False),  # a factor for each token
        ((1, 16, 1), "tokens", 16, False),
        ((16, 16), "tokens", 16, False),
        ((16,), "vector", 16, True),
        ((1, 1, 16), "vector", 16, False),  # the product has an axis more
        ((16,), "vector", 1, False),  # or more channels
        ((16, 1, 1), "maps", 16, True),
        ((1, 16, 1, 1), "maps", 16, True),
        ((1,), "maps", 16, True),
        ((1, 1, 16, 1, 1), "maps", 16, False),
        ((4, 1), "maps", 16, False),  # a factor for each row
    ],
)
def test_only_a_factor_along_the_channels_goes_into_the_weights(
    shape: tuple[int, ...], place: str, outputs: int, folded: bool
) -> None:
    module = Factor(shape, place, outputs).eval()
    with torch.no_grad():
        module(images(2))
    graph = capture(seeded(module), images(2))
    assert (aten.mul.Tensor not in targets(graph)) is folded
    assert_same(module, graph)


# --- Operators in place.


class InPlace(nn.Module):
    """One of several ways to change a tensor, or a part of it, that is read afterwards."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.second, self.head = way, conv(3, 4), conv(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.way == "itself":
            y.relu_().mul_(0.5)
        elif self.way == "view that is read":
            y = y.flatten(2).relu_().unflatten(2, (SIZE, SIZE))
        elif self.way == "mask":
            mask = y.new_zeros(1, 1, SIZE, SIZE)
            mask[..., 2:] = 1.0
            y = y * mask
        elif self.way == "view":
            y.flatten(1).relu_()
        elif self.way == "piece":
            y[:, :2].relu_()
        elif self.way == "canvas":
            canvas = torch.zeros_like(y)
            canvas[:, :, 1:] = y[:, :, 1:]
            y = canvas
        return self.head(self.second(y).mean((2, 3)))


@pytest.mark.parametrize(
    ("way", "functional"),
    [
        *(("itself", False), ("view that is read", False)),
        *(("view", True), ("piece", True), ("canvas", True), ("mask", True)),
    ],
)
def test_only_what_readers_would_miss_is_written_without_operators_in_place(way: str, functional: bool) -> None:
    module = seeded(InPlace(way))
    graph = capture(module, images(2))
    in_place = [target for target in targets(graph) if getattr(target, "_schema", None) and target._schema.is_mutable]
    assert (not in_place) is functional
    assert_same(module, graph)
    model = quantized(module)
    with torch.no_grad():
        wanted, got = module(images(16)), model.simulation()(images(16))
    assert float((wanted - got).abs().max()) < 0.1 * float(wanted.abs().max())


# --- Batch norms that PT2E must not fold.


class Normed(nn.Module):
    """A layer, a batch norm behind it, and whether another reader takes the layer's output too."""

    def __init__(self, layer: nn.Module, norm: nn.Module, *, shared: bool = False) -> None:
        super().__init__()
        self.layer, self.norm, self.shared, self.head = layer, norm, shared, nn.LazyLinear(CLASSES)
        self.axes = 2 if isinstance(layer, nn.Linear) else 3 if isinstance(norm, nn.BatchNorm1d) else 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.mean((2, 3)) if self.axes == 2 else x.flatten(2) if self.axes == 3 else x)
        z = self.norm(y)
        return self.head((z + y if self.shared else z).flatten(1))


NORMED: dict[str, tuple[Normed, bool]] = {
    "folded": (Normed(conv(3, 8), nn.BatchNorm2d(8)), True),
    "transposed": (Normed(nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8)), True),
    "transposed, in groups": (Normed(nn.ConvTranspose2d(3, 6, 2, 2, groups=3), nn.BatchNorm2d(6)), False),
    "transposed, in groups, 1d": (Normed(nn.ConvTranspose1d(3, 6, 2, 2, groups=3), nn.BatchNorm1d(6)), False),
    "statistics of the batch": (Normed(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False)), False),
    "shared": (Normed(conv(3, 8), nn.BatchNorm2d(8), shared=True), False),
    "shared, 1d": (Normed(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), shared=True), False),
    "linear": (Normed(nn.Linear(3, 8), nn.BatchNorm1d(8)), True),
    "linear, shared": (Normed(nn.Linear(3, 8), nn.BatchNorm1d(8), shared=True), False),
    "weights not constant": (
        Normed(torch.nn.utils.parametrizations.weight_norm(conv(3, 8)), nn.BatchNorm2d(8)),
        False,
    ),
}


@pytest.mark.parametrize("name", NORMED)
def test_batch_norms_are_folded_where_that_is_right(name: str) -> None:
    module, folded = NORMED[name]
    with torch.no_grad():
        module.eval()(images(2))
        for tensor in (*module.norm.parameters(), *module.norm.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    model = quantized(module)
    assert model.reference is not None
    assert_same(module, model.reference)
    with torch.no_grad():
        wanted, got = module(images(16)), model.simulation()(images(16))
    assert float((wanted - got).abs().max()) < 0.1 * float(wanted.abs().max())
    norms = [node for node in capture(module, images(2)).graph.nodes if node.target is aten.batch_norm.default]
    assert bool(norms) is folded
