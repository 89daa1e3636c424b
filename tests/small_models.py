"""Small nets and data that several tests share: a residual, a depthwise and a flatten-to-linear path."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData, PreparedSplit, open_data
from edgecompress.models.model_building import Architecture
from edgecompress.settings.recipe import DataSettings


class TinyNet(nn.Module):
    """Stem, residual block, depthwise block, then flatten to two linear layers: [N, 1, 8, 8] to [N, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.point = nn.Conv2d(width, 2 * width, 1)
        self.act = nn.ReLU()
        self.hidden = nn.Linear(2 * width * 16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = self.stem(images)
        first = self.act(first + self.inner(first))
        second = self.act(self.point(self.depthwise(first)))
        logits: Tensor = self.head(self.act(self.hidden(second.flatten(1))))
        return logits


def tiny_net(width: int = 16, seed: int = 0) -> TinyNet:
    """A TinyNet whose batch-norm statistics are not the trivial ones, in eval mode."""
    torch.manual_seed(seed)
    net = TinyNet(width)
    for child in net.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, std=0.2)
            assert child.running_mean is not None
            assert child.running_var is not None
            nn.init.normal_(child.running_mean, std=0.2)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
    return net.eval()


def images(count: int, *, size: int = 8, seed: int = 1) -> Tensor:
    """Normalized grey images, [count, 1, size, size]."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 1, size, size)).astype(np.float32))


def digits_data() -> ImageData:
    return open_data(DataSettings(name="digits"))


def digits_splits() -> dict[str, PreparedSplit]:
    """The digits as the small nets read them."""
    preprocessing = small_architecture().preprocessing
    return {name: split.prepare(preprocessing, cache=True) for name, split in digits_data().splits.items()}


def small_architecture(name: str = "resnet8", width: int = 8, size: int = 8) -> Architecture:
    """One of the package's own nets, for grey images of `size` pixels and ten classes."""
    preprocessing = Preprocessing(size, 1, (0.5,), (0.5,), "bilinear", 1.0)
    return Architecture(name=name, arguments={"width": width}, num_classes=10, preprocessing=preprocessing)
