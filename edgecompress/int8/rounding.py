"""Error-compensated rounding of weights, and bias correction, for one converted graph.

What enters: a converted int8 graph, the float graph it came from, and a batch of calibration images. What leaves: the
same graph with better integers at the same scales, so the file is as small and as fast as before. Layers are treated
in the order they run, each on inputs that the already treated layers produce. Rounding is GPTQ's column-by-column
update (Frantar et al., 2023, "GPTQ", algorithm 1); a grouped or depthwise convolution has one small Hessian a group.
Bias correction is the empirical one of Nagel et al., 2019, "Data-Free Quantization", section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from edgecompress import console
from edgecompress.int8.operators import DEQUANTIZE_CHANNELS

_DAMPING = 0.01  # share of the mean diagonal added to the Hessian, GPTQ's own default
_BLOCK = 64
# Sampled input patches per layer. A Hessian needs a few times as many samples as it has columns.
_MIN_PATCHES = 2048
_PATCHES_PER_COLUMN = 8
# Ridges tried for each layer, as shares of the mean diagonal, and the share of samples (1 / n) that decides.
_RIDGES = (0.02, 0.1, 0.5, 2.0)
_HELD_OUT_SHARE = 4

aten = torch.ops.aten
_CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}


@dataclass(frozen=True)
class _WeightSite:
    """Where a layer's integers live in the converted graph."""

    integers: Tensor  # int8 [out, in / groups, kh, kw] or [out, in]
    scale: Tensor  # float32 [out]
    low: int
    high: int
    bias_integers: Tensor | None  # int32 [out]
    bias_scale: Tensor | None


def compensate(converted: GraphModule, simulation: GraphModule, reference: GraphModule, images: Tensor) -> None:
    """Improve the integers of `converted` (and the floats of `simulation`) in place.

    `simulation` computes what `converted` computes, node for node under the same names; `reference` is
    the float graph under the same names. `images` is one normalized batch [N, C, H, W].
    """
    sites = dict(_weight_sites(converted))
    float_steps = _Stepper(reference, images)
    int8_steps = _Stepper(simulation, images)
    with torch.no_grad(), console.progress("compensating rounding", len(sites)) as advance:
        for node in simulation.graph.nodes:
            if node.name in sites:
                _treat_layer(node, sites[node.name], int8_steps, float_steps)
                advance()
            else:
                int8_steps.run_until(node.name)


class _Stepper:
    """Runs a graph node by node and drops each value after its last reader."""

    def __init__(self, graph: GraphModule, images: Tensor) -> None:
        self.graph = graph
        self._interpreter = Interpreter(graph)
        self._interpreter.args_iter = iter([images])
        self._nodes = list(graph.graph.nodes)
        self._position = 0
        self.values: dict[Node, Any] = self._interpreter.env

    def run_until(self, name: str) -> Any:
        """Run up to and with the node `name`; returns its value, also when it ran already."""
        while True:
            if self._position and self._nodes[self._position - 1].name == name:
                return self.values.get(self._nodes[self._position - 1])
            node = self._nodes[self._position]
            self._position += 1
            if node.op == "output":
                continue
            self.values[node] = self._interpreter.run_node(node)
            for dead in self._interpreter.user_to_last_uses.get(node, []):
                if dead is not node:
                    self.values.pop(dead, None)

    def input_of(self, name: str) -> Any:
        """Run up to the node `name` without it; returns the value of its first argument."""
        while self._nodes[self._position].name != name:
            self.run_until(self._nodes[self._position].name)
        return self.values[self._nodes[self._position].args[0]]

    def constant(self, node: Node) -> Tensor:
        """The tensor that a get_attr node reads."""
        value: Any = self.graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value


def _weight_sites(converted: GraphModule) -> Iterator[tuple[str, _WeightSite]]:
    def constant(node: Any) -> Tensor:
        value: Any = converted
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    for node in converted.graph.nodes:
        if node.target not in _CONVOLUTIONS and node.target is not aten.linear.default:
            continue
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.target is not DEQUANTIZE_CHANNELS:
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        has_bias = isinstance(bias, Node) and bias.target is DEQUANTIZE_CHANNELS
        yield (
            node.name,
            _WeightSite(
                integers=constant(weight.args[0]),
                scale=constant(weight.args[1]).float(),
                low=int(weight.args[4]),  # type: ignore[arg-type]
                high=int(weight.args[5]),  # type: ignore[arg-type]
                bias_integers=constant(bias.args[0]) if has_bias else None,  # type: ignore[union-attr]
                bias_scale=constant(bias.args[1]).float() if has_bias else None,  # type: ignore[union-attr]
            ),
        )


