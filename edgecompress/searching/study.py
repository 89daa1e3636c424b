"""The trials of a search as all of its workers see them: an Optuna study in a file or in a database.

What enters: a space and a storage. What leaves: attempts, one at a time, and what became of every trial. A worker that
dies leaves an attempt without an end; another worker (or the same command, later) takes the trial over in a new attempt
of the same trial, in the same folder. A lock file that the system releases with the process says whether a worker
still lives; where workers share no folder, a beat that it writes into the storage does. Whatever only one worker may do
carries a claim, and of two attempts with the same claim the one that was numbered first counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from edgecompress.run_directory import Json
from edgecompress.searching.sampler import FrontSampler
from edgecompress.searching.study_storage import StudyStorage
from edgecompress.searching.worker_signs import BEAT_SECONDS, WorkerSigns
from edgecompress.settings.search_space import Dimension, label
from edgecompress.threads import start_thread

CONSTRAINT = "max_accuracy_drop"
_STARTUP_TRIALS = 6  # finished trials before the sampler models them
_TOKENS = 4  # significant digits of a number that is tried
# What an attempt carries: the trial it belongs to, its claim, its result, why it failed or does not count, its beat.
_TRIAL, _CLAIM, _RESULT, _FAILURE, _IGNORED, _BEAT, _EARLY = (
    *("trial", "claim", "result", "failure", "ignored", "beat", "early"),
)
_AMENDED = "amended"  # of the study, as an ended attempt cannot be changed
Status = Literal["waiting", "running", "complete", "pruned", "failed"]


@dataclass
class Attempt:
    """One worker's work on one trial, until `SharedStudy.finish`."""

    trial: int
    settings: dict[str, Any]
    handle: optuna.Trial
    is_resumed: bool
    stop_beating: threading.Event = field(default_factory=threading.Event)
    lock: TextIO | None = None


@dataclass(frozen=True)
class TrialRecord:
    """What is known of one trial over all of its attempts. `result` is what its worker told."""

    id: int
    status: Status
    settings: dict[str, Any]
    result: Json
    error: str | None
    early: tuple[Json, ...]
    attempts: int


