from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from edgecompress.complexity import weight_sparsity
from edgecompress.errors import ConfigurationError
from edgecompress.recipe import PruneStage
from edgecompress.weight_masks import WeightMasks
from small_models import tiny_net


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
