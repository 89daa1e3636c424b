"""What a model costs on paper: parameters, multiply-accumulates, zeros, bytes.

What enters: a module. What leaves: counts that do not depend on a machine. MACs are those of convolutions and
linear layers for one image, the convention of the pruning literature; MACs are not speed, which is why the
profile measures.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Complexity:
    """Counts of one model. `sparsity` is the fraction of zeros among convolution and linear weights."""

    params: int
    macs: int
    sparsity: float


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by module name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, WEIGHT_LAYERS)}


def measure_complexity(module: nn.Module, example: Tensor) -> Complexity:
    """Count parameters, MACs for one image, and zeros. `example` is [N, C, H, W]; N does not matter."""
    return Complexity(
        params=sum(p.numel() for p in module.parameters()),
        macs=count_macs(module, example[:1]),
        sparsity=weight_sparsity(module),
    )


def count_macs(module: nn.Module, example: Tensor) -> int:
    """MACs of convolution and linear layers in one forward pass of `example`."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Each output value is a dot product with one filter: out_channels is the first dimension of the weight.
        total += output.numel() * weight[0].numel()

    observe_layers(module, example, count)
    return total


def observe_layers(
    module: nn.Module, example: Tensor, seen: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
) -> None:
    """Run `example` through once, in eval mode; `seen` gets each layer with weights, its inputs and its output."""
    handles = [layer.register_forward_hook(seen) for layer in weight_layers(module).values()]
    training = module.training
    try:
        with torch.no_grad():
            module.eval()(example)
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()


def weight_sparsity(module: nn.Module) -> float:
    """Fraction of exact zeros among convolution and linear weights."""
    weights = [layer.weight for layer in weight_layers(module).values()]
    total = sum(w.numel() for w in weights if isinstance(w, Tensor))
    zeros = sum(int((w == 0).sum()) for w in weights if isinstance(w, Tensor))
    return zeros / total if total else 0.0


def compressed_size_bytes(path: Path) -> int:
    """Size of the file after gzip level 6: what a download of it costs, and where zeros show."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: a gzip header
    total = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total += len(compressor.compress(block))
    return total + len(compressor.flush())
