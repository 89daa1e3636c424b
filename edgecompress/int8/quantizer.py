"""Where int8 goes in a captured graph, so that ONNX Runtime's CPU provider fuses all of it.

What enters: a graph from `torch.export` with batch norm folded. What leaves: the same graph, annotated
for torchao's PT2E. The rule behind the annotations is ONNX Runtime's own: an operator runs on integers
when each of its inputs is a DequantizeLinear and its output goes into one QuantizeLinear
(onnxruntime/core/optimizer/qdq_transformer). So a tensor is quantized after the activation that the kernel
absorbs, never between; operators that only move values share the scale of their input; what has no integer
kernel stays in float.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from edgecompress.errors import ConfigurationError
from edgecompress.int8.decompose import decompose_activations, flatten_linears, pad_pools
from edgecompress.int8.scheme import Scheme
from edgecompress.int8.weight_ranges import WeightRangeObserver
from edgecompress.settings.spelling import did_you_mean

_ANNOTATION = "quantization_annotation"
aten = torch.ops.aten

# A dot product with weights: QLinearConv, QGemm.
_CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default}
_COMPUTE = {*_CONVOLUTIONS, aten.linear.default}
# Clamps that the kernel before them absorbs, since the quantized range ends where the clamp does.
_BOUNDED = {aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default}
_HALF_BOUNDED = {aten.clamp_min.default, aten.clamp_min_.default}
_CUT_ABOVE = {aten.clamp_max.default, aten.clamp_max_.default}
_CLAMPS = {aten.relu.default, aten.relu_.default, aten.relu6.default, *_BOUNDED, *_HALF_BOUNDED}
# Clamps to [0, 1] of x / 6 + 1 / 2: absorbed as well, the slope by the scale and the shift by the bias.
_HARD_SIGMOIDS = {aten.hardsigmoid.default, aten.hardsigmoid_.default}
# Both kinds of sigmoid: results between 0 and 1.
_SHARES = {*_HARD_SIGMOIDS, aten.sigmoid.default, aten.sigmoid_.default}
# Two tensors, element by element: QLinearAdd, QLinearMul.
_ELEMENTWISE = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
# A pooling kernel with scales of its own: QLinearGlobalAveragePool, QLinearAveragePool.
_POOLING = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim}
# Operators whose table look-up kernel takes and gives integers.
_LOOKUP = {aten.sigmoid.default, aten.sigmoid_.default, aten.leaky_relu.default, aten.leaky_relu_.default}
# Values move, none changes: the output keeps the input's scale.
_MOVERS = {
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.upsample_nearest2d.vec,  # not bilinear: the runtime's integer kernel cuts fractions off, half a step downwards
    aten.dropout.default,
    aten.dropout_.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.cat.default,
}
# Several outputs; the pieces are picked by `getitem`.
_SPLITTERS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
# What runs on integers whenever its input is some; sums, products and movers depend on their other tensors.
_INTEGER_READERS = {*_COMPUTE, *_CLAMPS, *_HARD_SIGMOIDS, *_POOLING, *_LOOKUP, *_SPLITTERS}


@dataclass(frozen=True)
class Layer:
    """A layer with weights that the quantizer turned to int8."""

    module_name: str
    node_name: str


@dataclass
class Placement:
    """What was annotated and what stays in float, by module name."""

    quantized: list[Layer] = field(default_factory=list)
    float_layers: list[str] = field(default_factory=list)


class OnnxRuntimeQuantizer(Quantizer):  # type: ignore[misc]  # torchao ships no types
    """Annotates what ONNX Runtime's CPU kernels fuse.

    `exclude` holds module names as globs; such layers stay in float. A glob that matches nothing raises
    ConfigurationError with the nearest names.
    """

    def __init__(self, scheme: Scheme, observer: Any, exclude: Sequence[str] = ()) -> None:
        self.scheme = scheme
        self.exclude = tuple(exclude)
        self.placement = Placement()
        low, high = scheme.activation_range
        self._activation = QuantizationSpec(
            dtype=scheme.activation_dtype,
            observer_or_fake_quant_ctr=observer,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_tensor_affine,
        )
        self._weight = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=WeightRangeObserver.with_args(),
            quant_min=-scheme.weight_limit,
            quant_max=scheme.weight_limit,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        # Zero to one whatever the images say: the quantized range is what clamps a hard-sigmoid.
        self._share = FixedQParamsQuantizationSpec(
            dtype=scheme.activation_dtype,
            scale=1.0 / (high - low),
            zero_point=low,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_tensor_affine,
        )
        self._quantized: dict[Node, Any] = {}  # the spec of every tensor that is integers already
        self._seen: set[Node] = set()

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Write operators without an integer kernel by others that have one."""
        return pad_pools(flatten_linears(decompose_activations(model)))

    def annotate(self, model: GraphModule) -> GraphModule:
        """Walk the graph from input to output once; every node sees whether its inputs are integers."""
        nodes = list(model.graph.nodes)
        self._check_globs([module_name(node) for node in nodes if node.target in _COMPUTE])
        self._quantized, self._seen = {}, set()
        for node in nodes:
            self._seen.add(node)
            if node.op != "call_function":
                continue
            if node.target in _COMPUTE:
                self._annotate_compute(node)
            elif node.target in _ELEMENTWISE:
                self._annotate_elementwise(node)
            elif node.target in _POOLING or node.target in _LOOKUP or node.target in _HARD_SIGMOIDS:
                self._annotate_unary(node)
            elif node.target in _MOVERS:
                self._annotate_mover(node)
            elif node.target in _SPLITTERS:
                self._annotate_splitter(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what has no integer kernel was left in float."""

    def _check_globs(self, names: list[str]) -> None:
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigurationError(f"exclude: '{pattern}' matches no layer{did_you_mean(pattern, names)}")

    def _annotate_compute(self, node: Node) -> None:
        name = module_name(node)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude) or not _has_constant_weight(node):
            self.placement.float_layers.append(name)
            return
        source, weight = node.args[0], node.args[1]
        assert isinstance(source, Node)
        assert isinstance(weight, Node)
        inputs: dict[Node, Any] = {source: self._spec_of(source), weight: self._weight}
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, Node):
            inputs[bias] = self._bias_spec(source, weight, node)
        self._mark(node, inputs, self._output_of(node))
        self.placement.quantized.append(Layer(name, node.name))

    def _annotate_elementwise(self, node: Node) -> None:
        """Both tensors must be integers already: a sum with a float tensor (ConvNeXt's first stage, whose residual
        begins at a layer norm) would lose accuracy by another rounding, and measured it was not faster for it."""
        sources = _nodes(node.args[:2])
        if len(sources) == 2 and all(self._is_integer(source) for source in sources):
            self._mark(node, {source: self._spec_of(source) for source in sources}, self._output_of(node))

    def _annotate_unary(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node) or not self._is_integer(source):
            return
        if node.target is aten.mean.dim and not _is_global_mean(node):
            return
        if node in self._quantized:
            return  # the kernel before it absorbs it
        self._mark(node, {source: self._spec_of(source)}, node)

    def _annotate_mover(self, node: Node) -> None:
        first = node.args[0]
        sources = _nodes(first if isinstance(first, (list, tuple)) else [first])
        if not sources or not all(self._is_integer(source) for source in sources):
            return
        if node.target in (aten.pad.default, aten.constant_pad_nd.default) and not _pads_with_zero(node):
            return
        # A range that starts at zero would be widened by one that does not, one that ends at a clamp by one that goes
        # on, and the kernel before a clamp would no longer clamp by it; a share's fixed range would even cut the other
        # off. The concatenation's kernel takes a scale for each input.
        end = max(_end(source) for source in sources)
        alike = [source for source in sources if not _starts_at_zero(source)]
        alike = alike or [source for source in sources if _end(source) == end]
        shared = SharedQuantizationSpec((alike[0], node))
        inputs: dict[Node, Any] = {source: self._spec_of(source) for source in sources}
        inputs.update({source: shared for source in alike if source is not alike[0]})
        node.meta[_ANNOTATION] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=shared, _annotated=True)
        self._quantized[node] = self._spec_of(alike[0])

    def _annotate_splitter(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node) or not self._is_integer(source):
            return
        node.meta[_ANNOTATION] = QuantizationAnnotation(
            input_qspec_map={source: self._spec_of(source)}, output_qspec=None, _annotated=True
        )
        for piece in node.users:
            shared = SharedQuantizationSpec((source, node))
            piece.meta[_ANNOTATION] = QuantizationAnnotation(input_qspec_map={}, output_qspec=shared, _annotated=True)
            self._quantized[piece] = self._spec_of(source)

    def _mark(self, node: Node, inputs: dict[Node, Any], output: Node | None) -> None:
        """Annotate `node`; its integers come out of `output`, the clamp it absorbs or itself."""
        node.meta[_ANNOTATION] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=self._output_spec(node) if output is node else None, _annotated=True
        )
        if output is not None and output is not node:
            output.meta[_ANNOTATION] = QuantizationAnnotation(output_qspec=self._output_spec(output), _annotated=True)
        if output is not None:
            self._quantized[output] = self._output_spec(output)

    def _output_of(self, node: Node) -> Node | None:
        """The node whose output is quantized: a clamp that follows alone, else the node itself.

        None for a linear layer whose result leaves the graph or goes to float operators only: its kernel gives floats
        at no cost (QGemm without an output scale), which saves them a rounding.
        """
        users = list(node.users)
        if len(users) == 1 and users[0].target in _CLAMPS and _clamps_from_zero(users[0]):
            return users[0]
        if len(users) == 1 and users[0].target in _HARD_SIGMOIDS and node.target in _CONVOLUTIONS:
            return users[0]
        if node.target is aten.linear.default and self._is_read_in_float(node):
            return None
        return node

    def _is_read_in_float(self, node: Node) -> bool:
        """Whether no reader of `node` will run on integers."""
        for user in node.users:
            if user.target in _INTEGER_READERS:
                return False
            if user.target in _MOVERS and (user.target is aten.cat.default or not self._is_read_in_float(user)):
                return False
            if user.target in _ELEMENTWISE:
                others = [source for source in _nodes(user.args[:2]) if source is not node]
                if any(self._is_integer(other) or other not in self._seen for other in others):
                    return False
        return True

    def _output_spec(self, node: Node) -> Any:
        return self._share if node.target in _HARD_SIGMOIDS else self._activation

    def _spec_of(self, source: Node) -> Any:
        """How a tensor is quantized where it is read: as where it was made, so that it is quantized once."""
        return self._quantized.get(source, self._activation)

    def _is_integer(self, node: Node) -> bool:
        return node in self._quantized

    def _bias_spec(self, source: Node, weight: Node, node: Node) -> DerivedQuantizationSpec:
        """Bias as int32 with scale s_x * s_w, the accumulator's own scale, so that adding it is exact."""

        def derive(observers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
            activation_scale, _ = observers[0].calculate_qparams()
            weight_scale, _ = observers[1].calculate_qparams()
            scale = (activation_scale * weight_scale).to(torch.float32)
            return scale, torch.zeros_like(scale, dtype=torch.int32)

        return DerivedQuantizationSpec(
            derived_from=[(source, node), (weight, node)],
            derive_qparams_fn=derive,
            dtype=torch.int32,
            quant_min=-(2**31),
            quant_max=2**31 - 1,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )


def is_share(scale: float, zero_point: int, low: int, high: int) -> bool:
    """Whether a grid is the fixed one of shares: zero to one over all integers, as a hard-sigmoid needs it."""
    return abs(scale * (high - low) - 1.0) < 1e-6 and zero_point == low


def limits_of(node: Any) -> tuple[float, float]:
    """Between which values an operator's results lie: 0 and 6 for ReLU6. Infinite for what is no clamp or sigmoid."""
    target = node.target if isinstance(node, Node) else None
    if target in (aten.relu.default, aten.relu_.default):
        return 0.0, math.inf
    if target is aten.relu6.default:
        return 0.0, 6.0
    if target in _SHARES:
        return 0.0, 1.0
    if target in _BOUNDED:
        is_tanh = target in (aten.hardtanh.default, aten.hardtanh_.default)  # whose schema has defaults
        least, most = (-1.0, 1.0) if is_tanh else (-math.inf, math.inf)
        return _limit(node, 1, least), _limit(node, 2, most)
    if target in _HALF_BOUNDED:
        return _limit(node, 1, -math.inf), math.inf
    if target in _CUT_ABOVE:
        return -math.inf, _limit(node, 1, math.inf)
    return -math.inf, math.inf


def _limit(node: Node, position: int, otherwise: float) -> float:
    value: Any = node.args[position] if len(node.args) > position else None
    return otherwise if value is None else float(value)


def module_name(node: Node) -> str:
    """Name of the module that a captured node came from, as `named_modules` gives it."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return str(node.name)
    path = str(list(stack.values())[-1][0])
    return path.removeprefix("L['self'].").removeprefix("L['self']") or str(node.name)


def _nodes(arguments: Iterable[Any]) -> list[Node]:
    """The arguments that are nodes; a number among them (x + 1) is none."""
    return [argument for argument in arguments if isinstance(argument, Node)]


def _has_constant_weight(node: Node) -> bool:
    weight = node.args[1] if len(node.args) > 1 else None
    return isinstance(weight, Node) and weight.op == "get_attr" and isinstance(node.args[0], Node)


def _starts_at_zero(node: Node) -> bool:
    """Whether a tensor holds nothing below zero by the operator that made it."""
    if node.target in (operator.getitem, *_SPLITTERS, *_MOVERS, *_POOLING):
        first = node.args[0]
        return all(_starts_at_zero(source) for source in _nodes(first if isinstance(first, (list, tuple)) else [first]))
    is_clamp = node.target in _CLAMPS and _clamps_from_zero(node)
    return is_clamp or node.target in _SHARES


def _end(node: Node) -> float:
    """What no value of a tensor exceeds by the operator that made it: 6 for ReLU6, infinite for most."""
    if node.target in (operator.getitem, *_SPLITTERS, *_MOVERS, *_POOLING):
        first = node.args[0]
        return max(_end(source) for source in _nodes(first if isinstance(first, (list, tuple)) else [first]))
    return limits_of(node)[1]


def _clamps_from_zero(node: Node) -> bool:
    """ReLU always; others only as a clamp that starts at zero (ReLU6), where the quantized range starts."""
    if node.target in _BOUNDED | _HALF_BOUNDED:
        return len(node.args) > 1 and isinstance(node.args[1], (int, float)) and node.args[1] == 0
    return True


def _is_global_mean(node: Node) -> bool:
    """Mean over height and width of a four-dimensional tensor, which is a global average pool."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    dims = node.args[1] if len(node.args) > 1 else None
    if value is None or value.dim() != 4 or not isinstance(dims, (list, tuple)):
        return False
    return sorted(int(dim) % 4 for dim in dims) == [2, 3]


def _pads_with_zero(node: Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return len(node.args) < 3 or bool(node.args[2] == 0)
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else None
    return bool(mode == "constant" and (value is None or value == 0))
