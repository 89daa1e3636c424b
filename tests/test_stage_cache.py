"""The cache of stages: the same stage is computed once, comes back bit for bit, and is never half there."""

from __future__ import annotations

import ast
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import CommandLine
from edgecompress import pipeline
from edgecompress.data.run_data import open_data
from edgecompress.errors import ConfigurationError, RunError
from edgecompress.run_directory import RunDirectory, sha256_of
from edgecompress.settings.configuration import validate
from edgecompress.settings.recipe import Recipe
from edgecompress.stages.train_stages import PreparedSplits
from edgecompress.steps import stage_key
from edgecompress.steps.run_state import record_decision
from edgecompress.steps.stage_cache import StageCache
from edgecompress.steps.training_context import training_context
from edgecompress.training import workers

RECIPE = """
name: small
data: {name: digits}
model: {name: student_cnn, arguments: {width: 16}}
stages:
  - {id: dense, kind: train, epochs: 2, batch_size: 64}
  - {id: pruned, kind: prune, channel_ratio: 0.5, scope: layer, epochs: 1, warmup_epochs: 0,
     teacher: {stage: dense}}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 32}}
gates: {max_accuracy_drop: 0.9, int8_min_top1_agreement: 0.1}
"""


class Applied:
    """Runs the recipe with a cache, each time into a folder of its own, and counts what was trained."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.recipe = folder / "small.yaml"
        self.recipe.write_text(RECIPE)
        self.trained: list[str] = []
        self.count = 0
        from edgecompress.stages import train_stages

        real = train_stages.fit

        def counting(*arguments: Any, **named: Any) -> Any:
            self.trained.append(named["description"])
            return real(*arguments, **named)

        monkeypatch.setattr(train_stages, "fit", counting)

    def __call__(self, *overrides: str) -> dict[str, Any]:
        self.count += 1
        self.trained.clear()
        output = self.folder / f"run{self.count}"
        return pipeline.apply(str(self.recipe), overrides=overrides, output=output, cache=self.cache).manifest

    def files(self, run: int, stages: Sequence[str] = ("dense", "pruned", "int8")) -> dict[str, str]:
        root = self.folder / f"run{run}" / "stages"
        found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        named = {name: sha256_of(path) for name, path in found.items() if name.split("/")[0] in stages}
        return {name: sha for name, sha in named.items() if not name.endswith("result.json")}

    def entries(self) -> list[Path]:
        return sorted(self.cache.glob("*/*/entry.json"))


@pytest.fixture
def applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Applied:
    return Applied(tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_same_stages_come_back_bit_for_bit(applied: Applied, capsys: pytest.CaptureFixture[str]) -> None:
    first = applied()
    assert applied.trained == ["dense", "pruned 1/1"]
    assert len(applied.entries()) == 3
    capsys.readouterr()
    second = applied()
    assert applied.trained == []
    assert applied.files(1) == applied.files(2)
    assert len(applied.files(1)) >= 8
    for before, after in zip(first["stages"], second["stages"], strict=True):
        assert "cache" not in before
        assert after["cache"]["computed_in_seconds"] > 0
        assert {**after, "cache": 0} | {key: before[key] for key in ("seconds", "started_at")} == {**before, "cache": 0}
    assert second["decisions"] == first["decisions"]
    metrics = [(applied.folder / f"run{run}" / "metrics.jsonl").read_text() for run in (1, 2)]
    assert metrics[0] == metrics[1]
    assert f"stage dense: taken from {applied.cache}" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.slow
def test_a_changed_stage_is_computed_and_what_comes_before_it_is_not(applied: Applied) -> None:
    applied()
    changed = applied("stages.pruned.teacher.temperature=2", "gates.max_samples=500")
    assert applied.trained == ["pruned 1/1"]
    assert ["cache" in stage for stage in changed["stages"]] == [True, False, False]
    seeded = applied("seed=1")
    assert applied.trained == ["dense", "pruned 1/1"]
    assert all("cache" not in stage for stage in seeded["stages"])
    applied("data.val_fraction=0.2")
    assert applied.trained == ["dense", "pruned 1/1"]


@pytest.mark.slow
def test_a_damaged_entry_is_computed_again(applied: Applied, capsys: pytest.CaptureFixture[str]) -> None:
    applied()
    entry = next(path for path in applied.entries() if json.loads(path.read_text())["stage"] == "pruned")
    weights = entry.parent / "stage" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # the run's own file is the same one, and stays as it is
    weights.write_bytes(content)
    capsys.readouterr()
    applied()
    assert applied.trained == ["pruned 1/1"]
    assert "damaged (model.safetensors)" in capsys.readouterr().err.replace("\n", " ")
    assert applied.files(1) == applied.files(2)
    applied()
    assert applied.trained == []


def _kept(cache: StageCache, run: RunDirectory, key: str = "ab" * 32) -> str:
    run.write_manifest({"schema_version": 1, "stages": [], "decisions": []})
    (run.stage("dense") / "inner").mkdir(parents=True)
    (run.stage("dense") / "inner" / "weights").write_text("1")
    cache.keep(key, run, "dense", {"accuracy": 1.0}, seconds=1.0)
    return key


def test_an_entry_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, run = StageCache(tmp_path / "cache"), RunDirectory(tmp_path / "run")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("edgecompress.steps.stage_cache.write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _kept(cache, run)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    other = RunDirectory(tmp_path / "other")
    other.write_manifest(run.read_manifest())
    assert cache.restore("ab" * 32, other, "dense") is None
    cache.keep("ab" * 32, run, "dense", {"accuracy": 1.0}, seconds=1.0)
    assert cache.restore("ab" * 32, other, "dense") == {
        "accuracy": 1.0,
        "cache": {"key": "ab" * 32, "computed_in_seconds": 1.0},
    }
    assert (other.stage("dense") / "inner" / "weights").read_text() == "1"


def test_what_an_interrupted_attempt_decided_is_kept_with_the_stage(tmp_path: Path) -> None:
    cache, run, other = StageCache(tmp_path / "cache"), RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "other")
    recipe = validate(Recipe, yaml.safe_load(RECIPE), source="small.yaml")
    data = open_data(recipe.data)
    for one in (run, other):
        one.path.mkdir()
        one.write_manifest({"schema_version": 1, "stages": [], "decisions": []})
    context = training_context(recipe, run, data, PreparedSplits(data, cache=False), None, {"stage": "pruned"})
    context.decide("channels:pruned", lambda: ({"widths": [4]}, "measured"))
    run.update_manifest(lambda m: record_decision(m, "channels:dense", {}, "another stage's", stage="dense"))

    def measured_again() -> Any:
        raise AssertionError

    run.stage("pruned").mkdir(parents=True)  # the second attempt: it finds the decision, and ends
    context.decide("channels:pruned", measured_again)
    cache.keep("ab" * 32, run, "pruned", {"accuracy": 1.0}, seconds=1.0)
    assert cache.restore("ab" * 32, other, "pruned") is not None
    wanted = {"what": "channels:pruned", "value": {"widths": [4]}, "why": "measured", "stage": "pruned"}
    assert other.read_manifest()["decisions"] == [wanted]


def test_the_key_covers_the_code_of_every_room_that_a_stage_computes_with() -> None:
    """What stages, int8, pruning and training import, and what those import in turn."""
    package = Path(stage_key.__file__).parent.parent
    waiting = [path for room in ("stages", "int8", "pruning", "training") for path in (package / room).rglob("*.py")]
    seen = set(waiting)
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("edgecompress."):
                continue
            stem = package.joinpath(*str(node.module).split(".")[1:])
            names = [stem, *(stem / alias.name for alias in node.names)]
            found = {name.with_suffix(".py") for name in names if name.with_suffix(".py").is_file()} - seen
            waiting += found
            seen |= found
    rooms = {path.relative_to(package).parts[0] for path in seen if path.parent != package}
    assert rooms >= {"exporting", "int8", "models", "settings"}
    assert rooms <= set(stage_key._ROOMS)


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    cache, order = StageCache(tmp_path), list[str]()

    def second() -> None:
        with StageCache(tmp_path).alone("key"):
            order.append("second")

    with cache.alone("key"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_a_cache_that_cannot_be_used_is_refused(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    command_line("apply", "prune_kd", "--cache", tmp_path / "file").refusal("--cache", "is no folder")
    with pytest.raises(RunError, match="cannot be written"), StageCache(tmp_path / "file" / "inner").alone("key"):
        pass
    monkeypatch.setattr(workers, "world_size", lambda: 2)
    with pytest.raises(ConfigurationError, match="--cache works with one process"):
        pipeline.apply("prune_kd", cache=tmp_path / "cache")
