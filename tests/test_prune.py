from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.models.channel_groups import ChannelGroups, protected_layers, replay_cuts
from edgecompress.models.complexity import measure_complexity, weight_layers
from edgecompress.pruning.channel_importance import scores
from edgecompress.pruning.prune import ChannelPruner, reestimate_batch_norm
from edgecompress.settings.prune_settings import PruneStage
from small_models import TinyNet, images, tiny_net


def _stage(**settings: Any) -> PruneStage:
    return PruneStage.model_validate({"kind": "prune", "id": "pruned", **settings})


def _pruner(net: nn.Module, stage: PruneStage, multiple: int = 1) -> ChannelPruner:
    batches = [(images(16), torch.arange(16) % 10)]
    return ChannelPruner(net, stage=stage, channel_multiple=multiple, example=images(2), scoring_batches=batches)


def _cut(pruner: ChannelPruner, *, progress: float = 1.0) -> None:
    """One step towards the stage's channel ratio."""
    scored = pruner.score()
    pruner.cut_to(pruner.plan(pruner.stage.target[1], scored, progress=progress), scored)


@pytest.mark.parametrize("scope", ["global", "isomorphic", "layer"])
@pytest.mark.parametrize("importance", ["magnitude", "l1", "bn_scale", "taylor", "lamp", "hessian"])
def test_every_ranking_removes_channels_and_keeps_the_classes(scope: str, importance: str) -> None:
    net = tiny_net()
    before = measure_complexity(net, images(1))
    _cut(_pruner(net, _stage(channel_ratio=0.5, scope=scope, importance=importance)))
    after = measure_complexity(net, images(1))
    assert after.params < 0.9 * before.params
    assert after.macs < before.macs
    assert net(images(3)).shape == (3, 10)
    assert all(parameter.grad is None for parameter in net.parameters())


def _silence(net: TinyNet, group: str, doomed: list[int]) -> None:
    """Make the group's channels zero wherever they are made."""
    makers: dict[str, list[nn.Module]] = {
        "stem.0": [net.stem[1], net.inner[1], net.depthwise],
        "point": [net.point],
        "hidden": [net.hidden],
    }
    with torch.no_grad():
        for layer in makers[group]:
            for parameter in layer.parameters():
                parameter[doomed] = 0


@pytest.mark.parametrize("name", ["stem.0", "point", "hidden"])
def test_removal_equals_zeroing_the_channels_first(name: str) -> None:
    """What is cut away must be exactly what contributed nothing: silence channels, then cut, and nothing changes."""
    net = tiny_net()
    doomed = [1, 4, 7]
    _silence(net, name, doomed)
    expected = net(images(8))
    pruned = copy.deepcopy(net)
    groups = ChannelGroups(pruned, images(2), protected=["head"])
    (group,) = [group for group in groups.current() if group.name == name]
    groups.cut(group, doomed)
    assert [(group.root, True, (1, 4, 7))] == list(groups.history)
    assert weight_layers(pruned)[name].weight.shape[0] == group.channels - 3  # type: ignore[index]
    assert torch.allclose(pruned(images(8)), expected, atol=1e-6)


def test_silent_channels_are_the_first_to_go() -> None:
    net = tiny_net()
    _silence(net, "point", [3, 8, 20, 31])
    expected = net(images(8))
    _cut(_pruner(net, _stage(layer_ratios={"point": 0.125})))
    assert net.point.out_channels == 28
    assert torch.allclose(net(images(8)), expected, atol=1e-6)


def test_coupled_layers_are_one_group() -> None:
    found = {group.name: group for group in ChannelGroups(tiny_net(), images(2), protected=["head"]).current()}
    assert {name: group.producers for name, group in found.items()} == {
        "stem.0": ("stem.0", "inner.0", "depthwise"),
        "point": ("point",),
        "hidden": ("hidden",),
    }
    assert [group.channels for group in found.values()] == [16, 32, 32]


def test_l1_is_the_mean_of_the_sums_of_magnitudes_over_the_layers_that_share_a_channel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.Flatten(), nn.Linear(6, 3, bias=False))
    inputs = torch.randn(2, 2, 3, 3)
    groups = ChannelGroups(net, inputs, protected=["2"]).current()
    found = scores(net, groups, importance="l1", batches=[])["0"].numpy()
    first, last = (net[index].weight.detach().numpy() for index in (0, 2))  # type: ignore[union-attr]
    expected = (np.abs(first).sum(axis=(1, 2, 3)) + np.abs(last).sum(axis=0)) / 2
    assert np.allclose(found, expected / expected.mean(), atol=1e-6)


