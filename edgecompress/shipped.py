"""Where the recipes and targets that come with the package are.

An installed wheel carries them as `edgecompress/recipes` and `edgecompress/targets`; a checkout has
them at its top level. Both are looked at, the package first. A file in a subfolder is named with it: `paper/pruning`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_files(folder: str) -> list[Path]:
    """The YAML files of `recipes` or `targets`, sorted by name; those of the folder itself before its subfolders'."""
    for root in (_PACKAGE, _PACKAGE.parent):
        files = sorted((root / folder).rglob("*.yaml"), key=lambda path: (path.parent, path.name))
        if files:
            return files
    return []


def shipped_name(folder: str, path: Path) -> str:
    """What a shipped file is called on the command line: its path in `folder`, without the ending."""
    root = next(parent for parent in path.parents if parent.name == folder)
    return path.relative_to(root).with_suffix("").as_posix()


def shipped_path(folder: str, name: str) -> Path | None:
    """The shipped file called `name`, or None."""
    return next((path for path in shipped_files(folder) if shipped_name(folder, path) == name), None)
