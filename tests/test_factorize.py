from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgecompress.errors import PruningError
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint, save_checkpoint
from edgecompress.models.complexity import measure_complexity, weight_layers
from edgecompress.models.factorize import (
    Factorization,
    Form,
    as_matrix,
    choose,
    energy_for,
    factors,
    forms_of,
    removed_macs,
    replace,
    spectra,
)
from edgecompress.models.model_building import build
from edgecompress.models.model_history import HistoryStep, history_from_json, history_to_json
from edgecompress.pruning.prune import ChannelPruner
from edgecompress.settings.prune_settings import PruneStage
from small_models import TinyNet, images, small_architecture, tiny_net

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 7), (5, 12)),
    "square": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "uneven": (nn.Conv2d(5, 8, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1), bias=False), (2, 5, 11, 12)),
    "point": (nn.Conv2d(6, 4, 1), (2, 6, 5, 5)),
}
CASES = [(name, form) for name, (layer, _) in LAYERS.items() for form in forms_of(layer)]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_at_full_rank_the_two_layers_are_the_one(name: str, form: Form) -> None:
    layer, shape = LAYERS[name]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pair = factors(layer, form, min(as_matrix(layer, form).shape))
    assert torch.allclose(pair(inputs), layer(inputs), atol=1e-5)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_error_of_the_weights_is_what_the_dropped_singular_values_hold(name: str, form: Form) -> None:
    layer, _ = LAYERS[name]
    values = torch.linalg.svdvals(as_matrix(layer, form))
    rank = len(values) // 2
    first, second = factors(layer, form, rank)
    # The product of the two layers, read from their responses: what the pair does to every unit impulse.
    left, right = second.weight.detach().double(), first.weight.detach().double()
    if form == "spatial":
        product = torch.einsum("orw,rih->oihw", left[:, :, 0, :], right[:, :, :, 0])
    else:
        product = (left.flatten(1) @ right.flatten(1)).view(layer.weight.shape)
    error = (product - layer.weight.detach().double()).square().sum()
    assert float(error) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_grouped_and_reflecting_convolutions_are_left_alone() -> None:
    assert forms_of(nn.Conv2d(8, 8, 3, groups=8)) == ()
    assert forms_of(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")) == ()
    with pytest.raises(PruningError, match="cannot be factorized as channel of rank 9"):
        factors(nn.Conv2d(8, 8, 3), "channel", 9)


def test_macs_are_those_that_are_counted_after_the_replacement() -> None:
    net = tiny_net()
    before = measure_complexity(net, images(1)).macs
    found = spectra(net, images(2), weight_layers(net))
    assert {spectrum.layer for spectrum in found} == {"stem.0", "inner.0", "point", "hidden", "head"}
    for energy in (0.5, 0.8):
        steps = choose(found, energy)
        changed = tiny_net()
        for step in steps.values():
            replace(changed, step, with_weights=True)
        assert steps
        assert before - measure_complexity(changed, images(1)).macs == removed_macs(found, energy)


def test_a_budget_finds_the_highest_energy_that_meets_it() -> None:
    net = tiny_net()
    found = spectra(net, images(2), weight_layers(net))
    total = measure_complexity(net, images(1)).macs
    energy = energy_for(found, 0.3 * total)
    assert energy is not None
    assert removed_macs(found, energy) >= 0.3 * total > removed_macs(found, energy + 1e-3)
    assert energy_for(found, 0.99 * total) is None


def test_a_layer_of_low_rank_is_found_and_nothing_is_lost() -> None:
    net = tiny_net()
    with torch.no_grad():
        net.hidden.weight.copy_(torch.randn(32, 3) @ torch.randn(3, 512))
    expected = net(images(8))
    steps = choose(spectra(net, images(2), {"hidden": net.hidden}), 0.99999)
    assert steps == {"hidden": Factorization("hidden", "linear", 3)}
    replace(net, steps["hidden"], with_weights=True)
    assert torch.allclose(net(images(8)), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(PruningError, match="no layer 'nowhere'"):
        replace(TinyNet(), Factorization("nowhere", "linear", 1), with_weights=False)


def test_cuts_and_factorizations_follow_each_other_and_come_back_from_disk(tmp_path: Path) -> None:
    architecture = small_architecture(width=16)
    torch.manual_seed(0)
    module, example = build(architecture).eval(), example_input(architecture)
    history: list[HistoryStep] = []

    def cut(ratio: float) -> None:
        stage = PruneStage.model_validate({"kind": "prune", "id": "p", "channel_ratio": ratio, "scope": "layer"})
        pruner = ChannelPruner(module, stage=stage, channel_multiple=2, example=example, scoring_batches=[])
        scored = pruner.score()
        pruner.cut_to(pruner.plan(ratio, scored), scored)
        history.extend(pruner.history)

    def factorize(step: Factorization) -> None:
        replace(module, step, with_weights=True)
        history.append(step)

    cut(0.25)
    factorize(Factorization("blocks.1.conv2", "spatial", 12))
    cut(0.4)  # the two layers lose channels between them too
    factorize(Factorization("blocks.1.conv2.1", "channel", 3))
    assert history_from_json(history_to_json(tuple(history))) == tuple(history)
    save_checkpoint(Checkpoint(module, architecture, tuple(history)), tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.history == tuple(history)
    assert torch.equal(loaded.module(images(4)), module.eval()(images(4)))


def test_histories_of_format_version_1_are_still_read() -> None:
    assert history_from_json([["conv", True, [1, 2]]]) == (("conv", True, (1, 2)),)
    for damaged in ({"step": "melt"}, {"step": "factorize", "layer": "a", "form": "round", "rank": 1}):
        with pytest.raises(ValueError, match="no such"):
            history_from_json([damaged])
