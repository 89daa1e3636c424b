"""The teacher block of the recipe, through the stages that take it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch

from conftest import CommandLine
from edgecompress.errors import ConfigurationError
from edgecompress.recipe import load_recipe

TEACHER = {"kind": "train", "id": "teacher", "epochs": 1, "warmup_epochs": 0, "batch_size": 128}
INT8 = {"kind": "quantize", "id": "int8", "placement": "full", "effort": "fast"}
INTO = ("--output", "run", "--json")
NET = {"name": "resnet8", "arguments": {"width": 8}}


def _recipe(tmp_path: Path, *stages: dict[str, object]) -> Path:
    document = {"data": {"name": "digits"}, "model": NET, "stages": [TEACHER, *stages], "precision": "fp32"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document | {"gates": {"max_accuracy_drop": 1.0}}), encoding="utf-8")
    return path


def _distilled(**teacher: object) -> dict[str, object]:
    student = {"name": "student_cnn", "arguments": {"width": 8}}
    chosen = {"stage": "teacher"} | teacher
    return {"kind": "distill", "id": "student", "model": student, "epochs": 2, "warmup_epochs": 0} | {"teacher": chosen}


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        ({"layers": {"a": "b"}}, "layers: for method feature, and method is kd"),
        ({"method": "kd", "nontarget_weight": 2.0}, "nontarget_weight: for method dkd, and method is kd"),
        ({"method": "dkd", "target_weight": 0, "nontarget_weight": 0}, "the teacher would teach nothing"),
        ({"method": "dk"}, "did you mean 'dkd'"),
        ({"method": "feature", "view": "clean"}, "method feature needs the teacher's layers for every batch"),
        ({"stage": "techer"}, "teacher.stage: 'techer' is no earlier stage; did you mean 'teacher'"),
        ({"stage": None}, "give one of stage"),
        ({"stage": None, "ensemble": [{"stage": "teacher"}]}, "one teacher is no ensemble"),
        (
            {"stage": None, "ensemble": [{"stage": "teacher"}, {"stage": "techer"}]},
            "teacher.ensemble.1.stage: 'techer' is no earlier stage",
        ),
        (
            {"stage": None, "method": "feature", "ensemble": [{"stage": "teacher"}, {"stage": "teacher"}]},
            "reads the layers of one teacher",
        ),
    ],
)
def test_faults_of_the_block_are_named(tmp_path: Path, teacher: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(str(_recipe(tmp_path, _distilled(**teacher))))
    assert fault in str(caught.value)


def test_mixed_images_have_no_clean_view(tmp_path: Path) -> None:
    stage = _distilled(view="clean") | {"augment": {"mixup_alpha": 0.2}}
    with pytest.raises(ConfigurationError, match=r"teacher\.view: mixed images have no clean view"):
        load_recipe(str(_recipe(tmp_path, stage)))


def test_an_int8_graph_has_no_layers_to_match(tmp_path: Path) -> None:
    stage = {"kind": "qat", "id": "int8", "teacher": {"stage": "teacher", "method": "feature"}}
    with pytest.raises(ConfigurationError, match=r"teacher\.method: an int8 graph"):
        load_recipe(str(_recipe(tmp_path, stage)))


def test_method_may_stand_in_the_distill_stage(tmp_path: Path) -> None:
    recipe = load_recipe(str(_recipe(tmp_path, _distilled() | {"method": "dkd"})))
    stage = recipe.stages[1]
    assert stage.teacher.method == "dkd"  # type: ignore[union-attr]
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(ConfigurationError, match=r"method is dkd and teacher\.method is kd"):
        load_recipe(str(_recipe(tmp_path, _distilled(method="kd") | {"method": "dkd"})))


@pytest.mark.slow
def test_every_method_teaches_a_student_and_adapters_do_not_leave_with_it(
    tmp_path: Path, command_line: CommandLine
) -> None:
    blocks: dict[str, dict[str, object]] = {
        "kd": {},
        "dkd": {"method": "dkd"},
        "relation": {"method": "relation"},
        "feature": {"method": "feature"},
        "both": {"stage": None, "ensemble": [{"stage": "teacher"}, {"stage": "kd"}]},
    }
    stages = [_distilled(**block) | {"id": name} for name, block in blocks.items()]
    pruned = {"kind": "prune", "id": "pruned", "channel_ratio": 0.5, "steps": 2, "epochs": 1, "warmup_epochs": 0}
    pruned |= {"channel_multiple": 1, "teacher": {"stage": "teacher", "method": "feature"}}
    answer = command_line("apply", _recipe(tmp_path, *stages, pruned, INT8), *INTO)
    assert answer.exit_code == 0, answer
    summaries = {stage["id"]: stage.get("summary", "") for stage in json.loads(answer.stdout)["stages"]}
    assert "logits were kept: one pass" in summaries["kd"]
    assert "(dkd," in summaries["dkd"]
    assert "stage teacher and stage kd" in summaries["both"]
    assert "layers " in summaries["feature"]
    assert "each batch as the student did" in summaries["feature"]
    assert "layers " in summaries["pruned"]
    names = [
        set(safetensors.torch.load_file(tmp_path / "run" / "stages" / name / "model.safetensors"))
        for name in ("kd", "feature")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_with_augmentation_the_teacher_sees_the_students_view(tmp_path: Path, command_line: CommandLine) -> None:
    shifted = {"augment": {"shift_pixels": 1}}
    stages = [_distilled() | shifted, _distilled(view="clean") | shifted | {"id": "clean"}]
    mixed = {"augment": {"mixup_alpha": 0.2}}
    stages += [_distilled(method="dkd") | mixed | {"id": "mixed"}]
    answer = command_line("apply", _recipe(tmp_path, *stages, INT8), *INTO)
    assert answer.exit_code == 0, answer
    summaries = {stage["id"]: stage.get("summary", "") for stage in json.loads(answer.stdout)["stages"]}
    assert "each batch as the student did" in summaries["student"]
    assert "logits were kept" in summaries["clean"]
    assert "each batch as the student did" in summaries["mixed"]


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, command_line: CommandLine) -> None:
    other = tmp_path / "other.safetensors"
    from edgecompress.nets import resnet8

    safetensors.torch.save_file(resnet8(7, 1, width=8, input_size=8).state_dict(), other)
    model = NET | {"checkpoint": str(other)}
    answer = command_line("apply", _recipe(tmp_path, _distilled(stage=None, model=model)), "--output", "run")
    assert answer.exit_code == 2
    assert "7" in answer.stderr
    assert "class" in answer.stderr
