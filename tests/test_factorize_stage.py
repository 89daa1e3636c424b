"""The factorize stage: only what is faster, a budget met by the layers that are, and a run that keeps it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgecompress import pipeline
from edgecompress.errors import ConfigurationError, PruningError
from edgecompress.measure.latency_trial import LatencyShare, layer_trial
from edgecompress.models.checkpoint import load_checkpoint
from edgecompress.models.complexity import measure_complexity, weight_layers
from edgecompress.models.factorize import Factorization, removed_macs, spectra
from edgecompress.models.model_building import build
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.target import load_target, own_target
from edgecompress.stages.factorize_stage import _Choice
from small_models import images, small_architecture, tiny_net


def _stage(**settings: Any) -> FactorizeStage:
    return FactorizeStage.model_validate({"kind": "factorize", "id": "thin", **settings})


def _choice(stage: FactorizeStage, slow: set[str], timed: list[str] | None = None) -> _Choice:
    net = tiny_net()

    def time_layer(step: Factorization) -> LatencyShare:
        if timed is not None:
            timed.append(step.layer)
        share = 1.2 if step.layer in slow else 0.6
        return LatencyShare(share, share - 0.1, share + 0.1, 1.0, share)

    found = spectra(net, images(2), weight_layers(net))
    return _Choice(stage, found, measure_complexity(net, images(1)).macs, time_layer)


def test_a_layer_that_is_not_faster_stays_whole() -> None:
    every = _choice(_stage(energy=0.6), slow=set()).settle()
    assert {"inner.0", "hidden"} <= set(every)
    choice = _choice(_stage(energy=0.6), slow={"hidden"})
    assert set(choice.settle()) == set(every) - {"hidden"}
    assert [step.layer for step in choice.slower] == ["hidden"]
    assert choice.timings(choice.slower[0])["latency"]["share"] == 1.2


def test_a_budget_is_met_by_the_layers_that_are_faster_at_a_lower_energy() -> None:
    share = 0.2
    free = _choice(_stage(macs_ratio=share), slow=set())
    free.settle()
    timed: list[str] = []
    choice = _choice(_stage(macs_ratio=share), slow={"hidden", "point"}, timed=timed)
    steps = choice.settle()
    assert not {"hidden", "point"} & set(steps)
    assert choice.energy < free.energy
    assert removed_macs(choice.found, choice.energy) >= share * choice.macs
    with pytest.raises(PruningError, match=r"macs_ratio 0.2 cannot be reached by low rank, of the layers"):
        _choice(_stage(macs_ratio=share), slow=set(weight_layers(tiny_net()))).settle()


def test_where_nothing_is_faster_the_stage_fails_and_says_so() -> None:
    with pytest.raises(PruningError, match=r"nothing was factorized: .* no layer is faster as two; \d were tried"):
        _choice(_stage(energy=0.6), slow=set(weight_layers(tiny_net()))).settle()
    with pytest.raises(PruningError, match=r"no layer has fewer MACs as two; lower energy"):
        _choice(_stage(energy=0.99999), slow=set()).settle()


def test_a_layer_is_timed_on_the_machine_at_hand_only() -> None:
    with pytest.raises(ConfigurationError, match=r"target rpi4 is not this machine .* or measured: false"):
        layer_trial(nn.Linear(4, 4), nn.Linear(4, 4), (1, 4), load_target("rpi4"), what="a layer")


@pytest.mark.slow
def test_a_wide_layer_of_low_rank_is_measured_to_be_faster() -> None:
    wide = nn.Conv2d(96, 96, 3, padding=1)
    thin = nn.Sequential(nn.Conv2d(96, 4, 3, padding=1, bias=False), nn.Conv2d(4, 96, 1))
    found = layer_trial(wide, thin, (1, 96, 16, 16), own_target(), what="a layer")
    assert found.high < 1


@pytest.mark.slow
def test_a_factorized_model_is_finetuned_exported_quantized_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(build(small_architecture(width=16)).state_dict(), tmp_path / "weights.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {name: digits, max_train_samples: 200}\n"
        f"model: {{name: resnet8, arguments: {{width: 16}}, checkpoint: {tmp_path}/weights.safetensors}}\n"
        "gates: {max_accuracy_drop: 1.0}\nstages:\n"
        "  - {id: cut, kind: prune, channel_ratio: 0.25, channel_multiple: 4, epochs: 1, warmup_epochs: 0}\n"
        "  - {id: thin, kind: factorize, macs_ratio: 0.3, measured: false, epochs: 1, warmup_epochs: 0}\n"
        "  - {id: int8, kind: quantize, placement: full, effort: fast, calibration: {samples: 32}}\n"
    )
    pipeline.apply(str(path), output=tmp_path / "run")
    outcome = pipeline.export(tmp_path / "run", int8=True)
    cut, thin = outcome.manifest["stages"][:2]
    assert 1 - thin["macs"] / cut["macs"] >= 0.3
    decision = next(d["value"] for d in outcome.manifest["decisions"] if d["what"] == "ranks:thin")
    loaded = load_checkpoint(tmp_path / "run/stages/thin")
    steps = [step for step in loaded.history if isinstance(step, Factorization)]
    assert [step.layer for step in steps] == [row["layer"] for row in decision["layers"]]
    assert sum(p.numel() for p in loaded.module.parameters()) == thin["params"]
    assert (tmp_path / "run/export/model.int8.onnx").is_file()
