from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgecompress.errors import RunError
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint, save_checkpoint
from edgecompress.models.model_building import build
from edgecompress.pruning.prune import ChannelPruner
from edgecompress.settings.prune_settings import PruneStage
from small_models import images, small_architecture


def _pruned() -> Checkpoint:
    architecture = small_architecture(width=16)
    torch.manual_seed(0)
    module = build(architecture)
    stage = PruneStage.model_validate({"kind": "prune", "id": "p", "channel_ratio": 0.5})
    pruner = ChannelPruner(
        module, stage=stage, channel_multiple=4, example=example_input(architecture), scoring_batches=[]
    )
    for progress in (0.5, 1.0):
        scored = pruner.score()
        pruner.cut_to(pruner.plan(0.5, scored, progress=progress), scored)
    return Checkpoint(module.eval(), architecture, pruner.history)


def test_a_pruned_model_comes_back_with_identical_logits(tmp_path: Path) -> None:
    saved = _pruned()
    save_checkpoint(saved, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded.module(images(4)), saved.module(images(4)))
    assert loaded.history == saved.history
    assert loaded.history
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    saved = _pruned()
    for folder in ("a", "b"):
        save_checkpoint(saved, tmp_path / folder)
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    save_checkpoint(_pruned(), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(RunError, match="weights do not fit"):
        load_checkpoint(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    for damage in ({"format_version": 99}, {"history": [["conv", True]]}, {"architecture": "resnet8"}):
        (tmp_path / "model.json").write_text(json.dumps(description | damage))
        with pytest.raises(Exception, match=r"model|format_version|history|architecture") as caught:
            load_checkpoint(tmp_path)
        assert caught.type.__module__ == "edgecompress.errors"


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    save_checkpoint(_pruned(), tmp_path)
    other = small_architecture(width=8)
    save_checkpoint(Checkpoint(build(other), other), tmp_path / "other")
    (tmp_path / "other" / "model.json").replace(tmp_path / "model.json")
    with pytest.raises(RunError, match="weights do not fit"):
        load_checkpoint(tmp_path)