def test_the_hessian_is_the_mean_square_of_single_gradients() -> None:
    """For logits W x, the gradient of one image's loss is (softmax - label) x^T."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 3, bias=False))
    inputs, labels = torch.randn(6, 1, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    groups = ChannelGroups(net, inputs, protected=["2"]).current()
    batches = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    found = scores(net, groups, importance="hessian", batches=batches)["0"]
    first, last = net[0].weight.detach().flatten(), net[2].weight.detach()  # type: ignore[union-attr]
    slope = torch.softmax(inputs.flatten()[:, None] * first @ last.T, 1) - nn.functional.one_hot(labels, 3)
    hidden = inputs.flatten()[:, None] * first
    of_last = (slope[:, :, None] * hidden[:, None, :]).square().mean(0)
    of_first = ((slope @ last) * inputs.flatten()[:, None]).square().mean(0)
    expected = (first.square() * of_first + (last.square() * of_last).sum(0)) / 2
    assert torch.allclose(found, expected / expected.mean(), atol=1e-4)


def test_history_rebuilds_the_same_network() -> None:
    net = tiny_net()
    pruner = _pruner(net, _stage(channel_ratio=0.5), multiple=4)
    for step in (1, 2, 3):
        _cut(pruner, progress=step / 3)
    fresh = TinyNet()
    replay_cuts(fresh, images(2), pruner.history)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(images(4)), net(images(4)))


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, 32), (0.3, 24), (0.4, 16), (0.62, 16), (0.8, 8), (0.95, 8)])
def test_channels_are_rounded_to_the_nearest_multiple(ratio: float, kept: int) -> None:
    net = tiny_net(width=32)
    _cut(_pruner(net, _stage(channel_ratio=ratio, scope="layer", max_layer_ratio=0.99), multiple=8))
    assert net.stem[0].out_channels == kept
    widths = [layer.out_channels for layer in weight_layers(net).values() if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_no_layer_loses_more_than_max_layer_ratio(scope: str) -> None:
    net = tiny_net()
    with torch.no_grad():
        net.point.weight.mul_(1e-3)  # every one of its channels ranks below all others, were it not normalized
    _cut(_pruner(net, _stage(channel_ratio=0.7, max_layer_ratio=0.75, scope=scope, importance="magnitude")))
    kept = {"stem": net.stem[0].out_channels / 16, "point": net.point.out_channels / 32}
    assert min(kept.values()) >= 0.25


def test_blocks_of_a_grouped_convolution_lose_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    _cut(_pruner(net, _stage(channel_ratio=0.5, scope="layer"), multiple=2))
    assert [net[0].out_channels, net[2].in_channels, net[2].out_channels, net[2].groups] == [8, 8, 8, 4]
    assert net(images(3)).shape == (3, 10)


def test_steps_approach_the_ratio() -> None:
    net = tiny_net(width=32)
    pruner = _pruner(net, _stage(channel_ratio=0.5, scope="layer", steps=2))
    sizes = [net.stem[0].out_channels]
    for progress in (0.5, 1.0):
        _cut(pruner, progress=progress)
        sizes.append(net.stem[0].out_channels)
    assert sizes == [32, 24, 16]
    final = dict.fromkeys(pruner.initial, 8)
    assert pruner.part_of(final, 0.5) == {"stem.0": 20, "point": 36, "hidden": 20}
    assert pruner.part_of(final, 1.0) == final


def test_scopes_rank_over_what_they_say() -> None:
    """Halving the scores of one group moves channels out of it globally, and changes nothing within a layer."""
    kept: dict[str, dict[str, int]] = {}
    for scope in ("global", "isomorphic", "layer"):
        pruner = _pruner(tiny_net(), _stage(channel_ratio=0.5, scope=scope))
        scored = pruner.score()
        kept[scope] = pruner.plan(0.5, {**scored, "point": scored["point"] * 0.5})
    assert kept["layer"] == {"stem.0": 8, "point": 16, "hidden": 16}
    assert kept["isomorphic"] == kept["layer"]  # here, no two groups have the same layers
    assert kept["global"]["point"] < 16
    assert sum(kept["global"].values()) == 40


def test_layers_with_a_ratio_of_their_own_keep_to_it() -> None:
    net = tiny_net()
    _cut(_pruner(net, _stage(channel_ratio=0.5, scope="layer", layer_ratios={"inner*": 0.25, "hidden": 0})))
    assert [net.stem[0].out_channels, net.point.out_channels, net.hidden.out_features] == [12, 16, 32]


@pytest.mark.parametrize(
    ("ratios", "needles"),
    [
        ({"pont": 0.5}, r"layer_ratios: 'pont' matches no layer; did you mean 'point'\?"),
        ({"head": 0.5}, "'head' names only layers that keep their channels"),
        ({"stem*": 0.5, "inner*": 0.25}, r"different ratios to channels that can only go together \(stem.0, "),
    ],
)
def test_layer_ratios_that_do_not_fit_are_refused(ratios: dict[str, float], needles: str) -> None:
    with pytest.raises(ConfigurationError, match=needles):
        _pruner(tiny_net(), _stage(channel_ratio=0.5, layer_ratios=ratios))


def test_excluded_layers_and_the_classifier_keep_their_channels() -> None:
    net = tiny_net()
    assert protected_layers(net, images(2), ("poi*",)) == ["head", "point"]
    _cut(_pruner(net, _stage(channel_ratio=0.5, exclude=("poi*",))))
    assert net.point.out_channels == 32
    assert net.head.out_features == 10


def test_a_glob_that_matches_nothing_is_named_with_what_is_near() -> None:
    with pytest.raises(ConfigurationError, match=r"'pont' matches no layer; did you mean 'point'\?"):
        _pruner(tiny_net(), _stage(channel_ratio=0.5, exclude=("pont",)))


def test_bn_scale_without_batch_norm_is_refused_and_groups_without_it_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    with pytest.raises(PruningError, match="bn_scale needs batch norm"):
        _pruner(net, _stage(channel_ratio=0.5, importance="bn_scale")).score()
    pruner = _pruner(tiny_net(), _stage(channel_ratio=0.5, importance="bn_scale"))
    _cut(pruner)
    assert pruner.unscored == ("point", "hidden")


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    net = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=10)
    stage = _stage(channel_ratio=0.5)
    with pytest.raises(PruningError, match="the model's channels cannot be traced"):
        ChannelPruner(net, stage=stage, channel_multiple=1, example=torch.zeros(2, 3, 32, 32), scoring_batches=[])


def test_a_history_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PruningError, match="does not fit the architecture"):
        replay_cuts(TinyNet(), images(2), [("nowhere.conv", True, (0,))])


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
