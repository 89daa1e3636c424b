"""EfficientNet-Lite0 of which only the head learns: a teacher from few images a class, with pretrained features.

For `model.name: frozen_lite0.py:build`. Batch norm keeps its statistics, too, so training is one forward pass an image.
"""

from __future__ import annotations

import timm
from timm.models.efficientnet import EfficientNet
from torch import nn


class FrozenEfficientNet(EfficientNet):
    """The network in eval mode for good."""

    def train(self, mode: bool = True) -> FrozenEfficientNet:
        """Stay in eval mode."""
        super().train(False)
        return self


def build(num_classes: int) -> nn.Module:
    """The network with a new head, the only part that takes gradients."""
    net = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
    net.__class__ = FrozenEfficientNet
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    return net.train()
