"""Rounding one layer's weights so that its output changes least.

What enters: float weights, their scales, and the inputs that the layer meets. What leaves: integers. Rounding is
GPTQ's column-by-column update (Frantar et al., 2023, "GPTQ", algorithm 1); a grouped or depthwise convolution has one
small Hessian a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

_DAMPING = 0.01  # share of the mean diagonal added to the Hessian, GPTQ's own default
_BLOCK = 64
# Sampled input patches per layer. A Hessian needs a few times as many samples as it has columns.
_MIN_PATCHES = 2048
_PATCHES_PER_COLUMN = 8
# Ridges tried for each layer, as shares of the mean diagonal, and the share of samples (1 / n) that decides.
_RIDGES = (0.02, 0.1, 0.5, 2.0)
_HELD_OUT_SHARE = 4

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}


def round_compensated(
    weight: Tensor,
    scale: Tensor,
    inputs: Sequence[Tensor],
    node: Node,
    *,
    low: int,
    high: int,
    float_inputs: Sequence[Tensor] = (),
) -> Tensor:
    """Integers [low, high] for `weight` at `scale`, chosen so that the layer's output on `inputs` changes least.

    With `float_inputs`, what `inputs` (batch after batch) would be without any rounding before them, the output aimed
    at is the one on those, so that a layer makes good what the layers before it lost. `weight` is
    [out, in / groups, kh, kw] or [out, in]; `scale` is [out]; returns int8 in the shape of `weight`. A weight that is
    exactly zero stays zero: pruning made it so.
    """
    groups = int(node.args[6]) if node.target in CONVOLUTIONS and len(node.args) > 6 else 1  # type: ignore[arg-type]
    columns = weight[0].numel()
    patches = _columns(inputs, weight, node, groups, columns)
    hessian = patches @ patches.transpose(1, 2)  # [groups, columns, columns]
    rows = weight.reshape(groups, -1, columns).double()
    if float_inputs:
        missing = _columns(float_inputs, weight, node, groups, columns).sub_(patches)
        rows = _aimed_at_float(rows, hessian, patches, missing)
    steps = scale.double().reshape(groups, -1)
    hessian = hessian.double()
    is_zero = (weight == 0).reshape(rows.shape)
    integers = _gptq(rows, steps, hessian, is_zero, low, high)
    integers = _better_rows(rows, steps, hessian, integers, is_zero, low, high)
    return integers.reshape(weight.shape).to(torch.int8)


def _columns(inputs: Sequence[Tensor], weight: Tensor, node: Node, groups: int, columns: int) -> Tensor:
    """What each weight is multiplied with: [groups, columns, samples]; the same samples for inputs of one shape."""
    if node.target in CONVOLUTIONS:
        return _patches(inputs, weight, node, groups, columns)
    return torch.cat([batch.reshape(-1, columns) for batch in inputs]).t().unsqueeze(0)


def _aimed_at_float(rows: Tensor, hessian: Tensor, patches: Tensor, missing: Tensor) -> Tensor:
    """Weights that give on rounded inputs what `rows` [groups, out, columns] give on float ones, by ridge regression.

    `missing` is what `patches` lack of the float inputs, `hessian` the products of `patches` with themselves. The
    asymmetric calibration of Li et al., 2025, "GPTAQ". Unbounded it learns the calibration images by heart, so each
    layer's ridge is the one that serves the last quarter of the samples (other images) best, and no change is one of
    the choices.
    """
    count = patches.shape[2]
    unseen = slice(count - count // _HELD_OUT_SHARE, count)
    patches_unseen, missing_unseen = patches[:, :, unseen], missing[:, :, unseen]
    transposed = patches.transpose(1, 2)
    cross = missing @ transposed
    seen_hessian = (hessian - patches_unseen @ patches_unseen.transpose(1, 2)).double()
    seen_cross = cross - missing_unseen @ patches_unseen.transpose(1, 2)

    def change(products: Tensor, wanted: Tensor, ridge: float) -> Tensor:
        diagonal = products.diagonal(dim1=1, dim2=2)
        added = torch.diag_embed((ridge * diagonal.mean(dim=1, keepdim=True)).clamp_min(1e-12).expand_as(diagonal))
        factor = torch.linalg.cholesky(products + added)
        return torch.cholesky_solve(wanted, factor).transpose(1, 2)

    wanted = (rows @ seen_cross.double()).transpose(1, 2)
    aim = rows.float() @ missing_unseen
    best, best_loss = None, float((aim**2).sum(dtype=torch.float64))
    for ridge in _RIDGES:
        moved = change(seen_hessian, wanted, ridge).float()
        loss = float(((aim - moved @ patches_unseen) ** 2).sum(dtype=torch.float64))
        if loss < best_loss:
            best, best_loss = ridge, loss
    if best is None:
        return rows
    return rows + change(hessian.double(), (rows @ cross.double()).transpose(1, 2), best)


def _better_rows(
    rows: Tensor, steps: Tensor, hessian: Tensor, integers: Tensor, is_zero: Tensor, low: int, high: int
) -> Tensor:
    """Keep each output channel's `integers` only where they beat rounding to nearest: the update is greedy."""
    step = steps[:, :, None]
    nearest = torch.round(rows / step).clamp(low, high).masked_fill(is_zero, 0)
    losses = []
    for candidate in (integers, nearest):
        error = rows - candidate * step
        losses.append(((error @ hessian) * error).sum(dim=2, keepdim=True))
    return torch.where(losses[0] < losses[1], integers, nearest)


