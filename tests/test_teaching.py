"""The teacher block of the recipe, through the stages that take it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from conftest import CommandLine
from edgecompress.errors import ConfigurationError
from edgecompress.models.checkpoint import Checkpoint, example_input
from edgecompress.models.model_building import build
from edgecompress.models.nets import resnet8
from edgecompress.settings.recipe import TrainingSettings, load_recipe
from edgecompress.settings.teacher_settings import TeacherSettings
from edgecompress.training.teaching import teaching_loss
from edgecompress.training.training_loop import fit
from edgecompress.training.training_state import PhaseState, Progress
from small_models import digits_data, small_architecture

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
    safetensors.torch.save_file(resnet8(7, 1, width=8, input_size=8).state_dict(), other)
    model = NET | {"checkpoint": str(other)}
    answer = command_line("apply", _recipe(tmp_path, _distilled(stage=None, model=model)), "--output", "run")
    assert answer.exit_code == 2
    assert "7" in answer.stderr
    assert "class" in answer.stderr


class _CrashError(Exception):
    """Stands for a crash: raised between two steps."""


@pytest.mark.slow
def test_a_teacher_of_other_channels_is_refused_before_it_is_trained(tmp_path: Path, command_line: CommandLine) -> None:
    rgb = {"name": "resnet8", "arguments": {"width": 8}, "preprocessing": {"channels": 3}}
    path = _recipe(tmp_path, _distilled())
    document = json.loads(path.read_text()) | {"model": rgb}
    path.write_text(json.dumps(document))
    for more in ((), ("--dry-run",)):
        answer = command_line("apply", path, *INTO, *more)
        assert answer.exit_code == 2
        error = json.loads(answer.stdout)["error"]
        assert "stage student: the teacher reads 3 channels and the student 1; set the student's" in error
        assert "model.preprocessing.channels: 3" in error
    assert not list((tmp_path / "run").glob("stages/teacher/*")), "said before the teacher was trained"
    document["stages"][1]["model"]["preprocessing"] = {"channels": 3}
    path.write_text(json.dumps(document))
    answer = command_line("apply", path, "--output", "mended")
    assert answer.exit_code in (0, 3), answer.stderr  # whether int8 is the faster one here does not matter
    stored = json.loads((tmp_path / "mended/stages/student/model.json").read_text())["architecture"]
    assert stored["preprocessing"]["channels"] == 3
    assert len(stored["preprocessing"]["mean"]) == 3


def test_a_distillation_that_crashed_goes_on_to_identical_weights_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgecompress.training.training_loop._SECONDS_BETWEEN_SAVES", 0.0)
    architecture = small_architecture()
    splits = {
        name: split.prepare(architecture.preprocessing, cache=True) for name, split in digits_data().splits.items()
    }
    settings = TrainingSettings(epochs=2, batch_size=256)
    torch.manual_seed(1)
    teacher = Checkpoint(build(small_architecture(width=16)).eval(), small_architecture(width=16))

    def train(state: PhaseState | None, crash_after: int | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student = Checkpoint(build(architecture), architecture)
        loss = teaching_loss(
            settings,
            TeacherSettings(stage="teacher", method="feature"),
            [teacher],
            student,
            train=splits["train"],
            precision="fp32",
            seed=0,
        )
        torch.randn(7 if state else 3)  # what was drawn before must not matter
        steps = 0

        def after_step() -> None:
            nonlocal steps
            steps += 1
            if steps == crash_after:
                raise _CrashError

        with loss.watching(student.module, example_input(architecture)):
            fit(
                student.module,
                settings=settings,
                epochs=2,
                loss=loss,
                train=splits["train"],
                val=splits["val"],
                preprocessing=architecture.preprocessing,
                precision="fp32",
                seed=0,
                description="test",
                after_step=after_step,
                state=state,
            )
        return {**student.module.state_dict(), **loss.state_dict()}

    whole, state = train(None), Progress(tmp_path).phase("test")
    with pytest.raises(_CrashError):
        train(state, crash_after=7)
    resumed = train(state)
    assert sum("adapters" in name for name in whole) == 6
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
