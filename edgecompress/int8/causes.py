"""Causes of loss by int8, and those of a model as a whole: what integer kernels lack, and where they saturate.

What enters: a calibrated int8 model. What leaves: causes with numbers and the settings that mend them. An operator
without an integer kernel costs speed, not accuracy; 16-bit sums lose accuracy on some CPUs only, so neither is
seen in the sensitivity of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import MinMaxObserver

from edgecompress.int8.mixed import MixedModel, constant_of, module_name
from edgecompress.int8.quantizer import OnnxRuntimeQuantizer
from edgecompress.settings.recipe import QuantizeStage

Json = dict[str, Any]

OUTLIER = "range outlier"
SATURATION = "saturation"
NARROW_CHANNEL = "narrow channel"
NARROW_WEIGHTS = "narrow weight channel"
WEIGHTS = "weight rounding"
SIXTEEN_BIT = "16-bit sums"
UNFUSED = "unfused activation"
ISLAND = "float island"

_LARGEST_WORD = 2**15 - 1
_ANNOTATION = "quantization_annotation"
_ACTIVATIONS = ("gelu", "elu", "selu", "celu", "tanh", "mish", "softplus", "prelu", "hardswish", "silu", "softmax")
_NAMED = 3


@dataclass(frozen=True)
class Cause:
    """One reason, in words and numbers, and what mends it.

    `setting` is what to write into the recipe; `full_sqnr_db` what all of int8 then has, simulated on the same images,
    or for a setting that only training or another rounding shows, None.
    """

    kind: str
    words: str
    setting: str
    full_sqnr_db: float | None
    numbers: Json = field(default_factory=dict)


def sixteen_bit_sums(mixed: MixedModel) -> list[Cause]:
    """8-bit weights whose products can leave 16 bits, for a target that adds them there (x86 without VNNI)."""
    if mixed.model.scheme.weight_bits != 8:
        return []
    shares: Json = {}
    for layer in mixed.layers:
        # A depthwise kernel multiplies in 32 bits.
        found = [saturating_pairs(i) for i in layer_integers(mixed, layer) if i.shape[1] > 1]
        if found and max(found) > 0.0:
            shares[layer] = max(found)
    if not shares:
        return []
    worst = max(shares, key=lambda layer: float(shares[layer]))
    words = (
        f"in {len(shares)} of {len(mixed.layers)} layers two neighbouring 8-bit weights can drive a 16-bit sum beyond "
        f"{_LARGEST_WORD} (in {percent(shares[worst])} of the output channels of {worst}), where a CPU without VNNI "
        "saturates in silence; no number here shows that loss"
    )
    return [Cause(SIXTEEN_BIT, words, "scheme.weight_bits: 7", None, {"channel_shares": shares})]


def layer_integers(mixed: MixedModel, layer: str) -> list[Tensor]:
    """A layer's int8 weights [out, ...]; more than one where it runs more than once."""
    graph = mixed.model.graph
    nodes = {node.name: node for node in graph.graph.nodes}
    return [constant_of(graph, nodes[name].all_input_nodes[1]) for name in mixed.nodes_of(layer)]


def saturating_pairs(integers: Tensor) -> float:
    """Share of output channels in which two neighbouring products can leave 16 bits.

    `integers` is [out, in, kh, kw] or [out, in]; kernels read channels last, and add the products of two neighbours
    with an activation of up to 255 in saturating 16-bit words (VPMADDUBSW).
    """
    rows = (integers.permute(0, 2, 3, 1) if integers.dim() == 4 else integers).flatten(1).long()
    rows = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))
    pairs = rows.view(len(rows), -1, 2)
    largest = torch.maximum(pairs.clamp(min=0).sum(2), -pairs.clamp(max=0).sum(2)).amax(1)
    return float((largest * 255 > _LARGEST_WORD).double().mean())


def float_operators(mixed: MixedModel, stage: QuantizeStage) -> list[Cause]:
    """Operators between int8 layers that have no integer kernel, one cause for each kind, with the layers before."""
    annotated = copy.deepcopy(mixed.reference)
    for node in annotated.graph.nodes:
        node.meta.pop(_ANNOTATION, None)
    OnnxRuntimeQuantizer(mixed.model.scheme, MinMaxObserver, mixed.model.exclude).annotate(annotated)
    outputs = mixed.setting(()).outputs
    places: dict[str, list[str]] = {}
    for node in annotated.graph.nodes:
        reads_integers = any(source.name in outputs for source in node.all_input_nodes)
        if node.op != "call_function" or _ANNOTATION in node.meta or not reads_integers:
            continue
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].rstrip("_")
        if module_name(node) in mixed.model.float_layers or name == "getitem":
            continue
        places.setdefault(name, []).append(module_name(next(s for s in node.all_input_nodes if s.name in outputs)))
    return [_island(name, layers, stage) for name, layers in places.items()]


def _island(name: str, layers: list[str], stage: QuantizeStage) -> Cause:
    is_activation = name in _ACTIVATIONS
    setting = "placement: auto (leaves more in float where that is faster)" if stage.placement == "full" else ""
    if is_activation:
        other = "another activation in the model (relu, relu6, hard-swish or silu), trained again"
        setting = f"{setting}, or {other}" if setting else other
    runs = f"{name} runs {len(layers)} times" if len(layers) > 1 else f"{name} runs"
    words = f"{runs} behind {_listed(layers)} and has no integer kernel: a pass in float between two conversions"
    return Cause(
        UNFUSED if is_activation else ISLAND,
        words,
        setting or "nothing to set: placement: auto has decided with it",
        None,
        {"operator": name, "count": len(layers), "behind": layers},
    )


def percent(share: float) -> str:
    """A share in words."""
    return f"{share:.2%}".replace("%", " %")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