def _patches(inputs: Sequence[Tensor], weight: Tensor, node: Node, groups: int, columns: int) -> Tensor:
    """A seeded choice of the input patches of a convolution: [groups, columns, samples]."""
    is_named = node.target is aten.conv2d.padding
    defaults: list[Any] = [[1, 1], "valid" if is_named else [0, 0], [1, 1]]
    arguments: list[Any] = list(node.args[3:6])
    stride, padding, dilation = arguments + defaults[len(arguments) :]
    kernel = tuple(weight.shape[2:])
    wanted = max(_MIN_PATCHES, _PATCHES_PER_COLUMN * columns)
    per_image = max(1, -(-wanted // sum(len(batch) for batch in inputs)))
    generator = torch.Generator().manual_seed(0)
    collected = []
    for batch in inputs:
        if is_named:
            padded = _explicit_padding(batch, str(padding), kernel, dilation)
        else:
            padded = functional.pad(batch, (padding[1], padding[1], padding[0], padding[0]))
        # The first pixel of each patch, and the distance of each of its pixels from the first.
        corners, offsets = [], []
        for axis in (0, 1):
            reach = dilation[axis] * (kernel[axis] - 1)
            corners.append(torch.arange(0, padded.shape[2 + axis] - reach, stride[axis]))
            offsets.append(torch.arange(kernel[axis]) * dilation[axis])
        width = padded.shape[3]
        starts = (corners[0][:, None] * width + corners[1]).flatten()
        steps = (offsets[0][:, None] * width + offsets[1]).flatten()
        for image in padded:
            chosen = starts
            if len(starts) > per_image:
                chosen = starts[torch.randperm(len(starts), generator=generator)[:per_image]].sort().values
            pixels = image.flatten(1)[:, (steps[:, None] + chosen).flatten()]
            collected.append(pixels.view(groups, columns, -1))
    return torch.cat(collected, dim=2)


def _explicit_padding(inputs: Tensor, mode: str, kernel: tuple[int, ...], dilation: Any) -> Tensor:
    if mode == "valid":
        return inputs
    pads: list[int] = []
    for size, step in reversed(list(zip(kernel, dilation, strict=True))):
        total = step * (size - 1)
        pads += [total // 2, total - total // 2]
    return functional.pad(inputs, pads)


def _gptq(rows: Tensor, steps: Tensor, hessian: Tensor, is_zero: Tensor, low: int, high: int) -> Tensor:
    """Round `rows` [groups, out, columns] column by column, spreading each error over the columns still to come.

    `steps` [groups, out] are the scales; where `is_zero`, the integer is 0. Columns go from the largest Hessian
    diagonal to the smallest ("act order").
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    damping = _DAMPING * diagonal.mean(dim=1).clamp_min(1e-12)
    hessian = hessian + torch.diag_embed(damping[:, None] + dead.double() * damping[:, None])
    order = diagonal.argsort(dim=1, descending=True)
    back = order.argsort(dim=1)
    groups, count, columns = rows.shape
    permuted = rows.gather(2, order[:, None, :].expand_as(rows)).clone()
    held = is_zero.gather(2, order[:, None, :].expand_as(is_zero))
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    integers = torch.zeros_like(permuted)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(groups, count, end - start, dtype=rows.dtype)
        for column in range(start, end):
            value = permuted[:, :, column]
            rounded = torch.round(value / steps).clamp(low, high).masked_fill(held[:, :, column], 0)
            integers[:, :, column] = rounded
            error = (value - rounded * steps) / upper[:, column, column][:, None]
            permuted[:, :, column:end] -= error[:, :, None] * upper[:, None, column, column:end]
            errors[:, :, column - start] = error
        permuted[:, :, end:] -= errors @ upper[:, start:end, end:]
    return integers.gather(2, back[:, None, :].expand_as(integers))
