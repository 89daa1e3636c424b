"""The training images that a change to a network is scored and settled on, before it is finetuned.

What enters: the training split. What leaves: a few normalized batches of it, the same ones for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit

_BATCHES = 16  # enough for a mean to settle


def statistics_batches(
    train: PreparedSplit, preprocessing: Preprocessing, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Up to 16 batches of normalized images [N, C, H, W] and labels [N], a seeded choice."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(train), generator=generator)[: batch_size * _BATCHES]
    for images, labels in train.batches(batch_size, indices=indices):
        yield preprocessing.normalize(images), labels
