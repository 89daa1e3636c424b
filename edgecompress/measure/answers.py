"""Answers of measuring processes, one by one, so that measuring that was cut off goes on where it stopped.

What enters: answers kept earlier. What leaves: each of them once more, to the same request, and every new one to
whoever keeps them. Runs on Python 3.9 too: a bundle ships it to the device.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any

Json = dict[str, Any]


class Answers:
    """Rows {"request", "answer"} of an earlier attempt, and what to do with each new row.

    Two requests are the same where they differ in nothing but the folders of their files: on a device these are new
    in every attempt. A request that is made several times gets the answers kept for it one after the other.
    """

    def __init__(self, known: Iterable[Json] = (), *, keep: Callable[[Json], None] | None = None) -> None:
        self._known: dict[str, deque[Json]] = {}
        for row in known:
            self._known.setdefault(row["request"], deque()).append(row["answer"])
        self._keep = keep

    def take(self, request: Json) -> Json | None:
        """The next answer kept for this request; None where it must be asked."""
        queue = self._known.get(_key(request))
        return queue.popleft() if queue else None

    def add(self, request: Json, answer: Json) -> None:
        """Hand a new answer to whoever keeps them."""
        if self._keep is not None:
            self._keep({"request": _key(request), "answer": answer})


def _key(request: Json) -> str:
    """The request as text, with file names for paths."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items()}
        return PurePath(value).name if isinstance(value, str) and "/" in value else value

    return json.dumps(bare(request), sort_keys=True)
