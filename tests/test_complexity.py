from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torch import nn

from edgecompress.models.complexity import compressed_size_bytes, count_macs, measure_complexity, weight_sparsity
from small_models import TinyNet, images


def test_macs_are_counted_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    # 16 positions x 8 filters x 27 weights, and 128 x 10.
    assert count_macs(net, torch.zeros(1, 3, 8, 8)) == 16 * 8 * 27 + 1280


def test_depthwise_counts_one_input_channel_a_filter() -> None:
    net = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    assert count_macs(net, torch.zeros(1, 16, 8, 8)) == 64 * 16 * 9


def test_complexity_does_not_depend_on_the_batch_and_keeps_the_mode() -> None:
    net = TinyNet(8).train()
    assert measure_complexity(net, images(1)) == measure_complexity(net, images(5))
    assert net.training
    assert measure_complexity(net, images(1)).params == sum(p.numel() for p in net.parameters())


def test_sparsity_ignores_biases_and_batch_norm() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for parameter in net.parameters():
        nn.init.zeros_(parameter) if parameter.dim() == 1 else nn.init.ones_(parameter)
    assert weight_sparsity(net) == 0.0
    with torch.no_grad():
        net[0].weight[:2] = 0
    assert weight_sparsity(net) == 2 / 12


def test_compressed_size_is_gzip(tmp_path: Path) -> None:
    path = tmp_path / "zeros.bin"
    path.write_bytes(bytes(100_000))
    assert compressed_size_bytes(path) == pytest.approx(len(gzip.compress(path.read_bytes(), compresslevel=6)), abs=20)
