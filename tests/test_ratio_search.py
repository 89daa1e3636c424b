from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.measure.latency_trial import LatencyShare, latency_trials
from edgecompress.models.complexity import measure_complexity
from edgecompress.pruning.prune import ChannelPruner
from edgecompress.pruning.ratio_search import RatioSearch
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.target import load_target, own_target
from small_models import images, tiny_net


def _search(multiple: int = 1, **settings: Any) -> RatioSearch:
    stage = PruneStage.model_validate({"kind": "prune", "id": "pruned", **settings})
    net = tiny_net(width=32)
    pruner = ChannelPruner(net, stage=stage, channel_multiple=multiple, example=images(2), scoring_batches=[])
    return RatioSearch(pruner, pruner.score())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("what", "share"), [("macs", 0.3), ("macs", 0.7), ("params", 0.5)])
def test_a_share_of_macs_or_params_is_reached_and_not_passed(what: str, share: float, scope: str) -> None:
    search = _search(**{f"{what}_ratio": share, "scope": scope})
    plan = search.reaching(what, share)
    assert share <= plan.removed(what) < share + 0.04  # one channel of 32 in two layers is about as much
    pruner = search.pruner
    pruner.cut_to(plan.widths, search.scored)
    after = measure_complexity(pruner.module, images(1))
    assert 1 - after.macs / search.before.macs == pytest.approx(plan.removed_macs)
    assert 1 - after.params / search.before.params == pytest.approx(plan.removed_params)


def test_where_layers_change_together_only_as_many_as_it_takes_are_cut() -> None:
    """With a multiple of 16, every layer of 32 channels loses half of them at the same ratio, a quarter."""
    search = _search(multiple=16, macs_ratio=0.3, scope="layer")
    before, after = search.plan(0.2499), search.plan(0.2501)
    assert before.removed_macs < 0.3 < after.removed_macs
    plan = search.reaching("macs", 0.3)
    assert 0.3 <= plan.removed_macs < after.removed_macs
    assert plan.widths == before.widths | {"stem.0": 16}  # and not the hidden layer, which has few MACs


def test_a_share_out_of_reach_names_what_was_reached_and_what_limits_it() -> None:
    search = _search(multiple=8, params_ratio=0.99, exclude=("point",), layer_ratios={"hidden": 0.0})
    with pytest.raises(PruningError) as caught:
        search.reaching("params", 0.99)
    most = search.plan(0.9999).removed_params
    for needle in (f"at most {most:.1%} of the parameters", "max_layer_ratio 0.9", "multiples of 8", "exclude (point)"):
        assert needle in str(caught.value)
    assert "layer_ratios of 1" in str(caught.value)


def _pretended(search: RatioSearch, floor: float) -> Any:
    """A device on which a share `floor` of the latency does not depend on the MACs."""

    def latency_of(module: nn.Module) -> LatencyShare:
        macs = measure_complexity(module, images(1)).macs / search.before.macs
        share = floor + (1 - floor) * macs
        return LatencyShare(share, share - 0.01, share + 0.01, 1.0, share)

    return latency_of


@pytest.mark.parametrize(("share", "floor"), [(0.3, 0.0), (0.5, 0.3), (0.2, 0.6)])
def test_a_share_of_the_latency_takes_more_macs_where_they_are_not_speed(share: float, floor: float) -> None:
    search = _search(latency_ratio=share)
    plan = search.reaching_latency(share, _pretended(search, floor))
    assert share <= plan.removed("latency") <= share + 0.04
    assert plan.removed_macs == pytest.approx(share / (1 - floor), abs=0.05)
    assert len(plan.trials) <= 6
    assert plan.to_dict()["latency"]["share"] == 1 - plan.removed("latency")


def test_a_latency_out_of_reach_is_refused_with_what_was_measured() -> None:
    search = _search(latency_ratio=0.6)
    with pytest.raises(PruningError, match=r"latency_ratio 0.6 cannot be reached: at most (4\d|50).\d% of the latency"):
        search.reaching_latency(0.6, _pretended(search, 0.5))


@pytest.mark.slow
def test_a_narrower_net_is_measured_to_be_faster_on_this_machine() -> None:
    search = _search(latency_ratio=0.5)
    target = own_target()
    preprocessing = Preprocessing(8, 1, (0.5,), (0.5,), "bilinear", 1.0)
    with latency_trials(search.pruner.module, preprocessing, target, what="latency_ratio") as latency_of:
        found = latency_of(search.module_of(search.plan(0.8).widths))
    assert found.low <= found.share <= found.high < 1


def test_a_latency_on_a_device_that_is_not_here_is_refused() -> None:
    preprocessing = Preprocessing(8, 1, (0.5,), (0.5,), "bilinear", 1.0)
    with (
        pytest.raises(ConfigurationError, match="target rpi4 is not this machine"),
        latency_trials(tiny_net(), preprocessing, load_target("rpi4"), what="latency_ratio"),
    ):
        pass
