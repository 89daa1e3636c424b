"""The step of each output channel's int8 weights.

What enters: a layer's float weights. What leaves: for each output channel of few weights the step, of those around the
one that its largest weight asks for, whose rounding changes the output least. What the weights meet is not known here,
but of what kind it is: a channel of few weights, as in a depthwise layer, reads neighbouring pixels behind a ReLU,
which are nearly alike and of one sign. So the sum of the rounding errors counts beside their squares: for inputs of
mean m and variance v the squared error of the output is v sum(e^2) + m^2 sum(e)^2. With the squares alone, as in Nagel
et al., 2021, "A White Paper on Neural Network Quantization", section 3.1, seven-bit weights came out worse than before.

A step is never so small that the kernel's int32 sum overflows: the bias is counted in units of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase, PerChannelMinMaxObserver

# Of the step that the largest weight asks for.
_SHARES = tuple(0.8 + 0.005 * index for index in range(91))
# In channels of more weights the error of the weights says too little about that of the output
# (benchmarks/weight_ranges.py).
_MOST_WEIGHTS = 64
# m^2 over v, which is 0.5 for a normal distribution behind a ReLU, and 1.8 for its positive half.
_SUM_WEIGHT = 1.0
# Half of what int32 holds: corrections may still move a bias.
_LARGEST_SUM = 2**30
_MOST_INPUT_STEPS = 255


class WeightRangeObserver(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao ships no types
    """Symmetric steps for weights [out, ...], one an output channel."""

    least_steps: Callable[[], Tensor] | None = None
    """The smallest steps that are allowed, float32 [out], once activations have been observed; None: any."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take in the weights; they are handed on unchanged."""
        self.weights = x_orig.detach()
        return super().forward(x_orig)  # type: ignore[no-any-return]

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Steps float32 [out] and zero points int [out], all zero."""
        steps, zero_points = super().calculate_qparams()
        if self.min_val.numel() == 0:  # it saw no weights
            return steps, zero_points
        steps = least_error_steps(self.weights, steps, self.quant_min, self.quant_max)
        if self.least_steps is not None:
            steps = torch.maximum(steps, self.least_steps())
        return steps, zero_points


def leave_room_for_biases(prepared: GraphModule) -> None:
    """Bound the weight steps of a graph with observers from below, so that no layer's int32 sum overflows.

    A channel's sum of products and its bias, in units of s_x s_w, are at most (|b| / s_x + 255 sum(|w|)) / s_w. Where a
    channel's weights are zero or tiny (a filter that was pruned, a batch norm without a scale), the step that they ask
    for would leave no room for its bias.
    """
    for node in prepared.graph.nodes:
        if len(node.args) < 3:
            continue
        reads, weights, bias = (_observer(prepared, argument) for argument in node.args[:3])
        if reads is None or bias is None or not isinstance(weights, WeightRangeObserver):
            continue
        value = attrgetter(str(node.args[2].args[0].target))(prepared)
        weights.least_steps = partial(_least_steps, weights, reads, value, weights.least_steps)


def _least_steps(
    weights: WeightRangeObserver, reads: ObserverBase, bias: Tensor, others: Callable[[], Tensor] | None
) -> Tensor:
    """For one layer; `others` are those of layers before it that share its weights."""
    input_step, _ = reads.calculate_qparams()
    products = _MOST_INPUT_STEPS * weights.weights.flatten(1).abs().sum(dim=1)
    steps = (bias.detach().abs() / input_step + products) / _LARGEST_SUM
    return steps if others is None else torch.maximum(steps, others())


def _observer(prepared: GraphModule, argument: object) -> ObserverBase | None:
    if not isinstance(argument, Node) or argument.op != "call_module":
        return None
    module = prepared.get_submodule(str(argument.target))
    return module if isinstance(module, ObserverBase) else None


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
