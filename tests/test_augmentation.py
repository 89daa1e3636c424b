from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecompress.data.augmentation import augment, mix
from edgecompress.settings.training_settings import AugmentSettings


def test_augmentation_off_changes_nothing() -> None:
    batch = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(batch, AugmentSettings()), batch)


def test_shift_moves_each_image_by_whole_pixels() -> None:
    batch = torch.zeros(64, 1, 9, 9, dtype=torch.uint8)
    batch[:, :, 4, 4] = 255
    torch.manual_seed(0)
    shifted = augment(batch, AugmentSettings(shift_pixels=2))
    places = np.argwhere(shifted.numpy()[:, 0] == 255)
    assert len(places) == 64
    assert set(np.abs(places[:, 1:] - 4).ravel()) == {0, 1, 2}
    assert len({tuple(place) for place in places[:, 1:]}) > 10


def test_flip_turns_about_half_of_the_images() -> None:
    batch = torch.arange(8, dtype=torch.uint8).expand(200, 1, 8, 8).contiguous()
    torch.manual_seed(0)
    flipped = augment(batch, AugmentSettings(horizontal_flip=True))
    turned = int((flipped[:, 0, 0, 0] == 7).sum())
    assert 70 < turned < 130
    assert torch.equal(flipped.sort(dim=-1).values, batch)


def test_crop_keeps_each_image_inside_itself() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 255, 16).round().to(torch.uint8).expand(64, 3, 16, 16).contiguous()
    cropped = augment(ramp, AugmentSettings(crop_min_area=0.25))
    assert cropped.dtype == torch.uint8
    rows = cropped[:, 0].float()
    assert torch.equal(rows[:, 0], rows[:, -1])  # a horizontal ramp stays one
    spans = rows[:, 0, -1] - rows[:, 0, 0]
    assert bool((spans > 0.4 * 255).all())  # a quarter of the area is half of the side
    assert float(spans.max() - spans.min()) > 20


def test_erasing_greys_one_square_of_some_images() -> None:
    torch.manual_seed(0)
    batch = torch.full((400, 1, 20, 20), 9, dtype=torch.uint8)
    erased = augment(batch, AugmentSettings(erase_probability=0.5))
    touched = (erased == 127).flatten(1).sum(1)
    assert 150 < int((touched > 0).sum()) < 250
    assert int(touched.max()) <= 0.25 * 400
    assert set(erased.unique().tolist()) == {9, 127}


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_changes_images_and_keeps_their_form(channels: int) -> None:
    torch.manual_seed(0)
    batch = torch.randint(0, 256, (20, channels, 16, 16), dtype=torch.uint8)
    changed = augment(batch, AugmentSettings(randaugment_magnitude=9))
    assert changed.shape == batch.shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, batch)


def test_a_step_can_be_drawn_again() -> None:
    settings = AugmentSettings(
        horizontal_flip=True, shift_pixels=2, crop_min_area=0.5, randaugment_magnitude=9, erase_probability=0.5
    )
    batch = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(augment(batch, settings))
    assert torch.equal(drawn[0], drawn[1])


def test_mixup_mixes_labels_as_it_mixes_images() -> None:
    torch.manual_seed(0)
    labels = torch.arange(4)
    images = torch.nn.functional.one_hot(labels, 4).float()[:, None, None, :].expand(4, 1, 2, 4).contiguous()
    mixed, shares = mix(images, labels, AugmentSettings(mixup_alpha=1.0), lambda: 4)
    np.testing.assert_allclose(mixed[:, 0, 0].numpy(), shares.numpy(), atol=1e-6)
    np.testing.assert_allclose(shares.sum(1).numpy(), 1.0, atol=1e-6)
    assert int((shares > 0).sum()) == 8


def test_cutmix_shares_are_those_of_the_area() -> None:
    torch.manual_seed(3)
    labels = torch.arange(2)
    images = labels.float()[:, None, None, None].expand(2, 1, 32, 32).contiguous()
    mixed, shares = mix(images, labels, AugmentSettings(cutmix_alpha=1.0), lambda: 2)
    np.testing.assert_allclose(mixed.mean((1, 2, 3)).numpy(), shares[:, 1].numpy(), atol=1e-6)
    assert 0 < float(shares[0, 1]) < 1


def test_nothing_mixed_leaves_classes() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.arange(3)
    assert mix(images, labels, AugmentSettings(), lambda: 3) == (images, labels)
    assert AugmentSettings().is_none
    assert not AugmentSettings(mixup_alpha=0.2).is_none
