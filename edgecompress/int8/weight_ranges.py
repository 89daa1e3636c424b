"""The step of each output channel's int8 weights.

What enters: a layer's float weights. What leaves: for each output channel the step with the least squared rounding
error, of those around the one that its largest weight asks for (Nagel et al., 2021, "A White Paper on Neural Network
Quantization", section 3.1, on weights). At eight bits a smaller step, which cuts weights off, seldom gains anything;
but a channel of few weights, as in a depthwise layer, often lies closer to a slightly wider grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver

# Of the step that the largest weight asks for.
_SHARES = tuple(0.8 + 0.005 * index for index in range(91))
# In channels of more weights the error of the weights says too little about that of the output: the logits get worse
# (benchmarks/weight_ranges.py).
_MOST_WEIGHTS = 64


class WeightRangeObserver(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao ships no types
    """Symmetric steps of least squared error for weights [out, ...], one an output channel."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take in the weights; they are handed on unchanged."""
        self._weights = x_orig.detach()
        return super().forward(x_orig)  # type: ignore[no-any-return]

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Steps float32 [out] and zero points int [out], all zero."""
        steps, zero_points = super().calculate_qparams()
        if self.min_val.numel() == 0:  # it saw no weights
            return steps, zero_points
        return least_error_steps(self._weights, steps, self.quant_min, self.quant_max), zero_points


def least_error_steps(weights: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    """The best of the steps around `steps` [out] for each row of `weights` [out, ...] rounded to [low, high]."""
    rows = weights.flatten(1)
    if rows.shape[1] > _MOST_WEIGHTS:
        return steps
    best, least = steps, _errors(rows, steps, low, high)
    for share in _SHARES:
        tried = steps * share
        errors = _errors(rows, tried, low, high)
        best = torch.where(errors < least, tried, best)
        least = torch.minimum(errors, least)
    return best


def _errors(rows: Tensor, steps: Tensor, low: int, high: int) -> Any:
    column = steps[:, None]
    return ((rows - torch.round(rows / column).clamp(low, high) * column) ** 2).sum(dim=1)
