"""Code that the user has named on this machine: all that a run directory may lead to.

What enters: references such as `nets.py:build`, out of a recipe, a command line, or the files of a run. What leaves:
nothing, or one RunError. A run directory may come from somebody else, and its run.json and model.json may name any file
as the function that builds the model. So what they name runs only where the user has named it before: in a recipe that
was applied here, or with `edgecompress trust`. Names are kept in a folder of the user's own, never in the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgecompress import console
from edgecompress.errors import RunError
from edgecompress.run_directory import write_json

_here: set[str] = set()  # what this process was asked to run, where the folder cannot be written


def is_user_code(name: str) -> bool:
    """Whether a name from a recipe points into a Python file."""
    return ".py:" in name or name.endswith(".py")


def names_file() -> Path:
    """Where the names are kept: `$XDG_STATE_HOME/edgecompress/named-code.json`, below ~/.local/state by default."""
    given = os.environ.get("XDG_STATE_HOME")
    base = Path(given) if given else Path(os.path.expanduser("~")) / ".local" / "state"
    return base / "edgecompress" / "named-code.json"


def named_code() -> list[str]:
    """Every `/absolute/file.py:function` that the user has named."""
    try:
        document = json.loads(names_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        document = []  # none yet; a damaged file names nothing, so that what it held is asked for again
    kept = document if isinstance(document, list) else []
    return sorted({name for name in kept if isinstance(name, str)} | _here)


def remember(reference: str) -> None:
    """Keep a reference that the user named: by its whole path and its function, which is all that may then run."""
    name = _whole(reference)
    known = named_code()
    if name in known:
        return
    _here.add(name)
    path = names_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, sorted({*known, name}))
    except OSError as error:
        console.note(
            f"{path}: cannot be written ({error.strerror}), so later commands on this run will ask for: "
            f"edgecompress trust {reference}"
        )


def require_named(reference: str, *, where: Path | str) -> None:
    """Refuse code that a file of a run names and the user has not. Raises RunError; other names pass."""
    if not is_user_code(reference) or _whole(reference) in named_code():
        return
    raise RunError(
        f"{where}: names {reference}, code that you have not named on this machine. A run directory may come from "
        f"somebody else, so it is not run: look at it, and if it may run: edgecompress trust {reference}"
    )


def require_all_named(document: Any, *, where: Path | str) -> None:
    """The same for every `name` of a recipe that stands in a run."""
    for name in _names(document):
        require_named(name, where=where)


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("name"), str):
            yield value["name"]
        for item in value.values():
            yield from _names(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _names(item)


def _whole(reference: str) -> str:
    file, separator, function = reference.rpartition(":")
    return f"{Path(file or reference).resolve()}{separator}{function if separator else ''}"
