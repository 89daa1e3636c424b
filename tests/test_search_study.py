"""Several workers, one search: in a file and on a real PostgreSQL server, with a worker killed in the middle."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from optuna.storages._rdb.models import TrialModel

import search_worker
from edgecompress.errors import RunError
from edgecompress.searching.study import SharedStudy
from edgecompress.searching.study_storage import shown_url
from edgecompress.settings.search_space import Dimension

TRIALS = 12


def _postgresql() -> Path | None:
    """The newest server's folder of programs, or None."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += [Path(found).resolve().parent] if found else []
    wanted = ("initdb", "postgres", "pg_isready")
    return next((folder for folder in folders if all((folder / name).exists() for name in wanted)), None)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A server of our own on the loopback, run by a user who is not root (it refuses that); its URL."""
    programs = _postgresql()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        pytest.skip("there is no user but root to run a PostgreSQL server as")
    folder = Path(tempfile.mkdtemp(prefix="edgecompress-postgresql-"))
    os.chown(folder, account.pw_uid, account.pw_gid)
    switch = {"user": user, "group": account.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    how = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **switch}
    initialize = [
        programs / "initdb",
        "-D",
        folder / "data",
        "-U",
        "searcher",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
    ]
    subprocess.run([str(word) for word in initialize], check=True, timeout=120, **how)  # type: ignore[call-overload]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", port, "-k", folder, "-F"]
    server = subprocess.Popen([str(word) for word in serve], **how)  # type: ignore[call-overload]
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, timeout=30).returncode != 0:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
        yield f"postgresql://searcher@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _worker(url: str, folder: Path, *, seconds: float, dies_at: int = 0) -> subprocess.Popen[bytes]:
    arguments = [url, str(folder), str(TRIALS), str(seconds), str(dies_at)]
    return subprocess.Popen([sys.executable, str(Path(search_worker.__file__)), *arguments])


def _log(folder: Path) -> tuple[Counter[int], Counter[int]]:
    """How often each trial began, and how often it ended."""
    rows = [line.split() for line in (folder / "log").read_text().splitlines()]
    counts = [Counter(int(row[1]) for row in rows if row[0] == word) for word in ("begin", "end")]
    return counts[0], counts[1]


def _four_workers_and_a_death(url: str, folder: Path) -> None:
    workers = [_worker(url, folder, seconds=0.6, dies_at=2 if number == 0 else 0) for number in range(4)]
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [-signal.SIGKILL, 0, 0, 0]
    began, ended = _log(folder)
    assert len(ended) == TRIALS
    assert set(ended.values()) == {1}, "a trial ran twice"
    twice = [trial for trial, count in began.items() if count > 1]
    assert len(twice) == 1, "the killed worker's trial was taken over once"
    with closing(search_worker.open_study(url, folder)) as study:
        records = study.records()
    assert [record.status for record in records] == ["complete"] * TRIALS
    assert {record.id for record in records} == set(ended)
    assert [record.attempts for record in records if record.id in twice] == [2]
    assert len({record.result["worker"] for record in records}) >= 3
    # Taken over with its own settings, and of the random points no two are the same.
    ratios = {line.split()[3] for line in (folder / "log").read_text().splitlines() if line.split()[1] == str(twice[0])}
    assert len(ratios) == 1
    assert len({record.settings["ratio"] for record in records[:6]}) == 6


@pytest.mark.slow
def test_four_workers_on_postgresql_with_one_killed(postgresql: str, tmp_path: Path) -> None:
    _four_workers_and_a_death(postgresql, tmp_path)


@pytest.mark.slow
def test_four_workers_on_a_file_with_one_killed(tmp_path: Path) -> None:
    _four_workers_and_a_death(f"sqlite:///{tmp_path / 'search.sqlite3'}", tmp_path)


def test_two_workers_never_take_the_same_waiting_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads that a point waits, and is held until the other has read it too, if the storage lets it read."""
    read = TrialModel.find_or_raise_by_id
    both_have_read = threading.Barrier(2)

    def slow(*arguments: Any, **options: Any) -> TrialModel:
        found = read(*arguments, **options)
        if options.get("for_update"):
            with contextlib.suppress(threading.BrokenBarrierError):
                both_have_read.wait(0.5)
        return found

    studies = [_study(tmp_path) for _ in range(2)]
    studies[0].offer([{"ratio": share / 10, "scope": "layer"} for share in (1, 5, 9)], "spread")
    with ThreadPoolExecutor(2) as workers:
        monkeypatch.setattr(TrialModel, "find_or_raise_by_id", slow)
        asked = [workers.submit(study.ask, 3) for study in studies]
        attempts = [one.result() for one in asked]
    monkeypatch.undo()
    assert len({attempt.handle.number for attempt in attempts if attempt is not None}) == 2
    for study, attempt in zip(studies, attempts, strict=True):
        assert attempt is not None
        study.release(attempt)
        study.close()


