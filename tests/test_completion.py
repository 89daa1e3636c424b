"""What the shell completes: asked as bash asks, through the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgecompress.cli import app


@pytest.fixture
def completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for name, recipe in (("first", "prune_kd"), ("second", "qat")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        stages = [{"id": "tuned", "kind": "quantize"}]
        manifest = {"schema_version": 1, "recipe_name": recipe, "status": "complete", "recipe": {"stages": stages}}
        manifest |= {"stages": [], "targets": []}
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(manifest))
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "mine.yaml").write_text("stages: [{id: small, kind: prune}]")

    def ask(line: str) -> list[str]:
        words = f"edgecompress {line}"
        asking = {"_EDGECOMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        result = CliRunner().invoke(app, [], prog_name="edgecompress", env=asking)
        return result.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("reci", ["recipes"]),
        ("run prune_", ["prune_finetune", "prune_kd"]),
        ("apply mi", ["mine.yaml"]),
        ("run prune_kd --target rpi", ["rpi4", "rpi5"]),
        ("bundle --target x86-v", ["x86-vnni"]),
        ("report runs/f", ["runs/first"]),
        ("runs rm runs/", ["runs/first", "runs/no-run/", "runs/second"]),
        ("profile runs/s", ["runs/second"]),
        ("targets show rpi", ["rpi4", "rpi5"]),
        ("recipes show pap", ["paper/distillation_squeezenet", "paper/distillation_studentnet"]),
        ("schema show de", ["debug-int8", "detected-target"]),
        ("apply prune_kd --res", ["--resume"]),
        ("apply prune_kd --set stages.pruned.channel_", ["stages.pruned.channel_ratio="]),
        ("apply --resume prune_kd --set stages.int8.eff", ["stages.int8.effort="]),
        ("apply mine.yaml --set stages.small.channel_", ["stages.small.channel_ratio="]),
        ("apply prune_kd --set data.val", ["data.val_fraction="]),
        ("export runs/first --set stages.tuned.calibration.me", ["stages.tuned.calibration.method="]),
        ("apply nowhere --set stages.int8", []),
    ],
)
def test_words(completed, line: str, expected: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert completed(line)[: len(expected) or 1] == expected


def test_values_of_a_field_that_has_few(completed) -> None:  # type: ignore[no-untyped-def]
    efforts = completed("apply prune_kd --set stages.int8.effort=")
    assert efforts == [f"stages.int8.effort={name}" for name in ("fast", "balanced", "best")]
    assert completed("apply prune_kd --set model.pretrained=") == ["model.pretrained=true", "model.pretrained=false"]
    assert completed("apply prune_kd --set seed=") == []
