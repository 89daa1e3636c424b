"""Where the recipes and targets that come with the package are.

An installed wheel carries them as `edgecompress/recipes` and `edgecompress/targets`; a checkout has
them at its top level. Both are looked at, the package first.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_files(folder: str) -> list[Path]:
    """The YAML files of `recipes` or `targets`, sorted by name."""
    for root in (_PACKAGE, _PACKAGE.parent):
        files = sorted((root / folder).glob("*.yaml"))
        if files:
            return files
    return []


def shipped_path(folder: str, name: str) -> Path | None:
    """The shipped file called `name`, or None."""
    return next((path for path in shipped_files(folder) if path.stem == name), None)
