"""The search's loop with trials that only pretend: order, resuming, failures, giving up, budgets, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edgecompress.errors import RunError, StageError
from edgecompress.run_directory import write_json
from edgecompress.searching.front import EarlyRecord
from edgecompress.searching.order import SearchOrder
from edgecompress.searching.plan_search import search_plan
from edgecompress.searching.result_text import lines
from edgecompress.searching.search_run import search
from edgecompress.searching.trial import Terms, Trial, TrialStopped
from edgecompress.settings.target import load_target

RECIPE = """
name: small
data: {name: digits}
model: {name: student_cnn}
stages:
  - {id: dense, kind: train, epochs: 2}
  - {id: pruned, kind: prune, channel_ratio: {search: [0.1, 0.9]}, epochs: 4}
"""


class Pretended(Trial):
    """Accuracy falls with the square of what is cut, latency in proportion; `hook` may spoil it."""

    ran: ClassVar[list[tuple[int, float]]] = []
    hook: ClassVar[Callable[[Trial], None]] = staticmethod(lambda trial: None)

    def run(self) -> dict[str, Any]:
        ratio = self.settings["stages.pruned.channel_ratio"]
        self.ran.append((self.number, ratio))
        run = self.terms.run_of(self.number)
        write_json(run.manifest_path, {"schema_version": 1, "stages": [], "status": "complete"})
        accuracy, latency = 0.9 - 0.3 * ratio**2, 1.0 - ratio
        if self.number < 3:
            self.early.append(EarlyRecord(self.number, 2, accuracy - 0.1, latency))
            assert self.judge(self.early[0]) is None
        type(self).hook(self)
        times = {f"p{percentile}": latency for percentile in (50, 90, 99)}
        intervals = {f"p{percentile}_ci95": [latency, latency] for percentile in (50, 90, 99)}
        model = {"latency_ms": times | intervals, "size_bytes": 1000, "peak_rss_bytes": 5000}
        for name in ("load_ms", "first_inference_ms", "cold_start_ms"):
            model |= {name: 1.0, f"{name}_range": [1.0, 1.0]}
        model["peak_rss_bytes_range"] = [5000, 5000]
        write_json(
            run.profile_path(self.terms.target.name),
            {
                "measured": True,
                "models": {"int8": model},
                "int8_speedup": {"ratio": 2.0, "ci95": [1.9, 2.1]},
                "noise": {},
                "notes": [],
            },
        )
        facts = {"accuracy": accuracy, "accuracy_split": "val", "accuracy_ci95": [0.0, 1.0], "baseline_accuracy": 0.9}
        facts |= {"reported_accuracy": accuracy, "reported_baseline_accuracy": 0.9, "reported_split": "test"}
        facts |= {"latency_ms_p50": latency, "size_bytes": 1000, "peak_rss_bytes": 5000, "macs": 10, "params": 5}
        facts |= {"predicted_latency_ms": latency, "thoroughness": "standard", "cost": latency, "seconds": 1.0}
        return {"status": "complete", **facts, "run": self._relative(run), **self.cost_facts()}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    class Own(Pretended):
        ran: ClassVar[list[tuple[int, float]]] = []

    return Own


@pytest.fixture
def order(tmp_path: Path) -> SearchOrder:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return SearchOrder(
        source=str(tmp_path / "small.yaml"),
        overrides=(),
        target=load_target("x86"),
        max_accuracy_drop=0.05,
        minimize="latency",
        trials=5,
        seconds=None,
        storage=None,
        cache=None,
        warm_starts=(),
        command="edgecompress search",
    )


def _document(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "search.json").read_text()))


def test_the_front_the_pick_and_what_is_written(order: SearchOrder, tmp_path: Path, pretended: type[Pretended]) -> None:
    document = search(order, tmp_path / "s", resume=False, make_trial=pretended)
    assert document == _document(tmp_path / "s")
    assert document["status"] == "complete"
    assert [trial["id"] for trial in document["trials"]] == [0, 1, 2, 3, 4]
    assert {trial["status"] for trial in document["trials"]} == {"complete"}
    costs = [row["latency_ms_p50"] for row in document["front"]]
    assert costs == sorted(costs)
    assert len(costs) == 5
    for row in document["front"]:
        assert (tmp_path / "s" / row["run"] / "run.json").is_file()
        assert {"trial", "run", "accuracy", "latency_ms_p50", "size_bytes"} <= row.keys()
    # 0.3 * ratio**2 <= 0.05 holds up to 0.408: of 0.5, 0.18, 0.34, 0.66 and 0.82 that is 0.34.
    chosen = next(row for row in document["front"] if row["trial"] == document["pick"])
    assert chosen["settings"]["stages.pruned.channel_ratio"] == 0.34
    assert next(row["trial"] for row in document["front"] if not row["missed"]) == document["pick"]
    assert "least latency" in document["reason"]
    assert document["proxies"]["predicted_latency"] == {"rank_correlation": pytest.approx(1.0), "trials": 5}
    text = (tmp_path / "s" / "search.md").read_text()
    assert f"| {document['pick']} | complete |" in text
    assert any("<- pick" in line for line in lines(document))
    assert f"{document['pick']}, the pick" in (tmp_path / "s" / "search.html").read_text()


def test_the_pick_is_measured_at_length_even_where_it_was_not_on_the_front(
    order: SearchOrder, tmp_path: Path, pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quick(pretended):  # type: ignore[valid-type, misc]
        """The second trial is dominated, until the first turns out to be slower than its quick measurement said."""

        def run(self) -> dict[str, Any]:
            accuracy, latency = ((0.90, 0.4), (0.88, 0.5))[self.number]
            facts: dict[str, Any] = super().run()
            return facts | {"accuracy": accuracy, "latency_ms_p50": latency, "cost": latency, "thoroughness": "quick"}

    measured: list[int] = []

    def measured_again(terms: Terms, trial: int, facts: dict[str, Any]) -> dict[str, Any]:
        measured.append(trial)
        latency = facts["latency_ms_p50"] * (1.5 if trial == 0 else 1.0)
        return facts | {"latency_ms_p50": latency, "cost": latency, "thoroughness": "standard"}

    monkeypatch.setattr("edgecompress.searching.search_run.measure_again", measured_again)
    document = search(replace(order, trials=2), tmp_path / "s", resume=False, make_trial=Quick)
    assert [row["trial"] for row in document["front"]] == [1, 0]
    assert document["pick"] == 1
    assert measured == [0, 1]
    assert document["front"][0]["thoroughness"] == "standard"


def test_interrupted_and_resumed_nothing_is_lost_or_repeated(
    order: SearchOrder, tmp_path: Path, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(trial: Trial) -> None:
        if trial.number == 2:
            raise KeyboardInterrupt

    pretended.hook = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(order, tmp_path / "s", resume=False, make_trial=pretended)
    document = _document(tmp_path / "s")
    assert document["status"] == "stopped"
    assert [trial["status"] for trial in document["trials"]] == ["complete", "complete", "running"]
    assert "--resume" in capsys.readouterr().err
    before = list(pretended.ran)
    pretended.hook = staticmethod(lambda trial: None)
    with pytest.raises(RunError, match="a search is there; go on with --resume"):
        search(order, tmp_path / "s", resume=False, make_trial=pretended)
    document = search(order, tmp_path / "s", resume=True, make_trial=pretended)
    again = pretended.ran[len(before) :]
    assert sorted(number for number, _ in again) == [2, 3, 4]
    assert dict(again)[2] == dict(before)[2], "the interrupted trial goes on with its own settings"
    assert [trial["status"] for trial in document["trials"]] == ["complete"] * 5
    plan = search_plan(replace(order, trials=6), tmp_path / "s", resume=True)
    assert (plan["search"]["trials_done"], plan["search"]["trials"]) == (5, 6)
    rows = {row["step"]: row for row in plan["steps"]}
    assert (rows["dense"]["done"], rows["dense"]["seconds"], rows["pruned"]["times"]) == (True, 0.0, 1)
    count = len(pretended.ran)
    assert search(order, tmp_path / "s", resume=True, make_trial=pretended)["trials"] == document["trials"]
    assert len(pretended.ran) == count
    more = search(replace(order, trials=6), tmp_path / "s", resume=True, make_trial=pretended)
    assert len(pretended.ran) == count + 1
    assert more["trials"][:5] == document["trials"]
    with pytest.raises(RunError, match="another recipe, data, target or limit"):
        search(replace(order, max_accuracy_drop=0.2), tmp_path / "s", resume=True, make_trial=pretended)


def test_a_failed_trial_costs_no_other(order: SearchOrder, tmp_path: Path, pretended: type[Pretended]) -> None:
    def fail(trial: Trial) -> None:
        if trial.number == 1:
            raise RuntimeError("no memory for this one")

    pretended.hook = staticmethod(fail)
    document = search(order, tmp_path / "s", resume=False, make_trial=pretended)
    assert [trial["status"] for trial in document["trials"]] == ["complete", "failed", *["complete"] * 3]
    assert document["trials"][1]["error"] == "RuntimeError: no memory for this one"
    assert document["spent"]["failed"] == 1


def test_where_all_fail_the_search_stops(order: SearchOrder, tmp_path: Path, pretended: type[Pretended]) -> None:
    def fail(trial: Trial) -> None:
        raise StageError("nothing works")

    pretended.hook = staticmethod(fail)
    with pytest.raises(StageError, match=r"the first 3 trials failed.*nothing works"):
        search(order, tmp_path / "s", resume=False, make_trial=pretended)
    assert len(pretended.ran) == 3


def test_a_hopeless_trial_is_given_up_and_the_sampler_learns_from_it(
    order: SearchOrder, tmp_path: Path, pretended: type[Pretended]
) -> None:
    class Worse(pretended):  # type: ignore[valid-type,misc]
        def run(self) -> dict[str, Any]:
            if self.number == 3:
                record = EarlyRecord(self.number, 2, 0.2, 2.0)  # dearer and far less accurate than the others
                self.early.append(record)
                reason = self.judge(record)
                assert reason is not None
                raise TrialStopped(reason)
            return dict(super().run())

    document = search(order, tmp_path / "s", resume=False, make_trial=Worse)
    trial = document["trials"][3]
    assert trial["status"] == "pruned"
    assert "no higher predicted cost" in trial["reason"]
    assert trial["early"][0]["accuracy"] == 0.2
    assert 3 not in [row["trial"] for row in document["front"]]


def test_budgets_that_cannot_be_met_name_the_nearest(
    order: SearchOrder, tmp_path: Path, pretended: type[Pretended]
) -> None:
    target = load_target("x86")
    budgets = target.budgets.model_copy(update={"latency_ms_p50": 0.05})
    tight = replace(order, target=target.model_copy(update={"budgets": budgets}))
    document = search(tight, tmp_path / "s", resume=False, make_trial=pretended)
    assert document["pick"] is None
    assert "None of the 5 points" in document["reason"]
    assert len(document["nearest"]) == 3
    gives = [sentence for point in document["nearest"] for sentence in point["would_have_to_give"]]
    assert any("0.05" in sentence for sentence in gives)
    assert any(line.startswith("Nearest: trial") for line in lines(document))


def test_earlier_points_are_tried_first(
    order: SearchOrder, tmp_path: Path, pretended: type[Pretended], capsys: pytest.CaptureFixture[str]
) -> None:
    first = search(order, tmp_path / "s", resume=False, make_trial=pretended)
    pretended.ran.clear()
    warm = replace(order, warm_starts=(tmp_path / "s",), trials=3, max_accuracy_drop=0.02)
    search(warm, tmp_path / "t", resume=False, make_trial=pretended)
    front = [row["settings"]["stages.pruned.channel_ratio"] for row in first["front"]]
    assert {ratio for _, ratio in pretended.ran} <= set(front)
    assert "5 of 5 points fit this space" in capsys.readouterr().err.replace("\n", " ")


def test_no_trial_begins_when_the_time_is_spent(order: SearchOrder, tmp_path: Path, pretended: type[Pretended]) -> None:
    with pytest.raises(RunError, match="exists and holds no search"):
        search(order, tmp_path, resume=False, make_trial=pretended)
    document = search(replace(order, trials=None, seconds=1e-9), tmp_path / "s", resume=False, make_trial=pretended)
    assert pretended.ran == []
    assert (document["trials"], document["pick"]) == ([], None)
