"""Scores of channels: what the loss would miss most comes last to be cut.

What enters: a module, its coupled groups and some training images. What leaves: one score a channel of each group, over
all the layers that make or read it. The formulas are torch-pruning's, over sums of gradients made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.errors import PruningError
from edgecompress.models.channel_groups import CoupledGroup

Importance = Literal["magnitude", "l1", "bn_scale", "taylor", "lamp", "hessian"]
Batches = Sequence[tuple[Tensor, Tensor]]

# Gradients of one image at a time: enough images for a ranking, few enough for seconds.
_HESSIAN_IMAGES = 256


def scores(
    module: nn.Module, groups: Sequence[CoupledGroup], *, importance: Importance, batches: Batches
) -> dict[str, Tensor]:
    """One score a channel, [channels], by group name; groups that this importance cannot score are left out.

    - magnitude: L2 norms of the weights. l1: L1 norms (Li et al., 2017, "Pruning Filters for Efficient ConvNets").
    - lamp: magnitude, each as a share of those above it (Lee et al., 2021).
    - bn_scale: batch-norm scales (Liu et al., 2017, "Network Slimming"); groups without batch norm have no score.
    - taylor: |weight x gradient| (Molchanov et al., 2019). hessian: weight^2 x squared gradient, the diagonal of the
      Fisher information (LeCun et al., 1990, "Optimal Brain Damage").

    `batches` are normalized images and labels, read by taylor and hessian alone.
    """
    if importance == "bn_scale" and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise PruningError("importance: bn_scale needs batch norm, and the model has none; use magnitude")
    if importance in _GRADIENTS:
        _GRADIENTS[importance](module, batches)
    try:
        found = {group.name: _SCORERS[importance]()(group.handle) for group in groups}
    finally:
        module.zero_grad(set_to_none=True)
    kept = {name: score.detach().cpu() for name, score in found.items() if score is not None}
    broken = [name for name, score in kept.items() if not bool(torch.isfinite(score).all())]
    if broken:
        raise PruningError(f"importance: {importance} gives no finite score for {broken[0]}; use magnitude")
    return kept


_SCORERS: Mapping[str, Callable[[], Any]] = {
    "magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "l1": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=1),
    "bn_scale": torch_pruning.importance.BNScaleImportance,
    "lamp": torch_pruning.importance.LAMPImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "hessian": torch_pruning.importance.GroupHessianImportance,
}


def _mean_gradients(module: nn.Module, batches: Batches) -> None:
    """Leave the loss's gradient in `.grad`."""
    module.zero_grad(set_to_none=True)
    for images, labels in batches:
        functional.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
    _require_gradients(module)


def _squared_gradients(module: nn.Module, batches: Batches) -> None:
    """Leave the mean of the squared gradients of single images in `.grad`, where the scorer reads the Hessian."""
    total = {parameter: torch.zeros_like(parameter) for parameter in module.parameters()}
    count = 0
    for images, labels in batches:
        for image, label in zip(images[: _HESSIAN_IMAGES - count], labels, strict=False):
            module.zero_grad(set_to_none=True)
            functional.cross_entropy(module(image[None]), label[None]).backward()  # type: ignore[no-untyped-call]
            for parameter, square in total.items():
                if parameter.grad is not None:
                    square.add_(parameter.grad.square())
            count += 1
    for parameter, square in total.items():
        parameter.grad = square / max(1, count)
    _require_gradients(module)


def _require_gradients(module: nn.Module) -> None:
    """A layer that no loss reaches has no gradient: it counts as zero, and one without any is an error."""
    parameters = list(module.parameters())
    if all(parameter.grad is None for parameter in parameters):
        raise PruningError("importance: the loss has no gradient; use importance: magnitude")
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


_GRADIENTS: Mapping[str, Callable[[nn.Module, Batches], None]] = {
    "taylor": _mean_gradients,
    "hessian": _squared_gradients,
}