def _treat_layer(node: Node, site: _WeightSite, int8_steps: _Stepper, float_steps: _Stepper) -> None:
    """Round one layer's weights against its own inputs, then move its bias by the mean error that is left."""
    float_inputs = float_steps.input_of(node.name)
    float_output = float_steps.run_until(node.name)
    float_node = float_steps._nodes[float_steps._position - 1]
    weight_node = float_node.args[1]
    assert isinstance(weight_node, Node)
    weight = _float_weight(float_steps, weight_node)
    int8_inputs = int8_steps.input_of(node.name)
    integers = round_compensated(
        weight, site.scale, int8_inputs, node, low=site.low, high=site.high, float_inputs=float_inputs
    )
    site.integers.copy_(integers)
    read_back = node.args[1]
    assert isinstance(read_back, Node)
    int8_steps.constant(read_back).copy_(integers.float() * _per_channel(site.scale, integers.dim()))
    int8_steps.values.pop(read_back, None)
    int8_steps.values[read_back] = int8_steps.constant(read_back)
    output = int8_steps.run_until(node.name)
    if site.bias_integers is None or site.bias_scale is None:
        return
    # A convolution's channels are axis 1, a linear layer's the last one, however many axes there are.
    channel_axis = 1 if node.target in _CONVOLUTIONS else output.dim() - 1
    dims = [d for d in range(output.dim()) if d != channel_axis]
    error = (float_output - output).mean(dim=dims)
    steps = torch.round(error / site.bias_scale).to(torch.int64)
    limit = 2**31 - 1
    corrected = (site.bias_integers.to(torch.int64) + steps).clamp(-limit, limit).to(torch.int32)
    moved = (corrected.double() - site.bias_integers.double()) * site.bias_scale.double()
    site.bias_integers.copy_(corrected)
    bias_node = node.args[2]
    assert isinstance(bias_node, Node)
    int8_steps.constant(bias_node).copy_(corrected.float() * site.bias_scale)
    output += moved.float().view([-1] + [1] * (output.dim() - 1 - channel_axis))


def _float_weight(steps: _Stepper, node: Node) -> Tensor:
    """Follow observers back to the parameter."""
    while node.op != "get_attr":
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return steps.constant(node).detach().float()


def _per_channel(scale: Tensor, dims: int) -> Tensor:
    return scale.view([-1] + [1] * (dims - 1))


def round_compensated(
    weight: Tensor,
    scale: Tensor,
    inputs: Tensor,
    node: Node,
    *,
    low: int,
    high: int,
    float_inputs: Tensor | None = None,
) -> Tensor:
    """Integers [low, high] for `weight` at `scale`, chosen so that the layer's output on `inputs` changes least.

    With `float_inputs`, what `inputs` would be without any rounding before them, the output aimed at is the one on
    those, so that a layer makes good what the layers before it lost. `weight` is [out, in / groups, kh, kw] or
    [out, in]; `scale` is [out]; returns int8 in the shape of `weight`.
    """
    groups = int(node.args[6]) if node.target in _CONVOLUTIONS and len(node.args) > 6 else 1  # type: ignore[arg-type]
    columns = weight[0].numel()
    patches = _columns(inputs, weight, node, groups, columns)
    hessian = (patches @ patches.transpose(1, 2)).double()  # [groups, columns, columns]
    rows = weight.reshape(groups, -1, columns).double()
    if float_inputs is not None:
        rows = _aimed_at_float(rows, patches, _columns(float_inputs, weight, node, groups, columns))
    steps = scale.double().reshape(groups, -1)
    integers = _better_rows(rows, steps, hessian, _gptq(rows, steps, hessian, low, high), low, high)
    return integers.reshape(weight.shape).to(torch.int8)


def _columns(inputs: Tensor, weight: Tensor, node: Node, groups: int, columns: int) -> Tensor:
    """What each weight is multiplied with: [groups, columns, samples]; the same samples for inputs of one shape."""
    if node.target in _CONVOLUTIONS:
        return _patches(inputs, weight, node, groups, columns)
    return inputs.reshape(-1, columns).t().unsqueeze(0)


