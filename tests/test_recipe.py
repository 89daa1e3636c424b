"""The recipe: where it is found, what is left out of it, and what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgecompress.errors import ConfigurationError
from edgecompress.settings.configuration import validate
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import QuantizeStage, Recipe, find_recipe, load_recipe
from edgecompress.shipped import shipped_files

TRAIN = {"id": "dense", "kind": "train"}
PRUNE = {"id": "pruned", "kind": "prune", "channel_ratio": 0.4}
QUANTIZE = {"id": "last", "kind": "quantize", "effort": "fast"}


def make(*stages: dict[str, Any], **more: Any) -> Recipe:
    document = {"name": "mine", "data": {"name": "digits"}, "model": {"name": "resnet8"}, "stages": list(stages)}
    return validate(Recipe, document | more, source="mine.yaml")


def faults(*stages: dict[str, Any], **more: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        make(*stages, **more)
    return [line.removeprefix("mine.yaml: ") for line in str(caught.value).splitlines()]


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("prune_kd") in shipped_files("recipes")
    (tmp_path / "prune_kd").write_text("seed: 5\n")
    assert find_recipe("prune_kd") == Path("prune_kd")
    assert find_recipe(str(tmp_path / "prune_kd")) == tmp_path / "prune_kd"


def test_name_comes_from_the_file_unless_given(tmp_path: Path) -> None:
    path = tmp_path / "mine-2.yaml"
    text = "data: {name: digits}\nmodel: {name: resnet8}\nstages: [{id: int8, kind: quantize}]\n"
    path.write_text(text)
    assert load_recipe(str(path)).name == "mine-2"
    path.write_text(text + "name: other\n")
    assert load_recipe(str(path)).name == "other"
    assert load_recipe(str(path), ["name=third"]).name == "third"


def test_paths_stay_relative_to_the_working_directory(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {name: image_folder, root: pictures}\nmodel: {name: resnet8, checkpoint: a/b.pt}\n"
        "stages: [{id: int8, kind: quantize}]\n"
    )
    recipe = load_recipe(str(path))
    assert (recipe.model.checkpoint, recipe.data.root) == (Path("a/b.pt"), Path("pictures"))


@pytest.mark.parametrize("path", shipped_files("recipes"), ids=lambda path: path.stem)
def test_resolved_recipe_makes_the_same_recipe(path: Path) -> None:
    """run.json stores the resolved recipe, and `export` reads it back."""
    recipe = load_recipe(str(path))
    document = json.loads(json.dumps(recipe.model_dump(mode="json")))
    assert validate(Recipe, document, source="run.json") == recipe


def test_quantize_stage_is_the_last_or_a_default_one() -> None:
    given = make(TRAIN, QUANTIZE).quantize_stage
    assert (given.id, given.effort) == ("last", "fast")
    assert make(TRAIN).quantize_stage == QuantizeStage(kind="quantize", id="int8")
    assert make(TRAIN).quantize_stage.effort == "balanced"


def test_weights_are_trained_when_something_trained_them() -> None:
    assert not make(QUANTIZE).has_trained_weights
    assert make(TRAIN, QUANTIZE).has_trained_weights
    assert make(QUANTIZE, model={"name": "resnet8", "checkpoint": "a.pt"}).has_trained_weights
    assert make(QUANTIZE, model={"name": "timm/resnet18", "pretrained": True}).has_trained_weights


def test_settings_are_of_the_stage_that_says_them() -> None:
    recipe = make(TRAIN | {"epochs": 3}, PRUNE | {"epochs": 4, "teacher": {"stage": "dense"}})
    assert [stage.epochs for stage in recipe.stages if not isinstance(stage, QuantizeStage)] == [3, 4]
    pruned = recipe.stages[1]
    assert isinstance(pruned, PruneStage)
    assert pruned.teacher is not None
    assert (pruned.teacher.stage, pruned.teacher.temperature, pruned.teacher.alpha) == ("dense", 4.0, 0.7)


def test_stages_must_fit_together() -> None:
    assert faults(QUANTIZE, TRAIN) == ["stages.last: quantize must be the last stage; move it to the end"]
    assert faults(TRAIN, TRAIN) == ["stages.dense: two stages have this id; give each its own"]
    assert faults(PRUNE | {"teacher": {"stage": "pruned"}}) == [
        "stages.pruned.teacher.stage: 'pruned' is no earlier stage; there is no earlier stage"
    ]
    assert faults(TRAIN, PRUNE | {"teacher": {"stage": "dens"}}) == [
        "stages.pruned.teacher.stage: 'dens' is no earlier stage; did you mean 'dense'?"
    ]


def test_ids_of_folders_that_are_ours_are_kept() -> None:
    assert faults(TRAIN | {"id": "initial"}) == [
        "stages.initial: this id is kept for the model as it was given; choose another"
    ]
    assert faults(TRAIN | {"id": "int8"}) == ["stages.int8: this id is kept for the quantize stage; choose another"]
    assert make(QUANTIZE | {"id": "int8"}).quantize_stage.id == "int8"


@pytest.mark.parametrize("identifier", ["", "a/b", "..", "-a", "a b", "a\n", "x" * 65, "ä"])
def test_ids_are_safe_as_folder_names(identifier: str) -> None:
    assert len(faults(TRAIN | {"id": identifier})) == 1
    assert len(faults(TRAIN, name=identifier)) == 1


def test_pruning_needs_the_ratio_of_its_method() -> None:
    bare = {"id": "pruned", "kind": "prune"}
    assert faults(bare) == [
        "stages.pruned: method structured needs one of channel_ratio, macs_ratio, params_ratio, latency_ratio, "
        "the share to remove, a fraction between 0 and 1 (or layer_ratios alone)"
    ]
    assert faults(bare | {"channel_ratio": 0.5, "macs_ratio": 0.5}) == [
        "stages.pruned: channel_ratio and macs_ratio are both given; keep one, the share to remove of one thing"
    ]
    assert faults(bare | {"macs_ratio": 40}) == [
        "stages.pruned.macs_ratio: 40 is not a fraction between 0 and 1; did you mean 0.4?"
    ]
    assert faults(bare | {"layer_ratios": {"conv": 0.95}}) == [
        "stages.pruned: layer_ratios: 'conv' loses 0.95, more than max_layer_ratio 0.9 allows; "
        "lower the one or raise the other"
    ]
    assert faults(bare | {"method": "unstructured", "sparsity": 0.5, "channel_ratio": 0.5}) == [
        "stages.pruned: channel_ratio does not belong to method unstructured; use sparsity"
    ]
    assert faults(bare | {"method": "unstructured", "sparsity": 0.5, "importance": "taylor"}) == [
        "stages.pruned: unstructured pruning ranks weights by magnitude (L1); leave importance out"
    ]
    unstructured = bare | {"method": "unstructured"}
    assert faults(unstructured | {"pattern": 124}) == [
        'stages.pruned.pattern: 124 is no pattern; write N:M in quotes, for instance "2:4" (pattern: "2:4")'
    ]
    assert faults(unstructured | {"pattern": "4:4"}) == [
        "stages.pruned.pattern: 4:4 keeps 4 of 4, so nothing is zeroed; for instance 2:4"
    ]
    assert faults(unstructured | {"pattern": "2:4", "sparsity": 0.5}) == [
        "stages.pruned: sparsity and pattern are both given; keep one, a pattern sets the sparsity itself"
    ]
    assert faults(bare | {"channel_ratio": 0.5, "regularization": "l1"}) == [
        "stages.pruned: regularization does not belong to method structured; use it with method unstructured"
    ]
    stage = make(bare | {"method": "unstructured", "sparsity": 0.5}).stages[0]
    assert isinstance(stage, PruneStage)
    assert (stage.sparsity, stage.channel_ratio) == (0.5, None)


def test_rewinding_needs_a_stage_that_trains_before_it() -> None:
    rewound = PRUNE | {"method": "unstructured", "channel_ratio": None, "sparsity": 0.5, "rewind_epoch": 3}
    assert make(TRAIN | {"epochs": 3}, rewound).stages[1].id == "pruned"
    assert faults(TRAIN | {"epochs": 2}, rewound) == [
        "stages.pruned.rewind_epoch: stage dense has 2 epochs; give one of 1 to 2"
    ]
    (fault,) = faults(rewound)
    assert "the stage before it must be train or distill" in fault


def test_weights_have_one_source() -> None:
    model = {"name": "timm/resnet18", "pretrained": True, "checkpoint": "a.pt"}
    assert faults(QUANTIZE, model=model) == ["model: checkpoint and pretrained are both given; keep one"]


def test_seeds_are_what_torch_and_numpy_take() -> None:
    assert make(TRAIN, seed=-1).seed == -1
    assert make(TRAIN, seed=2**63 - 1).seed == 2**63 - 1
    for seed in (2**63, -(2**63) - 1):
        assert faults(TRAIN, seed=seed)[0].startswith("seed: ")
        assert faults(TRAIN, data={"name": "digits", "split_seed": seed})[0].startswith("data.split_seed: ")
