"""The prune stages in a run: targets reached and recorded, resumed without searching again, stored and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgecompress import pipeline
from edgecompress.errors import PruningError, TrainingError
from edgecompress.models.checkpoint import load_checkpoint
from edgecompress.models.model_building import build
from edgecompress.stages import prune_stages
from small_models import images, small_architecture

pytestmark = pytest.mark.slow

INT8 = "  - {id: int8, kind: quantize, placement: full, effort: fast, calibration: {samples: 32}}\n"
Recipes = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipes:
    """Writes a recipe with one prune stage, for a given model, so that nothing has to be trained first."""
    torch.manual_seed(0)
    save_file(build(small_architecture(width=16)).state_dict(), tmp_path / "weights.safetensors")

    def write(*stages: str, epochs: int = 1) -> Path:
        path = tmp_path / "recipe.yaml"
        training = f"epochs: {epochs}, warmup_epochs: 0, epochs_between: 1"
        lines = "".join(
            f"  - {{id: pruned{n or ''}, kind: prune, {stage}, {training}}}\n" for n, stage in enumerate(stages)
        )
        path.write_text(
            "data: {name: digits, max_train_samples: 200}\n"
            f"model: {{name: resnet8, arguments: {{width: 16}}, checkpoint: {tmp_path}/weights.safetensors}}\n"
            f"gates: {{max_accuracy_drop: 1.0}}\nstages:\n{lines}{INT8}"
        )
        return path

    return write


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_macs_ratio_is_reached_in_steps_recorded_and_kept_by_a_run_that_goes_on(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "run", prune_stages.fit_stage

    def failing(*arguments: Any, step: str, **settings: Any) -> Any:
        if step == "2/2":
            raise TrainingError("the loss is not finite")
        return real(*arguments, step=step, **settings)

    monkeypatch.setattr(prune_stages, "fit_stage", failing)
    source = str(recipe("macs_ratio: 0.4, steps: 2, channel_multiple: 4"))
    with pytest.raises(TrainingError):
        pipeline.apply(source, output=output)
    (decision,) = [d for d in _json(output / "run.json")["decisions"] if d["what"] == "channels:pruned"]
    assert decision["why"].startswith("macs_ratio 0.4: removes 4")
    monkeypatch.undo()
    monkeypatch.delattr(prune_stages, "RatioSearch")  # the plan is not made again
    manifest = pipeline.apply(source, output=output, resume=True).manifest
    pruned = manifest["stages"][0]
    assert 0.4 <= 1 - pruned["macs"] / manifest["baseline"]["macs"] < 0.5
    assert 1 - pruned["macs"] / manifest["baseline"]["macs"] == pytest.approx(decision["value"]["removed_macs"])
    loaded = load_checkpoint(output / "stages/pruned")
    again = load_checkpoint(output / "stages/pruned")
    assert torch.equal(loaded.module(images(4)), again.module(images(4)))
    assert "in 2 step(s) (global magnitude), channels rounded to 4" in pruned["summary"]


def test_two_prune_stages_follow_each_other_and_come_back_from_disk(recipe: Recipes, tmp_path: Path) -> None:
    source = str(recipe("channel_ratio: 0.25, channel_multiple: 4", "params_ratio: 0.3, channel_multiple: 4"))
    manifest = pipeline.apply(source, output=tmp_path / "run").manifest
    first, second = manifest["stages"][:2]
    assert 1 - second["params"] / first["params"] >= 0.3
    loaded = load_checkpoint(tmp_path / "run/stages/pruned1")
    assert sum(p.numel() for p in loaded.module.parameters()) == second["params"]


def test_a_latency_ratio_is_measured_and_recorded(recipe: Recipes, tmp_path: Path) -> None:
    manifest = pipeline.apply(str(recipe("latency_ratio: 0.15, channel_multiple: 4")), output=tmp_path / "run").manifest
    value = next(d["value"] for d in manifest["decisions"] if d["what"] == "channels:pruned")
    assert value["latency"]["share"] <= 0.85
    assert 1 <= len(value["trials"]) <= 6
    assert value["latency"]["low"] <= value["latency"]["share"] <= value["latency"]["high"]


def test_a_target_out_of_reach_fails_the_stage(recipe: Recipes, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"macs_ratio 0.99 cannot be reached: at most \d\d.\d% of the MACs"):
        pipeline.apply(str(recipe("macs_ratio: 0.99, channel_multiple: 8")), output=tmp_path / "run")


def test_a_lottery_ticket_starts_again_from_early_weights(recipe: Recipes, tmp_path: Path) -> None:
    path = recipe("method: unstructured, sparsity: 0.5, rewind_epoch: 1, learning_rate: 1.0e-9, momentum: 0")
    text = path.read_text().replace(
        "stages:\n", "stages:\n  - {id: dense, kind: train, epochs: 2, warmup_epochs: 0, learning_rate: 0.05}\n"
    )
    path.write_text(text)
    pipeline.apply(str(path), output=tmp_path / "run")
    early = load_file(tmp_path / "run/stages/dense/early.safetensors")
    late, pruned = (load_checkpoint(tmp_path / f"run/stages/{name}").module for name in ("dense", "pruned"))
    found, trained = dict(pruned.named_parameters())["conv.weight"], dict(late.named_parameters())["conv.weight"]
    left = found != 0
    assert 0 < int(left.sum()) < left.numel()
    assert torch.allclose(found[left], early["conv.weight"][left], atol=1e-6)  # finetuned at next to no rate
    assert not torch.allclose(found[left], trained[left], atol=1e-4)
