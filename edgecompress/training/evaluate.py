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
from edgecompress.errors import EvaluationError
from edgecompress.models.finiteness import first_non_finite_layer

EVAL_BATCH_SIZE = 64


def collect_logits(
    module: nn.Module | Callable[[Tensor], Tensor],
    split: PreparedSplit,
    preprocessing: Preprocessing,
    *,
    indices: Tensor | None = None,
    description: str = "evaluating",
) -> Tensor:
    """Run every image of the split (or those at `indices`) once, in order; returns float32 logits on the CPU.

    Raises EvaluationError where they are not finite.
    """
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
    logits = torch.cat(collected)
    _require_finite(logits, module, split, preprocessing, indices=indices, description=description)
    return logits


def _require_finite(
    logits: Tensor,
    module: nn.Module | Callable[[Tensor], Tensor],
    split: PreparedSplit,
    preprocessing: Preprocessing,
    *,
    indices: Tensor | None,
    description: str,
) -> None:
    """Raises EvaluationError that names the first image and the layer where NaN or infinity begins.

    Such logits have a largest one too, so that an accuracy would come out of them.
    """
    rows = (~torch.isfinite(logits)).any(dim=1)
    if not bool(rows.any()):
        return
    first = int(rows.nonzero()[0])
    index = first if indices is None else int(indices[first])
    name = split.file_name(index) or f"image {index}"
    layer = None
    if isinstance(module, nn.Module) and not isinstance(module, torch.fx.GraphModule):
        images, _ = next(split.batches(1, indices=torch.tensor([index])))
        batch = preprocessing.normalize(images.to(_device_of(module)))
        layer = first_non_finite_layer(module, batch)
    where = f", first in layer '{layer}'" if layer is not None else ""
    raise EvaluationError(
        f"{description}: the logits are NaN or infinite on {int(rows.sum())} of {len(rows)} images of {split.name} "
        f"(the first is {name}){where}; check the weights and the arithmetic of that layer"
    )


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
