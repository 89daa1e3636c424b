"""Tiny nets that hold one pattern each, and their way through quantization and export, for the int8 tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.exporting.onnx_export import Provenance, export_onnx, open_session
from edgecompress.int8.post_training import quantize
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.scheme import Scheme
from edgecompress.measure.integer_graph import IntegerGraph, inspect_integer_graph
from edgecompress.settings.recipe import QuantizeStage
from edgecompress.settings.target import Target, load_target

SIZE = 8
CLASSES = 5
UINT8_7 = Scheme("uint8", 7)
PREPROCESSING = Preprocessing(SIZE, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
PROVENANCE = Provenance(("ant", "bee", "cat", "dög", "emu"), "recipe-name", "0123abcd" * 8, {"torch": "1.2.3"})


def images(count: int = 32, *, seed: int = 0, channels: int = 3) -> Tensor:
    """Smooth random images, so that neighbouring pixels are as alike as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, SIZE // 2, SIZE // 2, generator=generator)
    fine = torch.randn(count, channels, SIZE, SIZE, generator=generator)
    return functional.interpolate(coarse, size=SIZE, mode="bilinear") + 0.2 * fine


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and batch norms that would be noticed when they were left out or folded twice."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu", generator=generator)
            if child.bias is not None:
                nn.init.normal_(child.bias, std=0.2, generator=generator)
        elif isinstance(child, nn.BatchNorm2d):
            for tensor in (child.weight, child.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 2.0, generator=generator)
            for tensor in (child.bias, child.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.5, generator=generator)
    return module.eval()


