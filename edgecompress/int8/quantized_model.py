"""An int8 model: its graph, the simulations of it, and its two files.

What enters: a converted graph that holds int8 weights and every scale. What leaves: the same as model.safetensors and
model.json, rebuilt from the float architecture below it, so that no pickled graph is ever stored.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from edgecompress.errors import RunError
from edgecompress.int8.calibration import CalibrationFacts
from edgecompress.int8.capture import capture, prepare
from edgecompress.int8.integer_simulation import simulate_integers
from edgecompress.int8.operators import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from edgecompress.int8.quantizer import OnnxRuntimeQuantizer
from edgecompress.int8.scheme import Scheme
from edgecompress.models.finiteness import non_finite_tensor
from edgecompress.models.graph_caches import forget_graphs
from edgecompress.run_directory import atomic_path, write_text

_SCALES = "activation_scales"
_ZERO_POINTS = "activation_zero_points"


@dataclass(frozen=True)
class QuantizedModel:
    """An int8 model: the exportable graph, its scheme, and what was quantized.

    `reference` is the float graph that was quantized, batch norm folded, under the same node names; None for a model
    that was read from its files, as is `calibration`, which says whether the ranges had settled. `only_zeros` names
    layers whose output was zero on every calibration image, so that no scale could be found for it.
    """

    graph: GraphModule
    scheme: Scheme
    quantized_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    exclude: tuple[str, ...]
    correction: str = ""
    reference: GraphModule | None = None
    calibration: CalibrationFacts | None = None
    only_zeros: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros among the weights of all layers; more than in float, as small ones round to zero."""
        weights = [tensor for tensor in _constants(self.graph).values() if tensor.dim() > 1]
        total = sum(weight.numel() for weight in weights)
        return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0

    def simulation(self) -> GraphModule:
        """What the runtime's integer kernels give for this graph, number for number."""
        return simulate_integers(self.graph)


def _activation_nodes(graph: GraphModule) -> list[Node]:
    """Every per-tensor quantize and dequantize node, in graph order."""
    return [node for node in graph.graph.nodes if node.target in (QUANTIZE, DEQUANTIZE)]


def _constants(graph: GraphModule) -> dict[str, Tensor]:
    """The tensors that the graph reads, by name; the float weights it no longer needs are not among them."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    known = dict(graph.named_parameters()) | dict(graph.named_buffers())
    return {name: known[name] for name in sorted(names & known.keys())}


def _restore_constants(graph: GraphModule, tensors: dict[str, Tensor]) -> None:
    """Copy stored tensors over the graph's own. Raises KeyError or RuntimeError where they do not fit."""
    constants = _constants(graph)
    if constants.keys() != tensors.keys():
        raise KeyError(f"tensors {sorted(constants.keys() ^ tensors.keys())[:3]}")
    with torch.no_grad():
        for name, constant in constants.items():
            if constant.shape != tensors[name].shape or constant.dtype != tensors[name].dtype:
                raise RuntimeError(f"{name}: {tuple(tensors[name].shape)} for {tuple(constant.shape)}")
            constant.copy_(tensors[name])


def save_quantized(model: QuantizedModel, folder: Path, *, float_model: dict[str, Any]) -> None:
    """Write model.safetensors (int8 weights, scales) and model.json (how to rebuild the float graph below them).

    `float_model` is the model.json of the float stage that was quantized.
    """
    nodes = _activation_nodes(model.graph)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in _constants(model.graph).items()}
    arguments: list[Any] = [node.args for node in nodes]
    tensors[_SCALES] = torch.tensor([float(a[1]) for a in arguments], dtype=torch.float64)
    tensors[_ZERO_POINTS] = torch.tensor([int(a[2]) for a in arguments], dtype=torch.int64)
    description = {
        **float_model,
        "quantized": {
            "scheme": model.scheme.to_dict(),
            "exclude": list(model.exclude),
            "quantized_layers": list(model.quantized_layers),
            "float_layers": list(model.float_layers),
        },
    }
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_text(folder / "model.json", json.dumps(description, indent=2) + "\n")


def load_quantized(folder: Path, module: nn.Module, description: dict[str, Any], example: Tensor) -> QuantizedModel:
    """Rebuild an int8 model: capture `module` (its weights do not matter), then put the stored numbers in place.

    Raises RunError when the files do not fit each other.
    """
    try:
        facts = description["quantized"]
        scheme = Scheme(facts["scheme"]["activations"], int(facts["scheme"]["weight_bits"]))
        quantizer = OnnxRuntimeQuantizer(scheme, MinMaxObserver, facts["exclude"])
        prepared = prepare(capture(module, example), quantizer)
        with torch.no_grad():
            prepared(example)
        graph = convert_pt2e(prepared)
        forget_graphs()
        tensors = load_file(folder / "model.safetensors")
        scales, zero_points = tensors.pop(_SCALES).tolist(), tensors.pop(_ZERO_POINTS).tolist()
        nodes = _activation_nodes(graph)
        if len(nodes) != len(scales):
            raise RunError(f"{folder}: {len(scales)} scales for a graph with {len(nodes)}; made by other versions?")
        low, high = scheme.activation_range
        if not all(math.isfinite(scale) and scale > 0 for scale in scales) or not all(
            low <= zero_point <= high for zero_point in zero_points
        ):
            raise RunError(f"{folder}: holds scales or zero points that mean nothing; run the quantize stage again")
        for node, scale, zero_point in zip(nodes, scales, zero_points, strict=True):
            node.args = (node.args[0], float(scale), int(zero_point), *node.args[3:])
        wrong = non_finite_tensor(tensors)
        if wrong is not None:
            raise RunError(f"{folder}: '{wrong}' holds NaN or infinity; run the quantize stage again")
        _restore_constants(graph, tensors)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder}: the int8 model cannot be rebuilt: {error}; run the quantize stage again") from error
    graph.recompile()
    return QuantizedModel(
        graph, scheme, tuple(facts["quantized_layers"]), tuple(facts["float_layers"]), tuple(facts["exclude"])
    )


def simulate(converted: GraphModule) -> GraphModule:
    """A float simulation: one fake-quantize kernel per quantize-dequantize pair, int8 constants read back once.

    Node names stay those of `converted`, which rounding relies on. It rounds where the kernels do not; see
    `simulate_integers` for what they compute.
    """
    twin = copy.deepcopy(converted)
    constants = _constants(twin)
    for node in list(twin.graph.nodes):
        if node.target not in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
            continue
        source = node.args[0]
        if source.op == "get_attr":
            _fold_constant(twin, node, constants)
        elif source.target is QUANTIZE:
            value, scale, zero_point, low, high = source.args[:5]
            with twin.graph.inserting_before(node):
                fused = twin.graph.call_function(
                    torch.fake_quantize_per_tensor_affine, (value, scale, zero_point, low, high)
                )
            node.replace_all_uses_with(fused)
            twin.graph.erase_node(node)
    twin.graph.eliminate_dead_code()
    twin.recompile()
    return twin


def _fold_constant(twin: GraphModule, node: Node, constants: dict[str, Tensor]) -> None:
    arguments: list[Any] = [
        constants[str(a.target)] if isinstance(a, Node) and a.op == "get_attr" else a for a in node.args
    ]
    if any(isinstance(argument, Node) for argument in arguments):
        return
    name = f"_read_back_{node.name}"
    twin.register_buffer(name, node.target(*arguments, **node.kwargs))  # type: ignore[operator]
    with twin.graph.inserting_before(node):
        replacement = twin.graph.get_attr(name)
    node.replace_all_uses_with(replacement)
    twin.graph.erase_node(node)
