from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.models.complexity import weight_sparsity
from edgecompress.pruning.weight_masks import WeightMasks, pattern_mask
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.training.distill import TrainingBatch, label_loss
from small_models import images, tiny_net


def _stage(**settings: Any) -> PruneStage:
    return PruneStage.model_validate({"kind": "prune", "id": "pruned", "method": "unstructured", **settings})


def test_a_glob_that_matches_nothing_is_named_with_what_is_near() -> None:
    with pytest.raises(ConfigurationError, match=r"'pont' matches no layer; did you mean 'point'\?"):
        WeightMasks(tiny_net(), stage=_stage(sparsity=0.5, exclude=("pont",)))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_reach_the_sparsity_and_hold_it(scope: str) -> None:
    net = tiny_net()
    masks = WeightMasks(net, stage=_stage(sparsity=0.6, steps=3, scope=scope))
    reached = []
    for step in (1, 2, 3):
        masks.step(step)
        reached.append(masks.sparsity)
    assert reached == pytest.approx([1 - 0.4 ** (1 / 3), 1 - 0.4 ** (2 / 3), 0.6], abs=1e-3)
    assert weight_sparsity(net) == pytest.approx(0.6, abs=1e-3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    masks.apply()
    assert weight_sparsity(net) == pytest.approx(0.6, abs=1e-3)


def test_global_masks_remove_the_smallest_of_all_and_layer_masks_of_each() -> None:
    net = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net[0].weight.uniform_(1.0, 2.0)
        net[1].weight.uniform_(3.0, 4.0)
    together, each = copy.deepcopy(net), copy.deepcopy(net)
    WeightMasks(together, stage=_stage(sparsity=0.5, scope="global")).step(1)
    WeightMasks(each, stage=_stage(sparsity=0.5, scope="layer")).step(1)
    assert [float((layer.weight == 0).float().mean()) for layer in together] == [1.0, 0.0]
    assert [float((layer.weight == 0).float().mean()) for layer in each] == [0.5, 0.5]


def test_equal_magnitudes_do_not_remove_more_than_asked() -> None:
    net = nn.Sequential(nn.Linear(10, 10, bias=False))
    nn.init.ones_(net[0].weight)
    WeightMasks(net, stage=_stage(sparsity=0.3)).step(1)
    assert weight_sparsity(net) == pytest.approx(0.3)


def test_a_pattern_keeps_the_largest_of_every_few_neighbouring_inputs() -> None:
    weight = torch.tensor([[1.0, -4, 3, 2, 9, 8, -7, 6], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert pattern_mask(weight, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]]
    kernels = torch.randn(3, 8, 2, 2)
    mask = pattern_mask(kernels, 2, 4)
    assert bool((mask.unflatten(1, (2, 4)).sum(2) == 2).all())
    assert torch.equal(mask[:, :, 1, 0], pattern_mask(kernels[:, :, 1, 0], 2, 4))


def test_a_pattern_is_reached_in_steps_and_skips_what_it_does_not_fit() -> None:
    net = tiny_net()
    masks = WeightMasks(net, stage=_stage(pattern="1:4", steps=3))
    assert masks.skipped == ("stem.0", "depthwise")  # one input a filter
    reached = []
    for step in (1, 2, 3):
        masks.step(step)
        reached.append(masks.sparsity)
    assert reached == [0.25, 0.5, 0.75]
    assert float((net.point.weight == 0).float().mean()) == 0.75
    assert float((net.stem[0].weight == 0).float().mean()) == 0.0
    with pytest.raises(PruningError, match="no layer has a multiple of 5 input channels"):
        WeightMasks(net, stage=_stage(pattern="2:5"))


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_the_penalty_adds_its_gradient_and_trains_nothing_twice(kind: str, power: int) -> None:
    net = tiny_net()
    masks = WeightMasks(net, stage=_stage(sparsity=0.5, regularization=kind, regularization_strength=0.01))
    loss = masks.penalized(label_loss())
    assert list(loss.parameters()) == []
    batch = TrainingBatch(images(8), torch.arange(8) % 10, None)
    weight = net.point.weight
    plain = torch.autograd.grad(label_loss()(batch, net(batch.images)), weight)[0]
    with_penalty = torch.autograd.grad(loss(batch, net(batch.images)), weight)[0]
    slope = weight.sign() if power == 1 else 2 * weight
    assert torch.allclose(with_penalty - plain, 0.01 * slope.detach(), atol=1e-6)


def test_rewinding_restores_what_is_left_and_keeps_the_zeros() -> None:
    net = tiny_net()
    early = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    masks = WeightMasks(net, stage=_stage(sparsity=0.5))
    masks.step(1)
    zeros = net.point.weight == 0
    masks.rewind(early)
    assert torch.equal(net.point.weight, early["point.weight"] * ~zeros)
    assert torch.equal(net.point.bias, early["point.bias"])
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