@pytest.fixture
def study(tmp_path: Path) -> Iterator[SharedStudy]:
    with closing(_study(tmp_path)) as opened:
        yield opened


def _study(folder: Path) -> SharedStudy:
    return search_worker.open_study(f"sqlite:///{folder / 'search.sqlite3'}", folder)


def test_a_result_told_just_before_death_is_not_lost(study: SharedStudy) -> None:
    attempt = study.ask(1)
    assert attempt is not None
    attempt.handle.set_user_attr("result", {"status": "complete", "values": [0.5, 1.0]})
    assert study.ask(1) is None  # held by a process that lives
    study.release(attempt)
    assert study.ask(1) is None
    (record,) = study.records()
    assert (record.status, record.attempts) == ("complete", 1)


def test_a_trial_that_was_only_begun_goes_on_when_no_other_worker_lives(study: SharedStudy) -> None:
    attempt = study.ask(1)
    assert attempt is not None
    (study.signs.folder / str(attempt.handle.number)).unlink()
    with study.signs.hold("worker-elsewhere"):
        assert study.ask(1) is None
    taken = study.ask(1)
    assert taken is not None
    assert (taken.trial, taken.settings) == (attempt.trial, attempt.settings)
    study.release(taken)
    study.release(attempt)


def test_more_trials_go_on_with_new_points(tmp_path: Path) -> None:
    seen = []
    for limit in (2, 4):
        with closing(_study(tmp_path)) as study:
            study.offer([{"ratio": 0.3, "scope": {"own": 1}}], "spread")
            while (attempt := study.ask(limit)) is not None:
                seen.append(attempt.settings)
                study.finish(attempt, {"status": "complete"}, values=(0.5, 0.5), drop=0.0)
            records = study.records()
    assert len(seen) == 4
    assert seen[0] == {"ratio": 0.3, "scope": {"own": 1}}
    assert len({settings["ratio"] for settings in seen}) == 4
    assert [record.settings for record in records] == seen


def test_failed_trials_keep_their_reason_and_are_not_repeated(study: SharedStudy) -> None:
    attempt = study.ask(1)
    assert attempt is not None
    study.fail(attempt, "no layer can be cut", {"seconds": 1.0})
    assert study.ask(1) is None
    (record,) = study.records()
    assert (record.status, record.error, record.result) == ("failed", "no layer can be cut", {"seconds": 1.0})


def test_a_worker_without_a_lock_is_taken_for_dead_only_while_one_looks(
    study: SharedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = study.ask(1)
    assert attempt is not None
    (study.signs.folder / str(attempt.handle.number)).unlink()  # as where workers share no folder
    clock = [1000.0]
    monkeypatch.setattr("edgecompress.searching.worker_signs.time.monotonic", lambda: clock[0])
    other = study.signs.hold("worker-elsewhere")
    assert study.ask(1) is None
    clock[0] += 6000  # this worker trained, or the whole machine stood still
    assert study.ask(1) is None
    for beat in range(10):
        attempt.handle.set_user_attr("beat", beat)
        clock[0] += 10
        assert study.ask(1) is None
    for _ in range(6):
        clock[0] += 10
        assert study.ask(1) is None
    clock[0] += 10
    taken = study.ask(1)
    assert taken is not None
    other.close()
    assert (taken.trial, taken.settings, taken.is_resumed) == (attempt.trial, attempt.settings, True)
    assert study.finish(attempt, {"status": "complete"}, values=(0.1, 0.1), drop=0.0) is False
    assert study.finish(taken, {"status": "complete"}, values=(0.2, 0.2), drop=0.0) is True
    assert [record.result["values"] for record in study.records()] == [[0.2, 0.2]]


def test_a_storage_that_does_not_answer_is_said_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://searcher:secret@127.0.0.1:9/none"
    with pytest.raises(RunError) as caught:
        SharedStudy(url, "test", dimensions=[Dimension("a", 0.0, 1.0)], seed=0, locks=tmp_path)
    assert "does not answer" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert shown_url(url) == "postgresql://searcher:***@127.0.0.1:9/none"
    assert shown_url("postgresql://searcher@host/none") == "postgresql://searcher@host/none"
