"""In which numbers and in which memory layout training is fastest on the device at hand.

What enters: the recipe's `precision` and the module. What leaves: a mixed precision, a layout, and the Accelerator that
works in them.
"""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from edgecompress.machine import isa_features
from edgecompress.training import workers

MixedPrecision = Literal["no", "bf16", "fp16"]
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def resolve_precision(precision: str, module: nn.Module) -> MixedPrecision:
    """`auto` is bf16 where the hardware computes in it, fp16 on older GPUs, and plain fp32 elsewhere.

    On CPUs a net with depthwise convolutions stays in fp32: those gain nothing from bf16, and the conversions around
    them cost. benchmarks/training_throughput.py compares any net with a plain fp32 loop.
    """
    if precision != "auto":
        names: dict[str, MixedPrecision] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
        return names[precision]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if _BF16_FEATURES & set(isa_features() or ()) and not _has_depthwise(module) else "no"


def fastest_layout(module: nn.Module, mixed_precision: MixedPrecision) -> torch.memory_format:
    """channels_last where it makes training faster: under mixed precision (twofold), and for depthwise convolutions.

    In fp32 a network without depthwise convolutions gains nothing from it on CPUs, and torch 2.14's backward pass of a
    strided 1x1 convolution with 2 to 7 input channels corrupts memory in it (seen with AVX2); MobileNetV3-small trains
    2.8 times as fast.
    """
    if mixed_precision != "no":
        return torch.channels_last
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    is_unsafe = any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 8 for c in convolutions)
    return torch.channels_last if _has_depthwise(module) and not is_unsafe else torch.contiguous_format


def _has_depthwise(module: nn.Module) -> bool:
    layers = module.modules()
    return any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in layers)


def make_accelerator(mixed_precision: MixedPrecision) -> Accelerator:
    """An Accelerator for this precision. Its state is shared by the process, so a change of precision resets it."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    workers.connect()
    return Accelerator(mixed_precision=mixed_precision)
