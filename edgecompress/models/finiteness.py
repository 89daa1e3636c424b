"""Numbers that are none: where NaN and infinity are in a model, by name.

What enters: tensors by name, or a module and images. What leaves: the first name at which a value is not finite. A
network whose weights or answers hold NaN still has a largest logit, so an accuracy would come out and mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def non_finite_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity; None where all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def first_non_finite_layer(module: nn.Module, images: Tensor) -> str | None:
    """The layer that first gives NaN or infinity on a normalized batch, in the order in which layers run.

    Layers are modules without children; what stands between them belongs to the layer after it. None where all is
    finite, or where the module is a graph, which has no layers of its own.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    leaves = {name: child for name, child in module.named_modules() if name and not any(child.children())}
    handles = [child.register_forward_hook(watch(name)) for name, child in leaves.items()]
    try:
        with torch.inference_mode():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