class Residual(nn.Module):
    """Conv-bn-relu in place, depthwise without bias, relu6, an add with a functional relu, pools, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.depthwise, self.relu6 = conv(8, 8, groups=8, bias=False), nn.ReLU6(inplace=True)
        self.project = conv(8, 8, 1)
        self.maxpool, self.avgpool, self.pool = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.dropout, self.hidden, self.head = nn.Dropout(0.5), nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = functional.relu(x + self.project(self.relu6(self.depthwise(x))))  # x is read by a conv and by the add
        x = self.pool(self.avgpool(self.maxpool(x)))
        x = self.dropout(torch.flatten(x, 1))
        return self.head(functional.relu(self.hidden(x)))


class SqueezeExcite(nn.Module):
    """Channel weights from a mean that keeps its axes; a head behind a mean that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = conv(3, 8), nn.ReLU()
        self.squeeze, self.excite, self.head = conv(8, 4, 1), conv(4, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        weights = torch.sigmoid(self.excite(self.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head((x * weights).mean((2, 3)))


class Fire(nn.Module):
    """SqueezeNet: two branches joined, and a convolution whose pooled output leaves the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = conv(3, 8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.squeeze, self.left, self.right = conv(8, 4, 1), conv(4, 8, 1), conv(4, 8)
        self.dropout, self.classifier, self.mean = nn.Dropout(), conv(16, CLASSES, 1), nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(self.pool(self.relu(self.conv(x)))))
        x = torch.cat([self.relu(self.left(x)), self.relu(self.right(x))], 1)
        return torch.flatten(self.mean(self.classifier(self.dropout(x))), 1)


class Shuffle(nn.Module):
    """ShuffleNet: half of the channels pass by, then channels are mixed by reshape and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = conv(3, 8), nn.ReLU()
        self.pointwise, self.depthwise, self.head = conv(4, 4, 1), conv(4, 4, groups=4), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.relu(self.conv(x)).chunk(2, dim=1)
        x = torch.cat((kept, self.relu(self.depthwise(self.pointwise(changed)))), 1)
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Padded(nn.Module):
    """TensorFlow's padding: zeros at two sides only, before the first layer and between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pad = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, 2, groups=8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(functional.pad(x, (0, 1, 0, 1))))
        return self.head(self.relu(self.depthwise(self.pad(x))).mean((2, 3)))


class Shared(nn.Module):
    """One convolution and one relu module that run several times; each call has a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.relu = conv(3, 8), conv(8, 8), nn.ReLU()
        self.bn1, self.bn2, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = self.relu(self.bn1(self.shared(x)))
        x = self.relu(self.bn2(self.shared(x)))
        return self.head(x.mean((2, 3)))


class Sums(nn.Module):
    """A conv read by a relu and an add; a tensor added to itself; a number added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 8), conv(8, 8)
        self.relu, self.head = nn.ReLU(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(self.relu(y)) + y
        z = z + z
        return self.head(self.third(z + 1).mean((2, 3)))


class HardSwish(nn.Module):
    """An activation without an integer kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 8)
        self.activation, self.head = nn.Hardswish(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.second(self.activation(self.first(x)))).mean((2, 3)))


class Silu(nn.Module):
    """SiLU in place and not, and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 8)
        self.silu, self.head = nn.SiLU(inplace=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.silu(self.first(x))
        return self.head((x + functional.silu(self.second(x))).mean((2, 3)))


class HardExcite(nn.Module):
    """MobileNetV3: channel weights from a hard-sigmoid behind a convolution, and a hard-swish behind a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = conv(3, 8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite, self.gate = conv(8, 4, 1), conv(4, 8, 1), nn.Hardsigmoid(inplace=True)
        self.hidden, self.activation, self.head = nn.Linear(8, 16), nn.Hardswish(inplace=True), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = self.gate(self.excite(self.relu(self.squeeze(self.pool(x))))) * x
        return self.head(self.activation(self.hidden(self.pool(x).flatten(1))))


class Dense(nn.Module):
    """DenseNet: batch norm and relu before the convolution, behind a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = conv(3, 8), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        self.norm, self.grow = nn.BatchNorm2d(8), conv(8, 4)
        self.last, self.transition, self.head = nn.BatchNorm2d(12), conv(12, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = torch.cat([x, self.grow(self.relu(self.norm(x)))], 1)
        x = self.pool(self.transition(self.relu(self.last(x))))
        return self.head(x.mean((2, 3)))


class Upsampled(nn.Module):
    """A small branch that is stretched and added to a large one, as in feature pyramids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.relu = conv(3, 8), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        self.up, self.head = nn.Upsample(scale_factor=2, mode="nearest"), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        return self.head((x + self.up(self.relu(self.down(x)))).mean((2, 3)))


class Scaled(nn.Module):
    """ConvNeXt: a layer norm over channels, GELU between 1x1 convolutions, and a learned factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.norm = conv(3, 8), conv(8, 8, groups=8), nn.LayerNorm(8)
        self.widen, self.narrow, self.dropout = conv(8, 16, 1), conv(16, 8, 1), nn.Dropout(0.1)
        self.gamma, self.head = nn.Parameter(torch.linspace(0.1, 0.8, 8)), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.dropout(self.narrow(functional.gelu(self.widen(y))))
        x = y * self.gamma.reshape(1, -1, 1, 1) + x  # channels_last, as the layer norm left it
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Tokens(nn.Module):
    """A transformer's block: linear layers on [N, T, C], attention and GELU between them, a float residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.before, self.after = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.LayerNorm(8)
        self.places = nn.Parameter(torch.linspace(-1.0, 1.0, SIZE * SIZE * 2).reshape(1, -1, 8))
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.widen, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        count, length, channels = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(count, length, 3, 2, channels // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, length, channels)
        x = x + self.project(mixed)
        x = x + self.narrow(functional.gelu(self.widen(self.after(x))))
        return self.head(x.mean(1))


class Clamped(nn.Module):
    """Every clamp that starts at zero: behind a convolution, a depthwise one, a sum, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise, self.tanh = conv(3, 8), conv(8, 8, groups=8), nn.Hardtanh(0.0, 2.0)
        self.point, self.hidden, self.head = conv(8, 8, 1), nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.conv(x), 0, 3)
        y = self.point(self.tanh(self.depthwise(x))).clamp_min(0)
        x = torch.clamp(x + y, min=0.0, max=4.0).mean((2, 3))
        return self.head(functional.relu6(self.hidden(x)))


class Gated(nn.Module):
    """Hard-swish and SiLU behind depthwise convolutions, a sum and linear layers without and with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv(3, 8), conv(8, 8, groups=8), conv(8, 8, groups=8, bias=False)
        self.first, self.second, self.head = nn.Linear(8, 16, bias=False), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.one(functional.relu(self.stem(x))))
        x = functional.silu(x + functional.silu(self.two(x))).mean((2, 3))
        return self.head(functional.hardswish(self.second(functional.silu(self.first(x)))))


_NETS = (
    (Residual, SqueezeExcite, Fire, Shuffle, Padded, Shared, Sums),
    (HardSwish, Silu, HardExcite, Dense, Upsampled, Scaled, Tokens),
    (Clamped, Gated),
)
PATTERNS: dict[str, type[nn.Module]] = {net.__name__: net for nets in _NETS for net in nets}


def stage(**settings: Any) -> QuantizeStage:
    """A quantize stage; `method` and `percentile` go to its calibration. Plain and fast unless told otherwise."""
    calibration = {"method": settings.pop("method", "minmax"), "percentile": settings.pop("percentile", 99.999)}
    return QuantizeStage(
        kind="quantize", id="int8", calibration=calibration, effort=settings.pop("effort", "fast"), **settings
    )


def quantized(
    module: nn.Module, *, scheme: Scheme = UINT8_7, samples: Tensor | None = None, **settings: Any
) -> QuantizedModel:
    """Quantize on `samples`, in batches of 16."""
    calibration = images() if samples is None else samples

    def batches() -> Iterator[Tensor]:
        return iter(calibration.split(16))

    return quantize(
        module,
        stage=stage(**settings),
        scheme=scheme,
        calibration=batches,
        batches=-(-len(calibration) // 16),
        example=calibration[:2],
    )


def export(
    module: nn.Module, path: Path, *, target: Target | None = None, example: Tensor | None = None
) -> dict[str, int]:
    """Export with fixed facts; returns the rewrites that were made."""
    return export_onnx(
        module,
        images(2) if example is None else example,
        path,
        target=target or load_target("x86-avx2"),
        preprocessing=PREPROCESSING,
        provenance=PROVENANCE,
        extra_metadata={"precision": "test"},
    )


def run(path: Path, inputs: Tensor, *, target: Target | None = None) -> np.ndarray:
    """ONNX Runtime's output for a batch, by the graph that the target runs."""
    output: np.ndarray = open_session(path, target=target, threads=1).run(["logits"], {"input": inputs.numpy()})[0]
    return output


@dataclass(frozen=True)
class Exported:
    """A pattern net after the whole way."""

    module: nn.Module
    model: QuantizedModel
    path: Path
    rewrites: dict[str, int]
    graph: IntegerGraph


def exported(name: str, folder: Path) -> Exported:
    """Quantize, export and inspect one of PATTERNS."""
    module = seeded(PATTERNS[name]())
    model = quantized(module)
    path = folder / f"{name}.onnx"
    rewrites = export(model.graph, path)
    return Exported(module, model, path, rewrites, inspect_integer_graph(path))
