"""Low-rank layers: one layer becomes two thin ones that do nearly the same with fewer multiply-accumulates.

What enters: a convolution or a linear layer. What leaves: two layers in a row whose product is its truncated singular
value decomposition; the error is exactly what the dropped singular values hold. Ranks are chosen by the share of the
energy (squared singular values) that stays, one share for all layers, so that a budget is spent where it costs least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgecompress.errors import PruningError
from edgecompress.models.complexity import weight_layers

Form = Literal["linear", "channel", "spatial"]
FORMS: tuple[Form, ...] = ("linear", "channel", "spatial")


@dataclass(frozen=True)
class Factorization:
    """One layer of a network replaced by two: `form` says how its weight is laid out as a matrix, of rank `rank`.

    - linear: two linear layers.
    - channel: the same kernel to `rank` channels, then 1 x 1 to all (Zhang et al., 2016, "Accelerating Very Deep
      Convolutional Networks", section 3).
    - spatial: a column, then a row of the kernel (Tai et al., 2016, "Convolutional neural networks with low-rank
      regularization").
    """

    layer: str
    form: Form
    rank: int


def forms_of(layer: nn.Module) -> tuple[Form, ...]:
    """The ways in which this layer can be factorized; none for grouped and transposed convolutions."""
    if isinstance(layer, nn.Linear):
        return ("linear",)
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or layer.padding_mode != "zeros":
        return ()
    if isinstance(layer.padding, str):
        return ()
    return ("channel", "spatial") if min(layer.kernel_size) > 1 else ("channel",)


def as_matrix(layer: nn.Module, form: Form) -> Tensor:
    """The weight as the matrix that is factorized, in float64.

    linear [out, in]; channel [out, in * kh * kw]; spatial [out * kw, in * kh].
    """
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = layer.weight.detach().double()
    if form == "spatial":
        return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def empty_factors(layer: nn.Module, form: Form, rank: int) -> nn.Sequential:
    """Two layers of the right shape, without the weights. Raises PruningError where the form does not fit."""
    if form not in forms_of(layer) or not 1 <= rank <= min(as_matrix(layer, form).shape):
        raise PruningError(f"a {type(layer).__name__} cannot be factorized as {form} of rank {rank}")
    if isinstance(layer, nn.Linear):
        has_bias = layer.bias is not None
        return nn.Sequential(
            nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=has_bias)
        )
    assert isinstance(layer, nn.Conv2d)
    has_bias = layer.bias is not None
    (height, width), (down, across) = layer.kernel_size, layer.stride
    (top, left), (spread_down, spread_across) = _padding(layer), layer.dilation
    if form == "channel":
        first = nn.Conv2d(
            layer.in_channels,
            rank,
            (height, width),
            (down, across),
            (top, left),
            (spread_down, spread_across),
            bias=False,
        )
        return nn.Sequential(first, nn.Conv2d(rank, layer.out_channels, 1, bias=has_bias))
    column = nn.Conv2d(layer.in_channels, rank, (height, 1), (down, 1), (top, 0), (spread_down, 1), bias=False)
    row = nn.Conv2d(rank, layer.out_channels, (1, width), (1, across), (0, left), (1, spread_across), bias=has_bias)
    return nn.Sequential(column, row)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)
    height, width = layer.padding
    return height, width


def factors(layer: nn.Module, form: Form, rank: int) -> nn.Sequential:
    """The two layers whose product is the best approximation of `layer` of this rank (Eckart and Young, 1936)."""
    pair = empty_factors(layer, form, rank)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    left, values, right = torch.linalg.svd(as_matrix(layer, form), full_matrices=False)
    root = values[:rank].sqrt()  # shared evenly, so that both layers have weights of about the same size
    before, after = root[:, None] * right[:rank], left[:, :rank] * root
    first, second = pair
    assert isinstance(first, nn.Linear | nn.Conv2d)
    assert isinstance(second, nn.Linear | nn.Conv2d)
    if form == "spatial":
        assert isinstance(layer, nn.Conv2d)
        after = after.view(layer.out_channels, layer.kernel_size[1], rank).transpose(1, 2)
    with torch.no_grad():
        first.weight.copy_(before.reshape(first.weight.shape))
        second.weight.copy_(after.reshape(second.weight.shape))
        if layer.bias is not None:
            assert second.bias is not None
            second.bias.copy_(layer.bias)
    return pair


def replace(module: nn.Module, step: Factorization, *, with_weights: bool) -> None:
    """Put the two layers in the place of `step.layer`. Raises PruningError where the step does not fit the module."""
    layer = weight_layers(module).get(step.layer)
    if layer is None:
        raise PruningError(f"factorize: the model has no layer '{step.layer}'")
    made = (factors if with_weights else empty_factors)(layer, step.form, step.rank)
    parent, _, name = step.layer.rpartition(".")
    setattr(module.get_submodule(parent), name, made.train(layer.training))


@dataclass(frozen=True)
class Spectrum:
    """What one way of factorizing one layer costs and keeps: squared singular values, and MACs a unit of rank."""

    layer: str
    form: Form
    energies: Tensor
    macs_per_rank: int
    macs: int

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the energy, at least 1."""
        kept = self.energies.cumsum(0) / self.energies.sum()
        return min(int((kept < energy - 1e-12).sum()) + 1, len(self.energies))

    def best_of(self, other: Spectrum | None, energy: float) -> Spectrum:
        """The one of two that costs less at this energy."""
        if other is None or self._cost(energy) < other._cost(energy):
            return self
        return other

    def _cost(self, energy: float) -> int:
        return self.rank_for(energy) * self.macs_per_rank

    def saves(self, energy: float) -> int:
        """MACs that go; below zero where the two layers cost more than the one."""
        return self.macs - self._cost(energy)


def spectra(module: nn.Module, example: Tensor, layers: Mapping[str, nn.Module]) -> list[Spectrum]:
    """Every way of factorizing every layer of `layers` that runs; `example` is one input batch."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[name] = (inputs[0].shape, output.shape)

    handles = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            module.eval()(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, layer in layers.items():
        for form in forms_of(layer) if name in shapes else ():
            energies = torch.linalg.svdvals(as_matrix(layer, form)).square()
            if float(energies.sum()) == 0:
                continue
            found.append(
                Spectrum(
                    name, form, energies, _macs_per_rank(layer, form, *shapes[name]), _macs(layer, shapes[name][1])
                )
            )
    return found


def _macs(layer: nn.Module, output: torch.Size) -> int:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return output.numel() * layer.weight[0].numel()


def _macs_per_rank(layer: nn.Module, form: Form, inputs: torch.Size, output: torch.Size) -> int:
    """MACs of the two layers for each unit of rank."""
    if isinstance(layer, nn.Linear):
        return output.numel() // layer.out_features * (layer.in_features + layer.out_features)
    assert isinstance(layer, nn.Conv2d)
    height, width = layer.kernel_size
    places = output[2] * output[3]
    if form == "channel":
        return int(places * (layer.in_channels * height * width + layer.out_channels))
    # The column runs at the full width of its input.
    return int(output[2] * inputs[3] * layer.in_channels * height + places * layer.out_channels * width)


def choose(found: list[Spectrum], energy: float) -> dict[str, Factorization]:
    """For each layer the cheaper form at this energy, where it saves MACs at all."""
    best: dict[str, Spectrum] = {}
    for spectrum in found:
        best[spectrum.layer] = spectrum.best_of(best.get(spectrum.layer), energy)
    return {
        name: Factorization(name, spectrum.form, spectrum.rank_for(energy))
        for name, spectrum in best.items()
        if spectrum.saves(energy) > 0
    }


def removed_macs(found: list[Spectrum], energy: float) -> int:
    """MACs that go where every layer keeps this share of its energy."""
    best: dict[str, int] = {}
    for spectrum in found:
        best[spectrum.layer] = max(best.get(spectrum.layer, 0), spectrum.saves(energy))
    return sum(best.values())


def energy_for(found: list[Spectrum], wanted_macs: float) -> float | None:
    """The highest energy at which at least `wanted_macs` go; None where even rank 1 everywhere is not enough."""
    low, high = 0.0, 1.0
    if removed_macs(found, low) < wanted_macs:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        if removed_macs(found, middle) >= wanted_macs:
            low = middle
        else:
            high = middle
    return low
