"""The operators that torchao's PT2E writes for rounding: the vocabulary of a converted graph."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators, whichever module is imported first

_quantized = torch.ops.quantized_decomposed
QUANTIZE = _quantized.quantize_per_tensor.default
DEQUANTIZE = _quantized.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _quantized.dequantize_per_channel.default
