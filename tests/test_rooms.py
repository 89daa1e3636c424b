"""The package's rooms: data flows one way, so a room imports only from rooms that come before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "edgecompress"
FOUNDATION = ("errors", "console", "machine", "run_directory", "shipped", "threads")
ORDER = (
    *("settings", "data", "models", "training", "exporting", "measure", "pruning", "int8", "stages", "reporting"),
    *("device", "deploy", "steps", "searching", "pipeline", "results", "findings", "api", "commands", "cli"),
)
ROOMS = ("foundation", *ORDER)


def _room(module: str) -> str:
    first = module.removeprefix("edgecompress").removeprefix(".").partition(".")[0]
    return "foundation" if first in {"", "__main__", *FOUNDATION} else first


def _imports(source: str) -> set[str]:
    """Every module of the package that `source` imports when it runs; what only type checkers see is left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "edgecompress":
            found |= {f"edgecompress.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgecompress."):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("edgecompress.")}
    return found


def test_every_room_is_in_the_order() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    assert folders | modules == set(ORDER) | set(FOUNDATION)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    before = set(ROOMS[: ROOMS.index(room) + 1])
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in {"__main__.py"}]
    for path in files:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if _room(module) == room:
            wrong = {name for name in _imports(path.read_text(encoding="utf-8")) if _room(name) not in before}
            assert not wrong, f"{module} imports {sorted(wrong)}, from a room that comes after it"