class SharedStudy:
    """A study, by this worker. Every method that reaches the storage raises RunError where it does not answer."""

    def __init__(self, url: str, name: str, *, dimensions: Sequence[Dimension], seed: int, locks: Path) -> None:
        self.dimensions, self.seed, self.name = dimensions, seed, name
        self.signs = WorkerSigns(locks)
        try:
            self._storage = StudyStorage(url, name)
        except BaseException:
            self.signs.close()
            raise
        self._study, self._reaching = self._storage.study, self._storage.reaching

    def close(self) -> None:
        """Let go of the storage."""
        self.signs.close()
        self._storage.close()

    # ---- beginning

    def offer(self, points: Sequence[Mapping[str, Any]], kind: str) -> None:
        """Points to try first, each once whoever offers it."""
        with self._reaching():
            known = {attempt.user_attrs.get(_CLAIM) for attempt in self._attempts()}
            for number, point in enumerate(points):
                claim = f"{kind} {number}"
                if claim not in known:
                    self._study.enqueue_trial(self._stored(point), user_attrs={_CLAIM: claim})

    def ask(self, limit: int | None) -> Attempt | None:
        """The next attempt, or None where `limit` trials have begun and none waits to be taken over."""
        with self._reaching():
            while True:
                self._take_over()
                attempts = self._attempts()
                begun = [a for a in attempts if a.state != TrialState.WAITING and a.number == _trial_of(a)]
                waits = [a for a in attempts if a.state == TrialState.WAITING and _TRIAL in a.user_attrs]
                if limit is not None and len(begun) >= limit and not waits:
                    return None
                attempt = self._begin(limit)
                if attempt is not None:
                    return attempt

    def _begin(self, limit: int | None) -> Attempt | None:
        """Ask for one; None where another worker turned out to be first."""
        self._study.sampler = self._sampler()
        handle = self._study.ask()
        lock = self.signs.hold(str(handle.number))
        attempts = self._attempts()
        own = next(a for a in attempts if a.number == handle.number)
        claim, trial = own.user_attrs.get(_CLAIM), _trial_of(own)
        begun = [a.number for a in attempts if a.number == _trial_of(a) and a.state != TrialState.WAITING]
        others = [a for a in attempts if claim is not None and a.user_attrs.get(_CLAIM) == claim]
        reason = None
        if any(other.number < own.number for other in others):
            reason = "another worker made this claim first"
        elif trial == own.number and limit is not None and sorted(begun).index(own.number) >= limit:
            reason = "beyond the number of trials"
        elif trial != own.number and self._status([a for a in attempts if _trial_of(a) == trial])[0] != "running":
            reason = "the trial is over"
        if reason is not None:
            handle.set_user_attr(_IGNORED, reason)
            self._study.tell(handle, state=TrialState.FAIL)
            _close(lock)
            return None
        settings = {d.path: self._suggest(handle, d) for d in self.dimensions}
        attempt = Attempt(trial, settings, handle, is_resumed=trial != handle.number, lock=lock)
        if not self._storage.is_file:  # whoever uses the file shares the folder, and with it the locks
            start_thread(self._beat, attempt)
        return attempt

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """A model of what was found, once there is something to model; before that random points.

        Made anew for every attempt and seeded by their number, so that a search that goes
        on draws no old points; workers that ask at the same time must not draw the same one.
        """
        attempts = self._study.get_trials(deepcopy=False)
        is_shared = any(attempt.state == TrialState.RUNNING for attempt in attempts)
        own = f"{socket.gethostname()} {os.getpid()}" if is_shared else ""
        return FrontSampler(
            {dimension.path: distribution_of(dimension) for dimension in self.dimensions},
            seed=_mixed(self.seed, len(attempts), own),
            startup=_STARTUP_TRIALS,
            constraint=CONSTRAINT,
        )

    def _suggest(self, handle: optuna.Trial, dimension: Dimension) -> Any:
        if dimension.choices:
            labels = [label(choice) for choice in dimension.choices]
            return dimension.choices[labels.index(handle.suggest_categorical(dimension.path, labels))]
        distribution = distribution_of(dimension)
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        if isinstance(distribution, IntDistribution):
            low, high, log, step = distribution.low, distribution.high, distribution.log, distribution.step
            return handle.suggest_int(dimension.path, low, high, log=log, step=step)
        chosen = handle.suggest_float(
            dimension.path, distribution.low, distribution.high, log=distribution.log, step=distribution.step
        )
        rounded = float(f"{chosen:.{_TOKENS}g}")
        return min(max(rounded, distribution.low), distribution.high)

    def _stored(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """A point, or part of one, in the storage's words."""
        return {
            d.path: label(point[d.path]) if d.choices else point[d.path] for d in self.dimensions if d.path in point
        }

    # ---- ending

    def report(self, attempt: Attempt, early: Json) -> None:
        """Keep what is known of an attempt in the middle of its training, for other trials to be compared with."""
        with self._reaching(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            attempt.handle.set_user_attr(f"{_EARLY}:{early['epochs']}", early)

    def finish(self, attempt: Attempt, result: Json, *, values: tuple[float, float], drop: float) -> bool:
        """A trial that is complete, or pruned with `values` estimated; `drop` is the accuracy lost beyond the limit.

        False where another worker, which took this one for dead, has the trial now.
        """
        return self._end(attempt, {_RESULT: result | {"values": list(values)}}, drop=drop, values=values)

    def fail(self, attempt: Attempt, error: str, result: Json) -> bool:
        """A trial that could not be finished, and why; False as in `finish`."""
        return self._end(attempt, {_RESULT: result, _FAILURE: error}, state=TrialState.FAIL)

    def _end(self, attempt: Attempt, facts: Json, *, drop: float | None = None, **outcome: Any) -> bool:
        try:
            with self._reaching():
                if drop is not None:
                    attempt.handle.set_constraint(CONSTRAINT, drop)
                for key, value in facts.items():
                    attempt.handle.set_user_attr(key, value)
                self._study.tell(attempt.handle, **outcome)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        except ValueError:  # ended by another worker, in the moment between the result and the end
            if any(a.number == attempt.handle.number and a.state == TrialState.RUNNING for a in self._attempts()):
                raise
        finally:
            self.release(attempt)
        return True

    def release(self, attempt: Attempt) -> None:
        """Let go of an attempt; one that has not ended can be taken over from now on."""
        attempt.stop_beating.set()
        _close(attempt.lock)
        attempt.lock = None

    def amend(self, trial: int, result: Json) -> None:
        """Put better figures of a finished trial beside those that it ended with."""
        with self._reaching():
            self._study.set_user_attr(f"{_AMENDED}:{trial}", result)

    # ---- looking

    def records(self) -> list[TrialRecord]:
        """Every trial that has begun, in the order of their numbers."""
        with self._reaching():
            attempts, amended = self._attempts(), self._study.user_attrs
        groups: dict[int, list[FrozenTrial]] = {}
        for attempt in attempts:
            if attempt.state != TrialState.WAITING or _TRIAL in attempt.user_attrs:
                groups.setdefault(_trial_of(attempt), []).append(attempt)
        return [
            self._record(trial, group, amended.get(f"{_AMENDED}:{trial}")) for trial, group in sorted(groups.items())
        ]

    def others_at_work(self, own: Attempt | None = None) -> int:
        """How many trials are neither over nor this worker's."""
        running = [record for record in self.records() if record.status == "running"]
        return len([record for record in running if own is None or record.id != own.trial])

    def _attempts(self) -> list[FrozenTrial]:
        """Every attempt that counts."""
        attempts = self._study.get_trials(deepcopy=False)
        return [attempt for attempt in attempts if _IGNORED not in attempt.user_attrs]

    def _status(self, group: Sequence[FrozenTrial]) -> tuple[Status, FrozenTrial]:
        """What became of a trial, and the attempt that says so."""
        for attempt in group:
            if _FAILURE in attempt.user_attrs:
                return "failed", attempt
            if _RESULT in attempt.user_attrs:
                status: Status = attempt.user_attrs[_RESULT]["status"]
                return status, attempt
        return "running", group[-1]

    def _record(self, trial: int, group: Sequence[FrozenTrial], amended: Json | None) -> TrialRecord:
        status, attempt = self._status(group)
        early: dict[int, Json] = {}
        for one in group:
            found = [value for key, value in one.user_attrs.items() if key.startswith(f"{_EARLY}:")]
            early |= {int(value["epochs"]): value for value in found}
        params = max((one.params for one in group), key=len)
        settings: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.path in params:
                settings[dimension.path] = _value_of(dimension, params[dimension.path])
        return TrialRecord(
            id=trial,
            status=status,
            settings=settings,
            result=amended or dict(attempt.user_attrs.get(_RESULT, {})),
            error=attempt.user_attrs.get(_FAILURE),
            early=tuple(early[epochs] for epochs in sorted(early)),
            attempts=len(group),
        )

    # ---- taking over

    def _take_over(self) -> None:
        """End the attempts of workers that died, and put their trials up again."""
        attempts = self._attempts()
        for attempt in attempts:
            if attempt.state == TrialState.RUNNING and self._is_abandoned(attempt):
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    result = attempt.user_attrs.get(_RESULT)
                    if result is not None and "values" in result:  # it died between its result and its end
                        self._study.tell(attempt.number, values=result["values"])
                    else:
                        self._study.tell(attempt.number, state=TrialState.FAIL)
        attempts = self._attempts()
        claims = {attempt.user_attrs.get(_CLAIM) for attempt in attempts}
        for attempt in attempts:
            is_over = _RESULT in attempt.user_attrs or _FAILURE in attempt.user_attrs
            claim = f"after attempt {attempt.number}"
            if attempt.state == TrialState.FAIL and not is_over and claim not in claims:
                attributes = {_CLAIM: claim, _TRIAL: _trial_of(attempt)}
                self._study.enqueue_trial(dict(attempt.params), user_attrs=attributes)

    def _is_abandoned(self, attempt: FrozenTrial) -> bool:
        beat = attempt.user_attrs.get(_BEAT)
        return self.signs.is_dead(attempt.number, beat, all_are_here=self._storage.is_file)

    def _beat(self, attempt: Attempt) -> None:
        count = 0
        while not attempt.stop_beating.wait(BEAT_SECONDS):
            count += 1
            with contextlib.suppress(Exception):  # a storage that is away for a while must not end the training
                attempt.handle.set_user_attr(_BEAT, count)


def distribution_of(dimension: Dimension) -> BaseDistribution:
    """A dimension in Optuna's words."""
    if dimension.choices:
        return CategoricalDistribution([label(choice) for choice in dimension.choices])
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.is_whole:
        return IntDistribution(int(dimension.low), int(dimension.high), dimension.log, int(dimension.step or 1))
    return FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step)


def _value_of(dimension: Dimension, stored: Any) -> Any:
    if not dimension.choices:
        if dimension.is_whole:
            return int(stored)
        assert dimension.low is not None
        assert dimension.high is not None
        return min(max(float(f"{stored:.{_TOKENS}g}"), dimension.low), dimension.high)
    return next((choice for choice in dimension.choices if label(choice) == stored), stored)


def _trial_of(attempt: FrozenTrial) -> int:
    return int(attempt.user_attrs.get(_TRIAL, attempt.number))


def _mixed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).digest()) >> 1


def _close(stream: TextIO | None) -> None:
    if stream is not None:
        stream.close()
