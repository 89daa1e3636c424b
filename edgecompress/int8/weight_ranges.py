"""The step of each output channel's int8 weights.

What enters: a layer's float weights. What leaves: for each output channel of few weights the step, of those around the
one that its largest weight asks for, whose rounding changes the output least. What the weights meet is not known here,
but of what kind it is: a channel of few weights, as in a depthwise layer, reads neighbouring pixels behind a ReLU,
which are nearly alike and of one sign. So the sum of the rounding errors counts beside their squares: for inputs of
mean m and variance v the squared error of the output is v sum(e^2) + m^2 sum(e)^2. With the squares alone, as in Nagel
et al., 2021, "A White Paper on Neural Network Quantization", section 3.1, seven-bit weights came out worse than before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import PerChannelMinMaxObserver

# Of the step that the largest weight asks for.
_SHARES = tuple(0.8 + 0.005 * index for index in range(91))
# In channels of more weights the error of the weights says too little about that of the output
# (benchmarks/weight_ranges.py).
_MOST_WEIGHTS = 64
# m^2 over v, which is 0.5 for a normal distribution behind a ReLU, and 1.8 for its positive half.
_SUM_WEIGHT = 1.0


class WeightRangeObserver(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao ships no types
    """Symmetric steps for weights [out, ...], one an output channel."""

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


def _errors(rows: Tensor, steps: Tensor, low: int, high: int) -> Tensor:
    column = steps[:, None]
    errors = rows - torch.round(rows / column).clamp(low, high) * column
    return errors.square().sum(dim=1) + _SUM_WEIGHT * errors.sum(dim=1).square()
