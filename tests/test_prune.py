from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from edgecompress.complexity import measure_complexity, weight_layers, weight_sparsity
from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.prune import ChannelPruner, WeightMasks, protected_layers, reestimate_batch_norm, replay_history
from edgecompress.recipe import PruneStage
from small_models import TinyNet, images, tiny_net


def _stage(**settings: Any) -> PruneStage:
    return PruneStage.model_validate({"kind": "prune", "id": "pruned", **settings})


def _pruner(net: nn.Module, stage: PruneStage, multiple: int = 1) -> ChannelPruner:
    batches = [(images(16), torch.arange(16) % 10)]
    return ChannelPruner(net, stage=stage, channel_multiple=multiple, example=images(2), scoring_batches=batches)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("importance", ["magnitude", "bn_scale", "taylor"])
def test_every_ranking_removes_channels_and_keeps_the_classes(scope: str, importance: str) -> None:
    net = tiny_net()
    before = measure_complexity(net, images(1))
    _pruner(net, _stage(channel_ratio=0.5, scope=scope, importance=importance)).step()
    after = measure_complexity(net, images(1))
    assert after.params < 0.9 * before.params
    assert after.macs < before.macs
    assert net(images(3)).shape == (3, 10)


def test_removal_equals_zeroing_the_channels_first() -> None:
    """What is cut away must be exactly what contributed nothing: silence channels, then cut, and nothing changes."""
    net = tiny_net()
    doomed = [1, 4, 7]
    with torch.no_grad():
        net.point.weight[doomed] = 0
        net.point.bias[doomed] = 0
    expected = net(images(8))
    pruned = copy.deepcopy(net)
    replay_history(pruned, images(2), [("point", True, tuple(doomed))])
    assert pruned.point.out_channels == 32 - 3
    assert torch.allclose(pruned(images(8)), expected, atol=1e-6)


def test_history_rebuilds_the_same_network() -> None:
    net = tiny_net()
    pruner = _pruner(net, _stage(channel_ratio=0.5, steps=3), multiple=4)
    for _ in range(3):
        pruner.step()
    fresh = TinyNet()
    replay_history(fresh, images(2), pruner.history)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(images(4)), net(images(4)))


def test_channels_are_rounded_to_the_multiple() -> None:
    net = tiny_net(width=32)
    _pruner(net, _stage(channel_ratio=0.4, scope="layer"), multiple=8).step()
    widths = [layer.out_channels for layer in weight_layers(net).values() if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert min(widths) < 32


def test_steps_approach_the_ratio() -> None:
    net = tiny_net(width=32)
    pruner = _pruner(net, _stage(channel_ratio=0.5, scope="layer", steps=2))
    sizes = [net.stem[0].out_channels]
    for _ in range(2):
        pruner.step()
        sizes.append(net.stem[0].out_channels)
    assert sizes == [32, 24, 16]


def test_excluded_layers_and_the_classifier_keep_their_channels() -> None:
    net = tiny_net()
    assert protected_layers(net, images(2), ("poi*",)) == ["head", "point"]
    _pruner(net, _stage(channel_ratio=0.5, exclude=("poi*",))).step()
    assert net.point.out_channels == 32
    assert net.head.out_features == 10


@pytest.mark.parametrize("method", ["structured", "unstructured"])
def test_a_glob_that_matches_nothing_is_named_with_what_is_near(method: str) -> None:
    ratio = {"structured": {"channel_ratio": 0.5}, "unstructured": {"sparsity": 0.5}}[method]
    stage = _stage(method=method, exclude=("pont",), **ratio)
    with pytest.raises(ConfigurationError, match=r"'pont' matches no layer; did you mean 'point'\?"):
        _pruner(tiny_net(), stage) if method == "structured" else WeightMasks(tiny_net(), stage=stage)


def test_bn_scale_without_batch_norm_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    with pytest.raises(PruningError, match="bn_scale needs batch norm"):
        _pruner(net, _stage(channel_ratio=0.5, importance="bn_scale"))


def test_a_history_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PruningError, match="does not fit the architecture"):
        replay_history(TinyNet(), images(2), [("nowhere.conv", True, (0,))])


def test_batch_norm_statistics_are_the_plain_mean() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, momentum=0.3))
    batches = [images(16, seed=seed) * 2 + 3 for seed in range(4)]
    reestimate_batch_norm(net, iter(batches))
    norm = net[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert float(norm.running_mean) == pytest.approx(float(torch.cat(batches).mean()), abs=1e-5)
    assert norm.momentum == 0.3
    assert not net.training


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_reach_the_sparsity_and_hold_it(scope: str) -> None:
    net = tiny_net()
    masks = WeightMasks(net, stage=_stage(method="unstructured", sparsity=0.6, steps=3, scope=scope))
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
    WeightMasks(together, stage=_stage(method="unstructured", sparsity=0.5, scope="global")).step(1)
    WeightMasks(each, stage=_stage(method="unstructured", sparsity=0.5, scope="layer")).step(1)
    assert [float((layer.weight == 0).float().mean()) for layer in together] == [1.0, 0.0]
    assert [float((layer.weight == 0).float().mean()) for layer in each] == [0.5, 0.5]


def test_equal_magnitudes_do_not_remove_more_than_asked() -> None:
    net = nn.Sequential(nn.Linear(10, 10, bias=False))
    nn.init.ones_(net[0].weight)
    WeightMasks(net, stage=_stage(method="unstructured", sparsity=0.3)).step(1)
    assert weight_sparsity(net) == pytest.approx(0.3)
