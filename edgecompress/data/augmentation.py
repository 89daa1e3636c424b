"""Random changes to training images, made on whole batches so that two cores spend their time on the model.

What enters: a uint8 batch [N, C, H, W] and its labels. What leaves: a batch of the same shape, and labels [N], or
[N, K] as shares of the classes where images are mixed. Every draw comes from torch's generator, which the training loop
seeds for each step: a step can be repeated exactly, whatever happened before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from edgecompress.settings.training_settings import AugmentSettings

# Images that share one draw of RandAugment: its operators work on whole tensors, and one draw for a whole batch would
# be one operator a step.
_RANDAUGMENT_GROUP = 8
_ERASED_AREA = (0.02, 0.2)  # smallest and largest share of an erased image


def augment(images: Tensor, settings: AugmentSettings) -> Tensor:
    """Crop, shift (zero padding), flip, recolour and erase each image of a uint8 batch [N, C, H, W] on its own."""
    if settings.crop_min_area is not None:
        images = _cropped(images, settings.crop_min_area)
    if settings.shift_pixels:
        images = _shifted(images, settings.shift_pixels)
    if settings.horizontal_flip:
        flip = torch.rand(len(images)) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if settings.randaugment_magnitude is not None:
        change = v2.RandAugment(settings.randaugment_operations, settings.randaugment_magnitude)
        images = torch.cat([change(group) for group in torch.split(images, _RANDAUGMENT_GROUP)])
    if settings.erase_probability:
        images = _erased(images, settings.erase_probability)
    return images


def mix(
    images: Tensor, labels: Tensor, settings: AugmentSettings, num_classes: Callable[[], int]
) -> tuple[Tensor, Tensor]:
    """Mix pairs of normalized images, and their labels with them (mixup, Zhang et al., 2018; CutMix, Yun et al., 2019).

    Returns images as they were and labels [N] where the settings mix nothing, else labels [N, K]. With both, each
    batch draws one of them.
    """
    mixers = [(v2.MixUp, settings.mixup_alpha), (v2.CutMix, settings.cutmix_alpha)]
    wanted = [(mixer, alpha) for mixer, alpha in mixers if alpha]
    if not wanted:
        return images, labels
    mixer, alpha = wanted[int(torch.randint(len(wanted), ()))]
    mixed: tuple[Tensor, Tensor] = mixer(alpha=alpha, num_classes=num_classes())(images, labels)
    return mixed


def _shifted(images: Tensor, reach: int) -> Tensor:
    count, channels, height, width = images.shape
    padded = functional.pad(images, (reach, reach, reach, reach))
    top = torch.randint(0, 2 * reach + 1, (count,))
    left = torch.randint(0, 2 * reach + 1, (count,))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns]


def _cropped(images: Tensor, min_area: float) -> Tensor:
    """A square crop of between `min_area` and all of each image, stretched back to the full size (bilinear)."""
    count = len(images)
    side = torch.empty(count).uniform_(min_area, 1.0).sqrt()
    shift_x, shift_y = ((1 - side) * torch.empty(count).uniform_(-1, 1) for _ in range(2))
    zero = torch.zeros(count)
    places = torch.stack([torch.stack([side, zero, shift_x], 1), torch.stack([zero, side, shift_y], 1)], 1)
    grid = functional.affine_grid(places, list(images.shape), align_corners=False)
    sampled = functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return sampled.round().clamp(0, 255).to(torch.uint8)


def _erased(images: Tensor, probability: float) -> Tensor:
    """A square of some images becomes grey (Zhong et al., 2020, "Random Erasing Data Augmentation")."""
    count, _, height, width = images.shape
    side = torch.empty(count).uniform_(*_ERASED_AREA).sqrt()
    tall, wide = (side * height).round(), (side * width).round()
    top = (torch.rand(count) * (height - tall + 1)).floor()
    left = (torch.rand(count) * (width - wide + 1)).floor()
    rows, columns = torch.arange(height)[None, :], torch.arange(width)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    chosen = (torch.rand(count) < probability)[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]
    return torch.where(chosen[:, None], torch.full_like(images, 127), images)
