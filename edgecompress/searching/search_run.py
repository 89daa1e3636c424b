"""The search: trials one after the other, by this process and any others, until there are enough or the time is spent.

What enters: a recipe's space, a target and what may be lost. What leaves: search.json, search.md and search.html,
true after every trial, and the runs that they name. All that is known lies in the study, so that any worker can write
them, and a search that stops goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecompress import console
from edgecompress.data.run_data import open_data
from edgecompress.errors import ConfigurationError, DataError, RunError, StageError, machine_fault
from edgecompress.run_directory import Json, versioned, write_json, write_text
from edgecompress.searching.front import EarlyRecord, FinishedRecord, hopeless
from edgecompress.searching.latency_table import LatencyTable
from edgecompress.searching.order import (
    DOCUMENT,
    SPREAD,
    SearchOrder,
    earlier_search,
    require_measurable,
    search_key,
    warm_points,
)
from edgecompress.searching.result import SearchTerms, found
from edgecompress.searching.result_text import markdown
from edgecompress.searching.search_page import page
from edgecompress.searching.space import load_space
from edgecompress.searching.study import Attempt, SharedStudy, TrialRecord
from edgecompress.searching.study_storage import FILE, shown_url
from edgecompress.searching.trial import Terms, Trial, TrialStopped, measure_again
from edgecompress.steps.stage_cache import StageCache

_FAILURES = 3  # in a row, before anything is complete: then something is wrong with all of them
_WAIT_SECONDS = 2.0


def search(order: SearchOrder, directory: Path, *, resume: bool, make_trial: type[Trial] = Trial) -> Json:
    """Search, or go on with the search in `directory`; returns the content of search.json.

    `make_trial` is what runs a trial; benchmarks have a cheaper one.

    Raises ConfigurationError, RunError or DataError for what cannot be used, StageError where every trial fails.
    """
    started = _Search(order, directory, resume=resume, make_trial=make_trial)
    try:
        return started.run()
    finally:
        started.study.close()


class _Search:
    def __init__(self, order: SearchOrder, directory: Path, *, resume: bool, make_trial: type[Trial]) -> None:
        self.make_trial = make_trial
        order = order.resolved()
        self.order, self.directory, self.path = order, directory, directory / DOCUMENT
        self.started = time.monotonic()
        self.space = load_space(order.source, order.overrides)
        recipe = self.space.recipe_with(self.space.start(), max_accuracy_drop=order.max_accuracy_drop)
        self.data = open_data(recipe.data)
        self.key = search_key(order, self.space, self.data)
        require_measurable(order)
        warm = warm_points(order, self.space)
        self._claim_directory(resume)
        self.terms = Terms(
            space=self.space,
            directory=directory,
            target=order.target,
            minimize=order.minimize,
            max_accuracy_drop=order.max_accuracy_drop,
            cache=StageCache(order.cache if order.cache is not None else directory / "cache"),
            table=LatencyTable.open(directory / f"layers-{order.target.name}.json", order.target),
            command=order.command,
        )
        url = order.storage or f"sqlite:///{(directory / FILE).absolute()}"
        name = f"{recipe.name}-{self.key[:12]}"
        self.study = SharedStudy(
            url, name, dimensions=self.space.dimensions, seed=recipe.seed, locks=directory / "locks"
        )
        self.warm = warm

    def _claim_directory(self, resume: bool) -> None:
        """Make the folder, or find the same search in it. Nothing is overwritten unasked."""
        if earlier_search(self.directory, self.key, resume=resume) is not None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            begun: Json = {"key": self.key, "status": "running", "trials": [], "front": [], "pick": None}
            write_json(self.path, versioned(begun))
        except OSError as error:
            raise RunError(f"{self.directory}: cannot be written: {error.strerror}; choose another --output") from error

    def tell(self) -> None:
        """Say what is searched, before anything is computed."""
        kind = "by default (declare your own with {search: [low, high]})" if self.space.is_default else "as declared"
        console.note(f"search directory: {self.directory}")
        if self.order.storage is not None:
            console.note(f"study {self.study.name} at {shown_url(self.order.storage)}")
        console.note(f"searched {kind}:")
        for dimension in self.space.dimensions:
            console.note(f"  {dimension.describe()}")
        if self.terms.not_measured_because:
            console.warn(
                f"target {self.order.target.name} is not this machine ({'; '.join(self.terms.not_measured_because)}): "
                "nothing is timed"
                + (", multiply-accumulates stand in for latency" if self.order.minimize == "latency" else "")
            )

    # ---- trials

    def run(self) -> Json:
        self.tell()
        self.study.offer(self.warm[: self.order.trials], "warm")
        self.study.offer(self.space.spread(SPREAD)[: self.order.trials], "spread")
        document = self.write()
        begun = sum(trial["status"] != "running" for trial in document["trials"])
        with console.progress("searching", self.order.trials or begun + 1) as advance:
            advance(begun, self._status(document))
            try:
                while (attempt := self._next()) is not None:
                    self._try(attempt)
                    document = self.write()
                    advance(1, self._status(document))
            except BaseException:
                self.write(status="stopped")
                console.note(
                    f"every finished trial is kept; go on with the same command and: --output {self.directory} --resume"
                )
                raise
        document = self._measured_at_length()
        if document["trials"] and not any(trial["status"] == "complete" for trial in document["trials"]):
            errors = [trial["error"] for trial in document["trials"] if trial["status"] == "failed"]
            raise StageError(f"no trial could be finished; the last one failed: {errors[-1] if errors else 'stopped'}")
        return document

    def _next(self) -> Attempt | None:
        """The next attempt; None where all are over or the time is spent. Waits for other workers' last trials."""
        told = False
        while True:
            if self.order.seconds is not None and time.monotonic() - self.started > self.order.seconds:
                console.note(f"the time ({self.order.seconds:g} s) is spent; no further trial is begun")
                return None
            attempt = self.study.ask(self.order.trials)
            if attempt is not None:
                return attempt
            others = self.study.others_at_work()
            if not others:
                return None
            if not told:
                console.note(f"waiting for {others} trials of other workers (Ctrl-C ends this worker alone)")
                told = True
            time.sleep(_WAIT_SECONDS)

    def _try(self, attempt: Attempt) -> None:
        """Run one attempt to whatever end."""
        words = ", ".join(f"{path}={value}" for path, value in attempt.settings.items())
        console.note(f"trial {attempt.trial}{' (taken over)' if attempt.is_resumed else ''}: {words}")
        trial = self.make_trial(attempt.trial, attempt.settings, self.terms, self._judge(attempt))
        started = time.monotonic()
        try:
            facts = trial.run()
            drop = self._reference(facts) - facts["accuracy"] - self.order.max_accuracy_drop
            if self.study.finish(attempt, facts, values=(facts["accuracy"], facts["cost"]), drop=drop):
                console.note(f"trial {attempt.trial}: {self._words(facts)}")
            else:
                console.warn(f"trial {attempt.trial}: another worker took it over, and its result counts")
        except TrialStopped as stopped:
            facts = {"status": "pruned", "reason": str(stopped), "seconds": time.monotonic() - started}
            run = self.terms.run_of(attempt.trial).path.relative_to(self.directory).as_posix()
            facts |= trial.cost_facts() | {"run": run}
            accuracy, cost = self._estimated(trial.early[-1])
            limit = self._accuracy_limit()
            drop = 0.0 if limit is None else limit - accuracy
            self.study.finish(attempt, facts, values=(accuracy, cost), drop=drop)
            console.note(f"trial {attempt.trial}: given up: {stopped}")
        except (DataError, RunError):
            raise  # what all trials share: the search stops, and this trial goes on when it is mended
        except Exception as error:  # whatever one point runs into must not cost the others
            if (fault := machine_fault(error)) is not None:
                raise fault from error  # as above: a full disk is no fault of this trial
            text = str(error) or type(error).__name__
            name = "" if isinstance(error, StageError | ConfigurationError) else f"{type(error).__name__}: "
            facts = {"seconds": time.monotonic() - started} | trial.cost_facts()
            self.study.fail(attempt, f"{name}{text}", facts)
            console.warn(f"trial {attempt.trial} failed: {name}{text}")
            self._stop_where_all_fail(f"{name}{text}")
        finally:
            self.study.release(attempt)

    def _stop_where_all_fail(self, last: str) -> None:
        statuses = [record.status for record in self.study.records() if record.status != "running"]
        if statuses[-_FAILURES:] == ["failed"] * _FAILURES and "complete" not in statuses:
            raise StageError(f"the first {_FAILURES} trials failed, so the search stops; the last one: {last}")

    def _judge(self, attempt: Attempt) -> Any:
        """Keeps an early record for all workers, and holds it against theirs."""

        def judge(early: EarlyRecord) -> str | None:
            self.study.report(attempt, early.__dict__)
            records = self.study.records()
            return hopeless(
                early,
                _finished(records, early.epochs),
                val_images=len(self.data.splits["val"]),
                accuracy_limit=self._accuracy_limit(records),
            )

        return judge

    def _accuracy_limit(self, records: Sequence[TrialRecord] | None = None) -> float | None:
        """The least accuracy on val that is wanted; None before any trial has told what the baseline reaches."""
        known = [
            record.result["baseline_accuracy"]
            for record in records or self.study.records()
            if record.status == "complete"
        ]
        return max(known) - self.order.max_accuracy_drop if known else None

    def _reference(self, facts: Json) -> float:
        limit = self._accuracy_limit()
        own = float(facts["baseline_accuracy"])
        return own if limit is None else max(own, limit + self.order.max_accuracy_drop)

    def _estimated(self, early: EarlyRecord) -> tuple[float, float]:
        """What a trial that was given up would have come to: so that the sampler learns from it as well."""
        records = self.study.records()
        gains = sorted(other.accuracy - other.early.accuracy for other in _finished(records, early.epochs))
        gain = gains[len(gains) // 2] if gains else 0.0
        complete = [record.result for record in records if record.status == "complete"]
        pairs = [(r["cost"], e.cost) for r, e in ((x, _last_early(x, records)) for x in complete) if e is not None]
        ratios = sorted(real / predicted for real, predicted in pairs if predicted > 0)
        ratio = ratios[len(ratios) // 2] if ratios else 1.0
        return min(1.0, early.accuracy + gain), early.cost * ratio

    # ---- what is known

    def write(self, *, status: str = "running") -> Json:
        """search.json, search.md and search.html from the study; returns the document."""
        records = self.study.records()
        over = all(record.status != "running" for record in records)
        enough = self.order.trials is None or len(records) >= self.order.trials
        terms = SearchTerms(
            directory=self.directory,
            target=self.order.target,
            minimize=self.order.minimize,
            max_accuracy_drop=self.order.max_accuracy_drop,
            not_measured_because=self.terms.not_measured_because,
        )
        document = versioned(
            {
                "key": self.key,
                "status": "complete" if status == "running" and over and enough and records else status,
                "study": self.study.name,
                "storage": shown_url(self.order.storage) if self.order.storage is not None else FILE,
                "recipe": self.order.source,
                "command": self.order.command,
                "target": self.order.target.name,
                "minimize": self.order.minimize,
                "max_accuracy_drop": self.order.max_accuracy_drop,
                "space": [dimension.to_json() for dimension in self.space.dimensions],
                "space_is_default": self.space.is_default,
            }
        )
        document |= found(records, terms)
        write_json(self.path, document)
        write_text(self.directory / "search.md", markdown(document))
        write_text(self.directory / "search.html", page(document))
        return document

    def _status(self, document: Json) -> str:
        pick = next((row for row in document["front"] if row["trial"] == document["pick"]), None)
        best = f", best {pick['accuracy']:.1%} at {pick['cost']:.4g}" if pick is not None else ""
        return f"{len(document['front'])} on the front{best}"

    def _words(self, facts: Json) -> str:
        latency = facts["latency_ms_p50"]
        timed = "" if latency is None else f", {latency:.4g} ms"
        size = f"{facts['size_bytes'] / 1e3:.4g} kB, {facts['macs'] / 1e6:.4g} M MACs"
        return f"{facts['accuracy']:.2%} on val{timed}, {size}"

    def _measured_at_length(self) -> Json:
        """The pick's own figures come from a full measurement; where that changes the pick, the next one's as well.

        A pick measured slower at length may bring a trial onto the front that was not there, so it goes on until the
        pick is one that was measured at length: each round measures one trial, and none twice.
        """
        document = self.write()
        if self.terms.not_measured_because:
            return document
        while True:
            pick = document["pick"]
            record = next((record for record in self.study.records() if record.id == pick), None)
            if record is None or record.result["thoroughness"] != "quick":
                break
            if not (self.directory / record.result["run"] / "run.json").is_file():
                break
            self.study.amend(record.id, measure_again(self.terms, record.id, record.result))
            document = self.write()
        return document


def _finished(records: Sequence[TrialRecord], epochs: int) -> list[FinishedRecord]:
    """Finished trials as they were after so many epochs."""
    return [
        FinishedRecord(EarlyRecord(**early), float(record.result["accuracy"]))
        for record in records
        if record.status == "complete"
        for early in record.early
        if early["epochs"] == epochs
    ]


def _last_early(result: Json, records: Sequence[TrialRecord]) -> EarlyRecord | None:
    record = next(record for record in records if record.result is result)
    return EarlyRecord(**record.early[-1]) if record.early else None
