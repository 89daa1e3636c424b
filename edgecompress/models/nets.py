"""The package's own small nets, for images from 8 x 8 to about 64 x 64.

What enters: class count, channels, width and input size. What leaves: an initialised nn.Module that maps float32
[N, C, S, S] to logits [N, classes]. They hold plain modules only (no functional calls, nothing in place), so that
pruning sees every dependency and every layer has an integer kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# A feature map is never halved below this side; an 8 x 8 digit would otherwise end as one pixel.
_MIN_SIDE = 2


class _Strides:
    """Hands out stride 2 while the feature map stays large enough, then 1."""

    def __init__(self, input_size: int) -> None:
        self.side = input_size

    def next(self, wanted: int) -> int:
        if wanted == 1 or self.side // 2 < _MIN_SIDE:
            return 1
        self.side //= 2  # convolutions round up, pooling rounds down: the smaller of both
        return 2


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def _initialize(module: nn.Module) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers", eq. 10 and 14: variance 2 / fan, here of the forward pass."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))
        return y


class SmallResNet(nn.Module):
    """ResNet-(6n+2) for small images (He et al. 2015, "Deep Residual Learning", section 4.2).

    `blocks` is n. Shortcuts that change shape are 1 x 1 convolutions (the paper's option B): option A pads with
    zeros, which leaves pruning no layer to remove channels from.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int, input_size: int, *, blocks: int) -> None:
        super().__init__()
        strides = _Strides(input_size)
        self.conv = _conv(in_channels, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stride = strides.next(2) if stage > 0 and block == 0 else 1
                layers.append(_BasicBlock(channels, outputs, stride))
                channels = outputs
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes]."""
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


class _InvertedResidual(nn.Module):
    """Sandler et al. 2018, "MobileNetV2", figure 3: expand, filter each channel, project without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [_conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [_conv(hidden, hidden, 3, stride=stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [_conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class MobileNetSmall(nn.Module):
    """MobileNetV2's blocks scaled to small images: no squeeze-excite or hard-swish, which have no integer kernel."""

    def __init__(self, num_classes: int, in_channels: int, width: int, input_size: int) -> None:
        super().__init__()
        strides = _Strides(input_size)
        layers: list[nn.Module] = [_conv(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU6()]
        channels = width
        for outputs, repeats, first_stride, expansion in (
            (width, 1, 1, 1),
            (width + width // 2, 2, 2, 4),
            (2 * width, 2, 2, 4),
            (4 * width, 2, 2, 4),
        ):
            for repeat in range(repeats):
                stride = strides.next(first_stride) if repeat == 0 else 1
                layers.append(_InvertedResidual(channels, outputs, stride, expansion))
                channels = outputs
        layers += [_conv(channels, 8 * width, 1), nn.BatchNorm2d(8 * width), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(8 * width, num_classes)
        _initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes]."""
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(self.features(x))))
        return logits


class StudentCNN(nn.Module):
    """Three plain convolutions: a student for distillation, and the smallest net here."""

    def __init__(self, num_classes: int, in_channels: int, width: int, input_size: int) -> None:
        super().__init__()
        strides = _Strides(input_size)
        layers: list[nn.Module] = []
        channels = in_channels
        for outputs in (width, 2 * width, 4 * width):
            layers += [_conv(channels, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]
            if strides.next(2) == 2:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes]."""
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(self.features(x))))
        return logits


def resnet8(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> SmallResNet:
    """ResNet-8: one block a stage."""
    return SmallResNet(num_classes, in_channels, width, input_size, blocks=1)


def resnet20(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> SmallResNet:
    """ResNet-20: three blocks a stage."""
    return SmallResNet(num_classes, in_channels, width, input_size, blocks=3)


def resnet32(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> SmallResNet:
    """ResNet-32: five blocks a stage."""
    return SmallResNet(num_classes, in_channels, width, input_size, blocks=5)


def resnet44(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> SmallResNet:
    """ResNet-44: seven blocks a stage."""
    return SmallResNet(num_classes, in_channels, width, input_size, blocks=7)


def resnet56(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> SmallResNet:
    """ResNet-56: nine blocks a stage."""
    return SmallResNet(num_classes, in_channels, width, input_size, blocks=9)


def mobilenet_small(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> MobileNetSmall:
    """Depthwise-separable net with inverted residuals and ReLU6."""
    return MobileNetSmall(num_classes, in_channels, width, input_size)


def student_cnn(num_classes: int, in_channels: int, width: int = 16, input_size: int = 32) -> StudentCNN:
    """Tiny plain convolutional net."""
    return StudentCNN(num_classes, in_channels, width, input_size)


SMALL_NETS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "mobilenet_small": mobilenet_small,
    "student_cnn": student_cnn,
}
