"""Static int8 post-training quantization in PyTorch.

What enters: a float module in eval mode and calibration images. What leaves: a `QuantizedModel` whose graph holds
the int8 weights and every scale, ready for export as QDQ ONNX. PyTorch and ONNX Runtime share one set
of scales, so what is measured here is what the device computes, up to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from edgecompress import console
from edgecompress.errors import QuantizationError
from edgecompress.int8.calibration import RangeObserver, RangeWatch, activation_observer
from edgecompress.int8.capture import capture, prepare
from edgecompress.int8.compensation import compensate
from edgecompress.int8.dead_channels import layer_behind
from edgecompress.int8.finetuning import finetune
from edgecompress.int8.quantized_model import QuantizedModel, simulate
from edgecompress.int8.quantizer import OnnxRuntimeQuantizer, module_name
from edgecompress.int8.scheme import Scheme
from edgecompress.int8.weight_ranges import leave_room_for_biases
from edgecompress.models.graph_caches import forget_graphs
from edgecompress.settings.recipe import QuantizeStage

_COMPENSATION_IMAGES = 96  # enough that a classifier's Hessian is not singular
_HELD_OUT_IMAGES = 32
_MIN_COMPENSATION_IMAGES = 16
_FINETUNING_IMAGES = 512
_ANSWERED_AT_ONCE = 8

# Input values of one calibration pass: eight images at 224 pixels. A fifth of a gigabyte less than with 32 on a
# ResNet-50, and activations that the allocator keeps for the next layer instead of fetching fresh pages.
_PART_VALUES = 8 * 3 * 224 * 224


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
    prepared = prepare(capture(module, example), quantizer)
    leave_room_for_biases(prepared)
    reference = _without_observers(prepared)
    if not quantizer.placement.quantized:
        raise QuantizationError("no layer of the model can be int8: it holds no Conv2d or Linear outside of exclude")
    watch = RangeWatch(prepared, batches)
    with torch.no_grad(), console.progress("calibrating", batches) as advance:
        for batch in calibration():
            for part in torch.split(batch, max(1, _PART_VALUES // batch[0].numel())):
                _observe(prepared, part)
            watch.advance()
            advance()
    _check_ranges(prepared)
    calibration_facts = watch.finish()
    only_zeros = _only_zeros(prepared)
    if only_zeros:
        named = f"{', '.join(only_zeros[:3])}{' and more' if len(only_zeros) > 3 else ''}"
        console.warn(
            f"calibration saw nothing but zeros in {len(only_zeros)} layers ({named}), so int8 keeps nothing of what "
            "they may give on other images; give calibration more images, or name them in exclude"
        )
    graph = convert_pt2e(prepared)
    forget_graphs()
    correction = "rounded to nearest"
    if stage.effort != "fast":
        graph, correction = _compensated(graph, reference, calibration)
    model = QuantizedModel(
        graph=graph,
        scheme=scheme,
        correction=correction,
        quantized_layers=tuple(layer.module_name for layer in quantizer.placement.quantized),
        float_layers=tuple(quantizer.placement.float_layers),
        exclude=stage.exclude,
        reference=reference,
        calibration=calibration_facts,
        only_zeros=only_zeros,
    )
    return _finetuned(model, reference, calibration) if stage.effort == "best" else model


def _observe(prepared: GraphModule, images: Tensor) -> None:
    """One pass. Raises QuantizationError when the output is not finite."""
    output = prepared(images)
    if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
        _check_ranges(prepared)  # it may know where it began
        raise QuantizationError("the model's output is NaN or infinite on calibration images; check its weights")


def _without_observers(prepared: GraphModule) -> GraphModule:
    """The float graph with batch norm folded, under the node names that the converted graph will have.

    It shares its weights with `prepared`: conversion reads them and makes integers of its own.
    """
    twin = copy.deepcopy(prepared, {id(weight): weight for weight in prepared.parameters()})
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
    seen, unseen = _seen_and_held_out(_first_images(calibration(), _COMPENSATION_IMAGES + _HELD_OUT_IMAGES))
    if len(seen) + len(unseen) < _MIN_COMPENSATION_IMAGES:
        return graph, f"rounded to nearest (error compensation needs {_MIN_COMPENSATION_IMAGES} calibration images)"
    held_out = len(unseen)
    better = copy.deepcopy(graph)
    simulation = simulate(better)
    compensate(better, simulation, reference, seen)
    wanted = _answers(reference, unseen)
    before, after = (_noise(wanted, _answers(tried, unseen)) for tried in (simulate(graph), simulation))
    gain = 10.0 * math.log10(before / after) if before > 0 and after > 0 else 0.0
    if gain <= 0.0:
        return graph, f"rounded to nearest (error compensation would cost {-gain:.1f} dB on {held_out} held-out images)"
    return better, f"error-compensated rounding (+{gain:.1f} dB on {held_out} held-out images)"


def _finetuned(
    model: QuantizedModel, reference: GraphModule, calibration: Callable[[], Iterator[Tensor]]
) -> QuantizedModel:
    """The model tuned towards float logits on the calibration images, where held-out ones say that it is better."""
    seen, unseen = _seen_and_held_out(_first_images(calibration(), _FINETUNING_IMAGES))
    if len(seen) + len(unseen) < _MIN_COMPENSATION_IMAGES:
        return model
    tuned = finetune(model, reference, seen, unseen)
    found = f"{tuned.gain_db:+.1f} dB, better on {tuned.better} of {len(unseen)} held-out images"
    if tuned.is_kept:
        done = f"tuned as a whole ({found})"
    else:
        done = f"not tuned as a whole: {'no more than chance' if tuned.gain_db > 0 else 'worse'} ({found})"
    return replace(tuned.model, correction=f"{model.correction}; {done}")


def _seen_and_held_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images that corrections are made with, and those that decide whether they are kept."""
    held_out = max(1, min(len(images) // 4, _HELD_OUT_IMAGES))
    return images[:-held_out], images[-held_out:]


def _first_images(batches: Iterator[Tensor], count: int) -> Tensor:
    collected: list[Tensor] = []
    for batch in batches:
        collected.append(batch)
        if sum(len(images) for images in collected) >= count:
            break
    return torch.cat(collected)[:count]


@torch.no_grad()
def _answers(graph: GraphModule, images: Tensor) -> Tensor:
    """Logits of many images, few at a time: a whole batch of large maps would be the peak of memory."""
    return torch.cat([graph(part) for part in torch.split(images, _ANSWERED_AT_ONCE)])


def _noise(wanted: Tensor, got: Tensor) -> float:
    return float(((wanted - got).double() ** 2).sum())


def _check_weights(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise QuantizationError(f"{name} holds NaN or infinity; train the model again, or give a sound checkpoint")


def _only_zeros(prepared: GraphModule) -> tuple[str, ...]:
    """Layers whose output was zero on every calibration image."""
    found: dict[str, None] = {}
    for node in prepared.graph.nodes:
        child = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, RangeObserver) and float(child.min_val) == 0.0 == float(child.max_val):
            found[layer_behind(node.args[0])] = None
    return tuple(found)


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
        if observed.op == "placeholder" and not saw_non_finite and not never_ran and bool((low == high).all()):
            raise QuantizationError(
                f"the calibration images are all of one value ({float(low.max()):g} once normalized); ranges found on "
                "them mean nothing, so look at the training images"
            )
        if never_ran and not saw_non_finite:
            raise QuantizationError(f"{place}: no range was found; it never ran on calibration images")
        if saw_non_finite or not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise QuantizationError(f"{place}: NaN or infinity on calibration images; check its weights and the data")