def _aimed_at_float(rows: Tensor, patches: Tensor, float_patches: Tensor) -> Tensor:
    """Weights that give on rounded inputs what `rows` [groups, out, columns] give on float ones, by ridge regression.

    The asymmetric calibration of Li et al., 2025, "GPTAQ". Unbounded it learns the calibration images by heart, so each
    layer's ridge is the one that serves the last quarter of the samples (other images) best, and no change is one of
    the choices.
    """
    count = patches.shape[2]
    seen = slice(0, count - count // _HELD_OUT_SHARE)
    unseen = slice(count - count // _HELD_OUT_SHARE, count)

    def products(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        rounded, exact = patches[:, :, part], float_patches[:, :, part]
        missing = exact - rounded
        gram = (rounded @ rounded.transpose(1, 2)).double()
        return gram, (missing @ rounded.transpose(1, 2)).double(), (missing @ missing.transpose(1, 2)).double()

    def change(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        added = torch.diag_embed((ridge * diagonal.mean(dim=1, keepdim=True)).clamp_min(1e-12).expand_as(diagonal))
        factor = torch.linalg.cholesky(gram + added)
        return torch.cholesky_solve((rows @ cross).transpose(1, 2), factor).transpose(1, 2)

    gram, cross, _ = products(seen)
    gram_unseen, cross_unseen, missing_unseen = products(unseen)
    best, best_loss = None, float(((rows @ missing_unseen) * rows).sum())
    for ridge in _RIDGES:
        moved = change(gram, cross, ridge)
        # |rows @ missing - moved @ rounded|**2, written with the products of the inputs.
        loss = float(
            ((rows @ missing_unseen) * rows).sum()
            - 2 * ((rows @ cross_unseen) * moved).sum()
            + ((moved @ gram_unseen) * moved).sum()
        )
        if loss < best_loss:
            best, best_loss = ridge, loss
    if best is None:
        return rows
    return rows + change(gram + gram_unseen, cross + cross_unseen, best)


def _better_rows(rows: Tensor, steps: Tensor, hessian: Tensor, integers: Tensor, low: int, high: int) -> Tensor:
    """Keep each output channel's `integers` only where they beat rounding to nearest: the update is greedy."""
    step = steps[:, :, None]
    nearest = torch.round(rows / step).clamp(low, high)
    losses = []
    for candidate in (integers, nearest):
        error = rows - candidate * step
        losses.append(((error @ hessian) * error).sum(dim=2, keepdim=True))
    return torch.where(losses[0] < losses[1], integers, nearest)


def _patches(inputs: Tensor, weight: Tensor, node: Node, groups: int, columns: int) -> Tensor:
    """A seeded choice of the input patches of a convolution: [groups, columns, samples]."""
    is_named = node.target is aten.conv2d.padding
    defaults: list[Any] = [[1, 1], "valid" if is_named else [0, 0], [1, 1]]
    arguments: list[Any] = list(node.args[3:6])
    stride, padding, dilation = arguments + defaults[len(arguments) :]
    kernel = tuple(weight.shape[2:])
    if is_named:
        inputs, padding = _explicit_padding(inputs, str(padding), kernel, dilation), [0, 0]
    wanted = max(_MIN_PATCHES, _PATCHES_PER_COLUMN * columns)
    per_image = max(1, -(-wanted // inputs.shape[0]))
    generator = torch.Generator().manual_seed(0)
    collected = []
    for image in torch.split(inputs, 1):
        unfolded = functional.unfold(image, kernel, dilation=dilation, padding=padding, stride=stride)[0]
        if unfolded.shape[1] > per_image:
            unfolded = unfolded[:, torch.randperm(unfolded.shape[1], generator=generator)[:per_image]]
        collected.append(unfolded)
    samples = torch.cat(collected, dim=1)  # [groups * columns, samples]
    return samples.view(groups, columns, -1)


def _explicit_padding(inputs: Tensor, mode: str, kernel: tuple[int, ...], dilation: Any) -> Tensor:
    if mode == "valid":
        return inputs
    pads: list[int] = []
    for size, step in reversed(list(zip(kernel, dilation, strict=True))):
        total = step * (size - 1)
        pads += [total // 2, total - total // 2]
    return functional.pad(inputs, pads)


def _gptq(rows: Tensor, steps: Tensor, hessian: Tensor, low: int, high: int) -> Tensor:
    """Round `rows` [groups, out, columns] column by column, spreading each error over the columns still to come.

    `steps` [groups, out] are the scales. Columns go from the largest Hessian diagonal to the smallest ("act order").
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    damping = _DAMPING * diagonal.mean(dim=1).clamp_min(1e-12)
    hessian = hessian + torch.diag_embed(damping[:, None] + dead.double() * damping[:, None])
    order = diagonal.argsort(dim=1, descending=True)
    back = order.argsort(dim=1)
    groups, count, columns = rows.shape
    permuted = rows.gather(2, order[:, None, :].expand_as(rows)).clone()
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    integers = torch.zeros_like(permuted)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(groups, count, end - start, dtype=rows.dtype)
        for column in range(start, end):
            value = permuted[:, :, column]
            rounded = torch.round(value / steps).clamp(low, high)
            integers[:, :, column] = rounded
            error = (value - rounded * steps) / upper[:, column, column][:, None]
            permuted[:, :, column:end] -= error[:, :, None] * upper[:, None, column, column:end]
            errors[:, :, column - start] = error
        permuted[:, :, end:] -= errors @ upper[:, start:end, end:]
    return integers.gather(2, back[:, None, :].expand_as(integers))
