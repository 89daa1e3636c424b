"""Groups that matter stand out from groups that do not; the proposal spares them and reaches its share of the MACs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from conftest import CommandLine
from edgecompress.errors import PruningError
from edgecompress.measure.latency_trial import LatencyShare
from edgecompress.models.complexity import measure_complexity
from edgecompress.pruning.channel_sensitivity import ChannelSensitivity, GroupSensitivity, Point
from edgecompress.pruning.prune import ChannelPruner
from edgecompress.reporting.sensitivity_figure import sensitivity_svg
from edgecompress.settings.prune_settings import PruneStage
from small_models import TinyNet, images, tiny_net


def _measured(net: TinyNet, **settings: Any) -> ChannelSensitivity:
    stage = PruneStage.model_validate({"kind": "prune", "id": "pruned", "channel_ratio": 0.5, **settings})
    held_out = images(64, seed=3)
    with torch.no_grad():
        labels = net(held_out).argmax(1)  # what the whole net says is right, so that every change costs
    return ChannelSensitivity(
        net,
        stage=stage,
        channel_multiple=1,
        example=images(2),
        settle=[],
        images=held_out,
        labels=labels,
    )


def _net() -> TinyNet:
    """Three quarters of the hidden layer are silent, so they can go for nothing; the others count."""
    net = tiny_net()
    with torch.no_grad():
        net.hidden.weight[8:] = 0
        net.hidden.bias[8:] = 0
        net.head.weight[:, 8:] = 0
        net.head.weight *= 20  # sure of its answers, so that the loss starts near 0
    return net


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics stay as they are: there is no training set here to settle them on."""
    from edgecompress.pruning import channel_sensitivity

    monkeypatch.setattr(channel_sensitivity, "reestimate_batch_norm", lambda module, batches: None)


@pytest.mark.usefixtures("settled")
def test_a_group_that_costs_nothing_is_told_from_those_that_do() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    measured = _measured(net)
    assert measured.accuracy == 1.0
    counted: list[int] = []

    def latency_of(module: torch.nn.Module) -> LatencyShare:
        counted.append(measure_complexity(module, images(1)).macs)
        return LatencyShare(0.9, 0.8, 1.0, 1.0, 0.9)

    rows = {row.group: row for row in measured.measure(latency_of=latency_of)}
    assert list(rows) == ["stem.0", "point", "hidden"]
    assert rows["stem.0"].layers == ("stem.0", "inner.0", "depthwise")
    assert [point.loss_increase for point in rows["hidden"].points] == pytest.approx([0, 0, 0], abs=1e-5)
    assert [point.accuracy for point in rows["hidden"].points] == [1.0, 1.0, 1.0]
    assert rows["stem.0"].points[-1].loss_increase > 0.1
    assert rows["stem.0"].points[-1].accuracy < 1.0
    assert [point.removed for point in rows["point"].points] == [0.25, 0.5, 0.75]
    assert [point.latency is not None for point in rows["point"].points] == [False, True, False]
    assert counted[1] == round(measured.before.macs * (1 - rows["point"].points[1].removed_macs))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.usefixtures("settled")
def test_the_proposal_reaches_its_share_and_takes_what_costs_nothing_first() -> None:
    measured = _measured(_net())
    rows = measured.measure(latency_of=None)
    ratios, removed = measured.propose(rows, 0.4)
    assert 0.4 <= removed < 0.5
    assert ratios["hidden"] == 0.75
    stage = PruneStage.model_validate({"kind": "prune", "id": "p", "layer_ratios": ratios})
    net = _net()
    pruner = ChannelPruner(net, stage=stage, channel_multiple=1, example=images(2), scoring_batches=[])
    scored = pruner.score()
    pruner.cut_to(pruner.plan(0.0, scored), scored)
    assert 1 - measure_complexity(net, images(1)).macs / measured.before.macs == pytest.approx(removed)
    with pytest.raises(PruningError, match=r"no shares to propose: .* 99.0% are asked for"):
        measured.propose(rows, 0.99)


def test_ratios_lie_between_the_measured_ones_and_never_profit_from_luck() -> None:
    points = [Point(ratio, ratio, 0.9, loss, ratio, ratio) for ratio, loss in ((0.25, 0.1), (0.5, 0.05), (0.75, 0.5))]
    row = GroupSensitivity("conv", ("conv",), 16, tuple(points))
    assert row.ratio_within(0.05) == pytest.approx(0.125)
    assert row.ratio_within(0.1) == 0.5
    assert row.ratio_within(0.3) == pytest.approx(0.625)
    assert row.ratio_within(1.0) == 0.75
    assert row.ratio_within(0.0) == 0.0


@pytest.mark.slow
def test_the_command_prints_a_table_a_figure_and_ratios_for_a_recipe(command_line: CommandLine, tmp_path: Path) -> None:
    settings = ("--set", "model.name=student_cnn", "--set", "stages.int8.effort=fast")
    placement = ("--set", "stages.int8.placement=full", "--set", "stages.int8.calibration.samples=32")
    made = command_line("apply", "int8_ptq", *settings, *placement, "--output", tmp_path / "run", "--no-gate")
    assert made.exit_code == 0, made.stderr
    asked = ("sensitivity", tmp_path / "run", "--what", "channels", "--no-latency", "--macs-ratio", "0.3")
    answer = command_line(*asked, "--json")
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)["channels"]
    assert document["not_timed_because"] == ["--no-latency was given"]
    assert document["proposal"]["removed_macs"] >= 0.3
    figure = ElementTree.fromstring((tmp_path / "run/stages/int8/sensitivity.svg").read_text())
    assert len(figure.findall("{http://www.w3.org/2000/svg}polyline")) == len(document["groups"])
    shown = command_line(*asked)
    assert "layer_ratios:" in shown.stdout
    assert document["groups"][0]["group"] in shown.stdout


def test_names_are_escaped_in_the_figure() -> None:
    point = {"removed": 0.5, "accuracy": 0.5}
    svg = sensitivity_svg({"accuracy": 0.9, "groups": [{"group": "a<b&c", "points": [point]}]})
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "a&lt;b&amp;c" in svg
