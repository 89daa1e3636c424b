"""Logits and accuracy of a PyTorch model on a split.

What enters: a module and a prepared split. What leaves: logits [samples, classes] on the CPU. Everything that is
reported later is computed from logits, so no model runs twice over the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgecompress import console
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit

EVAL_BATCH_SIZE = 64


def collect_logits(
    module: nn.Module | Callable[[Tensor], Tensor],
    split: PreparedSplit,
    preprocessing: Preprocessing,
    *,
    indices: Tensor | None = None,
    description: str = "evaluating",
) -> Tensor:
    """Run every image of the split (or those at `indices`) once, in order; returns float32 logits on the CPU."""
    device = _device_of(module)
    if isinstance(module, nn.Module) and not isinstance(module, torch.fx.GraphModule):
        module.eval()
    total = len(split) if indices is None else len(indices)
    collected: list[Tensor] = []
    with torch.inference_mode(), console.progress(description, total) as advance:
        for images, _ in split.batches(EVAL_BATCH_SIZE, indices=indices):
            batch = preprocessing.normalize(images.to(device)).contiguous(memory_format=torch.channels_last)
            collected.append(module(batch).float().cpu())
            advance(len(images))
    return torch.cat(collected)


def _device_of(module: object) -> torch.device:
    if isinstance(module, nn.Module):
        tensor = next(iter(module.parameters()), None)
        if tensor is not None:
            return tensor.device
    return torch.device("cpu")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of rows whose largest logit is the label's."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def wilson_interval(fraction: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927), which stays inside [0, 1] near its ends."""
    if samples == 0:
        return 0.0, 1.0
    denominator = 1.0 + z * z / samples
    centre = (fraction + z * z / (2 * samples)) / denominator
    half = z * math.sqrt(fraction * (1 - fraction) / samples + z * z / (4 * samples * samples)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_drop_interval(before: Tensor, after: Tensor, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a drop in accuracy between two models on the same images; both are right-or-wrong, bool [N].

    Only images on which the two differ count (Agresti and Min, 2005: half an image is added to each kind).
    """
    lost = float((before & ~after).sum()) + 0.5
    won = float((~before & after).sum()) + 0.5
    total = len(before) + 2.0
    drop = (lost - won) / total
    half = z * math.sqrt(max(0.0, (lost + won) - (lost - won) ** 2 / total)) / total
    return max(-1.0, drop - half), min(1.0, drop + half)
