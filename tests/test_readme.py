"""The README's promises that a test can hold: its rooms and its set-up. Commands and code: tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

from test_rooms import FOUNDATION, ORDER

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_tree_names_every_room_in_order() -> None:
    (tree,) = [block for block in _blocks("text") if "edgecompress/" in block and "errors.py" in block]
    listed = re.findall(r"^  (\w+)(?:\.py|/) ", tree.partition("\nrecipes/")[0], flags=re.MULTILINE)
    assert listed == [*FOUNDATION, *ORDER]


def test_the_set_up_commands_are_there() -> None:
    assert "pip install . && edgecompress run recipes/prune_kd.yaml --target x86" in README
    assert "pip install '.[test]' && pytest" in README
    assert (ROOT / "docs" / "report.png").stat().st_size > 10_000
