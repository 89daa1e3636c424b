"""Static int8 post-training quantization in PyTorch.

What enters: a float module in eval mode and calibration images. What leaves: a `QuantizedModel` whose graph holds
the int8 weights and every scale, ready for export as QDQ ONNX. PyTorch and ONNX Runtime share one set
of scales, so what is measured here is what the device computes, up to rounding.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import MinMaxObserver, ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from edgecompress import console
from edgecompress.calibration import activation_observer
from edgecompress.errors import QuantizationError, RunError
from edgecompress.machine import has_vnni
from edgecompress.quantizer import OnnxRuntimeQuantizer, Scheme, module_name
from edgecompress.recipe import QuantizeStage
from edgecompress.rounding import compensate
from edgecompress.run_directory import atomic_path, write_text
from edgecompress.target import Target

# Images for error compensation: enough that a classifier's Hessian is not singular, few enough to hold every layer's
# input of all of them in memory (EfficientNet-Lite0: 0.5 GB).
_COMPENSATION_IMAGES = 96
_HELD_OUT_IMAGES = 32
_MIN_COMPENSATION_IMAGES = 16

_SCALES = "activation_scales"
_ZERO_POINTS = "activation_zero_points"
_quantized_ops = torch.ops.quantized_decomposed
_QUANTIZE = _quantized_ops.quantize_per_tensor.default
_DEQUANTIZE = _quantized_ops.dequantize_per_tensor.default
_DEQUANTIZE_CHANNELS = _quantized_ops.dequantize_per_channel.default


@dataclass(frozen=True)
class QuantizedModel:
    """An int8 model: the exportable graph, its scheme, and what was quantized."""

    graph: GraphModule
    scheme: Scheme
    quantized_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    exclude: tuple[str, ...]
    correction: str = ""

    def simulation(self) -> GraphModule:
        """The same numbers with fused fake-quantize kernels and weights read back once: several times faster."""
        return _simulation(self.graph)


def resolve_scheme(stage: QuantizeStage, target: Target | None) -> tuple[Scheme, str]:
    """Settle every `auto` of the scheme; returns the scheme and the reason for the weight range, in words."""
    activations = stage.scheme.activations or (target.int8.activations if target else "auto")
    bits = stage.scheme.weight_bits or (target.int8.weight_bits if target else "auto")
    is_arm = target is not None and target.architecture == "aarch64"
    if activations == "auto":
        activations = "int8" if is_arm else "uint8"
    if bits != "auto":
        source = "recipe" if stage.scheme.weight_bits else f"target {target.name}" if target else "default"
        return Scheme(activations, int(bits)), f"{bits}-bit weights, as the {source} says"
    if is_arm:
        return Scheme(activations, 8), "8-bit weights: Arm kernels do not saturate"
    if has_vnni():
        return Scheme(activations, 8), "8-bit weights: this CPU has VNNI, whose sums cannot saturate"
    return (
        Scheme(activations, 7),
        "7-bit weights: this CPU has no VNNI, and its 16-bit sums saturate with 8-bit weights",
    )


def capture(module: nn.Module, example: Tensor) -> GraphModule:
    """Capture a module with `torch.export`, batch dimension dynamic. Works on a deep copy.

    The copy matters: a captured graph shares its parameters with the module, and PT2E folds batch norm into
    them. `example` is a float batch [N, C, H, W] with N at least 2.
    """
    twin = copy.deepcopy(module).eval().to("cpu").float().to(memory_format=torch.contiguous_format)
    try:
        program = torch.export.export(twin, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        captured = program.module()
        _unshare_weights(captured)
    except Exception as error:  # torch.export raises many unrelated types for code it cannot trace
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise QuantizationError(
            f"the model cannot be captured by torch.export: {lines[0]}; "
            "its forward must not depend on tensor values, and must take one image batch of any size"
        ) from error
    assert isinstance(captured, GraphModule)
    return captured


def _unshare_weights(captured: GraphModule) -> None:
    """Give every use of a parameter its own copy.

    A layer that runs twice has inputs of two scales, so its int32 bias needs two; and a batch norm after each call
    would be folded into the same weights twice.
    """
    for node in [node for node in captured.graph.nodes if node.op == "get_attr"]:
        folder, _, leaf = str(node.target).rpartition(".")
        owner = captured.get_submodule(folder)
        value = getattr(owner, leaf)
        if not isinstance(value, nn.Parameter):
            continue
        for number, user in enumerate(list(node.users)[1:], start=2):
            owner.register_parameter(f"{leaf}_use{number}", nn.Parameter(value.detach().clone(), requires_grad=False))
            with captured.graph.inserting_before(user):
                own = captured.graph.get_attr(f"{node.target}_use{number}")
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
    captured.recompile()


def quantize(
    module: nn.Module,
    *,
    stage: QuantizeStage,
    scheme: Scheme,
    calibration: Callable[[], Iterator[Tensor]],
    batches: int,
    example: Tensor,
) -> QuantizedModel:
    """Calibrate and convert `module`; each call of `calibration` yields the same normalized batches [N, C, H, W].

    Raises QuantizationError when the model has no layer that can be int8 or its ranges are not finite.
    """
    _check_weights(module)
    observer = activation_observer(stage.calibration.method, stage.calibration.percentile)
    quantizer = OnnxRuntimeQuantizer(scheme, observer, stage.exclude)
    prepared = prepare_pt2e(capture(module, example), quantizer)
    reference = _without_observers(prepared)
    if not quantizer.placement.quantized:
        raise QuantizationError("no layer of the model can be int8: it holds no Conv2d or Linear outside of exclude")
    with torch.no_grad(), console.progress("calibrating", batches) as advance:
        for batch in calibration():
            output = prepared(batch)
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                _check_ranges(prepared)  # it may know where it began
                raise QuantizationError(
                    "the model's output is NaN or infinite on calibration images; check its weights"
                )
            advance()
    _check_ranges(prepared)
    graph = convert_pt2e(prepared)
    correction = "rounded to nearest"
    if stage.effort == "balanced":
        graph, correction = _compensated(graph, reference, calibration)
    return QuantizedModel(
        graph=graph,
        scheme=scheme,
        correction=correction,
        quantized_layers=tuple(layer.module_name for layer in quantizer.placement.quantized),
        float_layers=tuple(quantizer.placement.float_layers),
        exclude=stage.exclude,
    )


def _without_observers(prepared: GraphModule) -> GraphModule:
    """The float graph with batch norm folded, under the node names that the converted graph will have."""
    twin = copy.deepcopy(prepared)
    for node in list(twin.graph.nodes):
        if node.op == "call_module" and isinstance(twin.get_submodule(str(node.target)), ObserverBase):
            node.replace_all_uses_with(node.args[0])
            twin.graph.erase_node(node)
    twin.recompile()
    return twin


def _compensated(
    graph: GraphModule, reference: GraphModule, calibration: Callable[[], Iterator[Tensor]]
) -> tuple[GraphModule, str]:
    """Error-compensated rounding, kept only where it helps on calibration images that it has not seen.

    Returns the graph to use and, in words, what was done.
    """
    images = _first_images(calibration(), _COMPENSATION_IMAGES + _HELD_OUT_IMAGES)
    if len(images) < _MIN_COMPENSATION_IMAGES:
        return graph, f"rounded to nearest (error compensation needs {_MIN_COMPENSATION_IMAGES} calibration images)"
    held_out = max(len(images) // 4, len(images) - _COMPENSATION_IMAGES)
    seen, unseen = images[:-held_out], images[-held_out:]
    better = copy.deepcopy(graph)
    simulation = _simulation(better)
    compensate(better, simulation, reference, seen)
    with torch.no_grad():
        wanted = reference(unseen)
        before = _noise(wanted, _simulation(graph)(unseen))
        after = _noise(wanted, simulation(unseen))
    gain = 10.0 * math.log10(before / after) if before > 0 and after > 0 else 0.0
    if gain <= 0.0:
        return graph, f"rounded to nearest (error compensation would cost {-gain:.1f} dB on {held_out} held-out images)"
    return better, f"error-compensated rounding (+{gain:.1f} dB on {held_out} held-out images)"


def _first_images(batches: Iterator[Tensor], count: int) -> Tensor:
    collected: list[Tensor] = []
    for batch in batches:
        collected.append(batch)
        if sum(len(images) for images in collected) >= count:
            break
    return torch.cat(collected)[:count]


def _noise(wanted: Tensor, got: Tensor) -> float:
    return float(((wanted - got).double() ** 2).sum())


def _check_weights(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise QuantizationError(f"{name} holds NaN or infinity; train the model again, or give a sound checkpoint")


def _check_ranges(prepared: GraphModule) -> None:
    """Refuse ranges that are not finite, in the order in which the graph runs, so that the first culprit is named."""
    for node in prepared.graph.nodes:
        child = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        low, high = getattr(child, "min_val", None), getattr(child, "max_val", None)
        if not isinstance(low, Tensor) or not isinstance(high, Tensor):
            continue
        observed = node.args[0]
        place = str(observed.target) if observed.op == "get_attr" else module_name(observed)
        never_ran = low.numel() == 0 or bool((low > high).any())  # as an observer starts
        saw_non_finite = getattr(child, "saw_non_finite", False)
        if never_ran and not saw_non_finite:
            raise QuantizationError(f"{place}: no range was found; it never ran on calibration images")
        if saw_non_finite or not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise QuantizationError(f"{place}: NaN or infinity on calibration images; check its weights and the data")


def _activation_nodes(graph: GraphModule) -> list[Node]:
    """Every per-tensor quantize and dequantize node, in graph order."""
    return [node for node in graph.graph.nodes if node.target in (_QUANTIZE, _DEQUANTIZE)]


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
        prepared = prepare_pt2e(capture(module, example), quantizer)
        with torch.no_grad():
            prepared(example)
        graph = convert_pt2e(prepared)
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
        _restore_constants(graph, tensors)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder}: the int8 model cannot be rebuilt: {error}; run the quantize stage again") from error
    graph.recompile()
    return QuantizedModel(
        graph, scheme, tuple(facts["quantized_layers"]), tuple(facts["float_layers"]), tuple(facts["exclude"])
    )


def _simulation(converted: GraphModule) -> GraphModule:
    """Replace quantize-dequantize pairs by one fake-quantize kernel, and int8 constants by the floats they mean."""
    twin = copy.deepcopy(converted)
    constants = _constants(twin)
    for node in list(twin.graph.nodes):
        if node.target not in (_DEQUANTIZE, _DEQUANTIZE_CHANNELS):
            continue
        source = node.args[0]
        if source.op == "get_attr":
            _fold_constant(twin, node, constants)
        elif source.target is _QUANTIZE:
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
