"""What ONNX Runtime's integer kernels compute, number for number, in PyTorch.

What enters: a converted graph (quantize, dequantize, float operators between). What leaves: a graph whose fused groups
run on integers, as the runtime's kernels do: sums of products without rounding, then one multiplication and one
rounding to the output's grid. A float simulation rounds in other places; its values differ by single steps at first,
and a deep net amplifies those until two simulations of one file agree on 98 to 99 % of the answers only.

The arithmetic follows the kernels' source (onnxruntime/core/mlas/lib: requantize in quantize.cpp, qladd.cpp, qlmul.cpp,
qlgavgpool.cpp). Integers are held in float32, which is exact below 2**24; larger sums are made in
parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from edgecompress.int8.operators import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE

aten = torch.ops.aten
_CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}
_CLAMPS = {
    *(aten.relu.default, aten.relu_.default, aten.relu6.default),
    *(aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.clamp_min_.default),
}
_SUMS = {aten.add.Tensor, aten.add_.Tensor}
_PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
_EXACT_IN_FLOAT32 = 2**24


class Grid:
    """The integers of one activation tensor: scale, zero point and range."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.scale, self.zero_point = torch.tensor(float(arguments[0]), dtype=torch.float32), int(arguments[1])
        self.low, self.high = int(arguments[2]), int(arguments[3])


