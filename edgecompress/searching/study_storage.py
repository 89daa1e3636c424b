"""Where a search's trials are stored: an Optuna study in an SQLite file, or in a database that several machines reach.

What enters: a URL and the study's name. What leaves: the study, and RunError where the storage does not answer.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import optuna
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError

from edgecompress.errors import RunError

FILE = "search.sqlite3"
_DIRECTIONS: Sequence[Literal["maximize", "minimize"]] = ("maximize", "minimize")  # accuracy, cost
_OPENINGS = 8
_MADE_BY_ANOTHER = ("already exists", "duplicate key", "UNIQUE constraint")


class StudyStorage:
    """A study in its storage. Whatever reaches the storage does it within `reaching`."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.is_file = url.startswith("sqlite:")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self.reaching():
            self._storage, self.study = self._opened()

    def _opened(self) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
        """The study, made by whichever worker is first. In a new database several make the tables at once, and all but
        one find them there in the middle of it: they look again."""
        connection = {"connect_args": {"timeout": 120}} if self.is_file else {"pool_pre_ping": True}
        for attempt in range(_OPENINGS):
            try:
                storage = optuna.storages.RDBStorage(
                    self.url.replace("postgresql://", "postgresql+psycopg://"), engine_kwargs=connection
                )
                if self.is_file:
                    _serialize_transactions(storage.engine)
                return storage, optuna.create_study(
                    storage=storage, study_name=self.name, directions=_DIRECTIONS, load_if_exists=True
                )
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                text = f"{error} {error.__cause__}"
                if attempt == _OPENINGS - 1 or not any(words in text for words in _MADE_BY_ANOTHER):
                    raise
                time.sleep(0.5 * (attempt + 1))
        raise AssertionError("unreachable")

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Within the block, a storage that does not answer is a RunError that says so, without the password."""
        try:
            with warnings.catch_warnings():
                # Optuna warns that some of its interface may change: about our code, not about the user's search.
                warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
                yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
            raise RunError(f"--storage {shown_url(self.url)}: {_fault(error)}") from error

    def close(self) -> None:
        """Let go of the storage."""
        self._storage.remove_session()
        self._storage.engine.dispose()


def shown_url(url: str) -> str:
    """A storage's URL without the password in it."""
    scheme, separator, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{login.partition(':')[0]}:***{at}{place}" if at and ":" in login else url


def _serialize_transactions(engine: Engine) -> None:
    """Let every transaction on an SQLite file hold its only write lock from the start.

    Optuna reads that an attempt waits and then writes that it runs, with `SELECT ... FOR UPDATE` in between, which
    SQLite does not have: of two workers that read before either wrote, both would have taken the attempt. Python's
    driver begins a transaction with the first write only, so that the beginning is left to us (SQLAlchemy's
    documentation of the SQLite dialect, "Enabling non-legacy SQLite transactional modes").
    """

    @event.listens_for(engine, "connect")
    def leave_beginning_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # the connections from before


def _fault(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"its driver is missing ({error}); install it: pip install 'edgecompress[postgresql]'"
    first = str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()
    return f"does not answer: {first[0] if first else type(error).__name__}; check the address, then repeat the command"