def quantize_float(values: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """QuantizeLinear, its integers held in float32: round half to even of x / scale, plus the zero point."""
    return torch.round(values / scale).add_(zero_point).clamp_(low, high)


def dequantize_float(integers: Tensor, scale: float, zero_point: int) -> Tensor:
    """DequantizeLinear of integers held in float32."""
    return (integers - zero_point) * scale


def _requantize(sums: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return torch.round(sums.to(torch.float32).mul_(scale)).add_(grid.zero_point).clamp_(grid.low, grid.high)


class IntegerLayer(nn.Module):
    """QLinearConv or QGemm: an exact sum of products, then one rounding; without an output grid, float logits."""

    bias: Tensor | None
    scale: Tensor

    def __init__(
        self,
        call: Callable[..., Tensor],
        settings: tuple[Any, ...],
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        source: Grid,
        output: Grid | None,
    ) -> None:
        super().__init__()
        self._call, self._settings, self._source, self._output = call, settings, source, output
        self._channel_axis = -1 if call is functional.linear else 1
        reach = max(abs(source.low - source.zero_point), abs(source.high - source.zero_point))
        limits = weight.double().abs().flatten(2).sum(2) if weight.dim() > 2 else weight.double().abs()
        parts = _exact_parts(limits * reach)
        is_grouped = weight.dim() == 4 and len(settings) > 3 and settings[3] != 1
        dtype = torch.float64 if is_grouped and len(parts) > 1 else torch.float32
        self._sizes = [weight.shape[1]] if dtype == torch.float64 else parts
        for number, part in enumerate(torch.split(weight.to(dtype), self._sizes, dim=1)):
            self.register_buffer(f"weight_{number}", part.contiguous())
        # Added last: of two exact addends the one rounding of the sum is the kernel's own, int32 to float32. A layer
        # that began with the bias could round on its way.
        is_exact = bias is None or float(bias.double().abs().max()) < _EXACT_IN_FLOAT32
        bias_dtype = torch.float32 if is_exact and dtype == torch.float32 and len(parts) == 1 else torch.float64
        self.register_buffer("bias", None if bias is None else self._per_channel(bias.to(bias_dtype)))
        scale = source.scale * weight_scale.to(torch.float32)
        scale = scale if output is None else scale / output.scale
        self.register_buffer("scale", self._per_channel(scale))

    def forward(self, integers: Tensor) -> Tensor:
        """Integers in float32 [N, ...] to integers in float32, or to logits."""
        centered = integers if self._source.zero_point == 0 else integers - self._source.zero_point
        sums = self._sums(centered).to(torch.float32)
        if self._output is None:
            return sums * self.scale
        return _requantize(sums, self.scale, self._output)

    def _sums(self, centered: Tensor) -> Tensor:
        if len(self._sizes) == 1:
            weight = self.get_buffer("weight_0")
            total = self._call(centered.to(weight.dtype), weight, None, *self._settings)
        else:
            pieces = torch.split(centered, self._sizes, dim=self._channel_axis)
            weights = (self.get_buffer(f"weight_{number}") for number in range(len(pieces)))
            parts = (self._call(p, w, None, *self._settings) for p, w in zip(pieces, weights, strict=True))
            total = next(parts).to(torch.float64)
            for part in parts:
                total.add_(part)
        if self.bias is None:
            return total
        return total.to(self.bias.dtype).add_(self.bias)

    def _per_channel(self, values: Tensor) -> Tensor:
        return values if self._channel_axis == -1 else values.view(-1, 1, 1)


def _exact_parts(limits: Tensor) -> list[int]:
    """Sizes of the fewest equal runs of input channels whose sums of products stay exact in float32.

    `limits` [outputs, inputs] is the largest absolute product of each pair. float64 would do without parts, at a tenth
    of the speed: PyTorch's fast convolutions are float32.
    """
    channels = limits.shape[1]
    for count in range(1, channels + 1):
        parts = torch.split(limits, -(-channels // count), dim=1)
        if all(float(part.sum(1).max()) < _EXACT_IN_FLOAT32 for part in parts):
            return [part.shape[1] for part in parts]
    raise AssertionError("one 8-bit kernel cannot sum past 2**24")  # 32 k taps of one channel


class IntegerSum(nn.Module):
    """QLinearAdd: two fused multiply-adds, each rounded once to float32, as AVX2 and Arm do."""

    def __init__(self, left: Grid, right: Grid, output: Grid) -> None:
        super().__init__()
        left_ratio, right_ratio = left.scale / output.scale, right.scale / output.scale
        # The compiler fuses the first of the two products with the sum: it is not rounded, the second one is.
        shift = left_ratio.double() * left.zero_point + (right_ratio * right.zero_point).double()
        self._fixed = float(torch.tensor(float(output.zero_point)) - shift.to(torch.float32))
        self._left, self._right, self._output = float(left_ratio), float(right_ratio), output

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Integers of two tensors to integers of their sum."""
        # A product of an 8-bit integer and a float32 is exact in float64, so only the sum is rounded.
        partial = right.to(torch.float64).mul_(self._right).add_(self._fixed).to(torch.float32)
        total = left.to(torch.float64).mul_(self._left).add_(partial).to(torch.float32)
        return total.round_().clamp_(self._output.low, self._output.high)


class IntegerProduct(nn.Module):
    """QLinearMul."""

    def __init__(self, left: Grid, right: Grid, output: Grid) -> None:
        super().__init__()
        self._left, self._right, self._output = left.zero_point, right.zero_point, output
        self._scale = float(left.scale * right.scale / output.scale)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Integers of two tensors to integers of their product."""
        product = ((left - self._left) * (right - self._right)).mul_(self._scale)
        return product.add_(self._output.zero_point).round_().clamp_(self._output.low, self._output.high)


class IntegerGlobalPool(nn.Module):
    """QLinearGlobalAveragePool; `keep` says whether height and width stay, as axes of length one."""

    def __init__(self, source: Grid, output: Grid, keep: bool) -> None:
        super().__init__()
        self._source, self._output, self._keep = source, output, keep

    def forward(self, integers: Tensor) -> Tensor:
        """Integers [N, C, H, W] to integers [N, C, 1, 1] or [N, C]."""
        pixels = integers.shape[2] * integers.shape[3]
        scale = self._source.scale / (self._output.scale * torch.tensor(float(pixels)))
        sums = (integers - self._source.zero_point).sum(dim=(2, 3), keepdim=self._keep)
        return _requantize(sums, scale, self._output)


def simulate_integers(converted: GraphModule) -> GraphModule:
    """Replace every group that the runtime fuses by its integer arithmetic; the rest stays as it is written."""
    twin = copy.deepcopy(converted)
    builder = _Builder(twin)
    for node in list(twin.graph.nodes):
        builder.fuse(node)
    builder.replace_boundaries()
    for node in reversed(list(twin.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:  # also clamps in place, which look impure
            twin.graph.erase_node(node)
    twin.recompile()
    return twin


class _Builder:
    def __init__(self, twin: GraphModule) -> None:
        self.twin = twin
        self.done: dict[Node, Node] = {}  # quantize node -> the node that gives its integers

    def fuse(self, node: Node) -> None:
        """Replace `node`, its inputs' dequantize nodes and its output's quantize node where they form one kernel."""
        if node.op != "call_function":
            return
        sources = [a for a in node.args[:2] if isinstance(a, Node)]
        if node.target in _CONVOLUTIONS or node.target is aten.linear.default:
            self._fuse_layer(node)
        elif node.target in _SUMS | _PRODUCTS and len(sources) == 2:
            grids = [self._grid_of(source) for source in sources]
            quantize = self._quantize_behind(node)
            if quantize is None or grids[0] is None or grids[1] is None or node.kwargs:
                return
            kind = IntegerSum if node.target in _SUMS else IntegerProduct
            self._insert(kind(grids[0], grids[1], Grid(quantize.args[1:5])), sources, quantize, node)
        elif node.target in (aten.adaptive_avg_pool2d.default, aten.mean.dim) and _is_global(node):
            grid, quantize = self._grid_of(sources[0]), self._quantize_behind(node)
            if grid is None or quantize is None:
                return
            keep = node.target is not aten.mean.dim or (len(node.args) > 2 and bool(node.args[2]))
            self._insert(IntegerGlobalPool(grid, Grid(quantize.args[1:5]), keep), sources[:1], quantize, node)

    def _fuse_layer(self, node: Node) -> None:
        source, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        assert isinstance(source, Node)
        grid = self._grid_of(source)
        if grid is None or not isinstance(weight, Node) or weight.target is not DEQUANTIZE_CHANNELS:
            return
        if isinstance(bias, Node) and bias.target is not DEQUANTIZE_CHANNELS:
            return
        quantize = self._quantize_behind(node)
        gives_logits = all(user.op == "output" for user in node.users)
        if quantize is None and not gives_logits:
            return
        layer = IntegerLayer(
            functional.linear if node.target is aten.linear.default else cast(Callable[..., Tensor], node.target),
            tuple(node.args[3:]),
            self._constant(weight.args[0]),
            self._constant(weight.args[1]),
            self._constant(bias.args[0]) if isinstance(bias, Node) else None,
            grid,
            None if quantize is None else Grid(quantize.args[1:5]),
        )
        self._insert(layer, [source], quantize, node)

    def _insert(self, module: nn.Module, sources: list[Node], quantize: Node | None, node: Node) -> None:
        name = f"_integer_{node.name}"
        self.twin.add_submodule(name, module)
        place = node if quantize is None else quantize
        quantized = [source.args[0] for source in sources]
        inputs = [self.done.get(q, q) for q in quantized if isinstance(q, Node)]
        with self.twin.graph.inserting_before(place):
            new = self.twin.graph.call_module(name, tuple(inputs))
        if quantize is None:
            node.replace_all_uses_with(new)
        else:
            self.done[quantize] = new

    def replace_boundaries(self) -> None:
        """Quantize and dequantize nodes that belong to no kernel: the same arithmetic, integers held in float32."""
        for node in list(self.twin.graph.nodes):
            if node.op != "call_function" or node.target not in (QUANTIZE, DEQUANTIZE):
                continue
            if node.target is QUANTIZE:
                new = self.done.get(node)
                if new is None:
                    with self.twin.graph.inserting_before(node):
                        new = self.twin.graph.call_function(quantize_float, tuple(node.args[:5]))
            else:
                with self.twin.graph.inserting_before(node):
                    new = self.twin.graph.call_function(dequantize_float, tuple(node.args[:3]))
            node.replace_all_uses_with(new)
            self.twin.graph.erase_node(node)

    def _grid_of(self, node: Node) -> Grid | None:
        """The grid of a tensor that is read back from integers, or None."""
        return Grid(node.args[1:5]) if node.target is DEQUANTIZE else None

    def _quantize_behind(self, node: Node) -> Node | None:
        """The quantize node behind `node`, through one clamp that the grid's own range replaces."""
        users = list(node.users)
        if len(users) == 1 and users[0].target in _CLAMPS:
            users = list(users[0].users)
        return users[0] if len(users) == 1 and users[0].target is QUANTIZE else None

    def _constant(self, node: Any) -> Tensor:
        value: Any = self.twin
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value.detach()


def _is_global(node: Node) -> bool:
    if node.target is aten.adaptive_avg_pool2d.default:
        size: Any = node.args[1]
        return isinstance(size, (list, tuple)) and all(int(s) == 1 for s in size)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return isinstance(dims, (list, tuple)) and sorted(int(dim) for dim in dims) in ([2, 3], [-2, -1])
