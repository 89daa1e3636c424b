"""Draw the rooms of the package, in the order in which data flows through them: `python docs/draw_rooms.py`.

What enters: the order that tests/test_rooms.py holds, and each room's own first sentence. What leaves: rooms.svg, which
needs no font, script or network. A test compares the file with what this draws.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "edgecompress"
sys.path.insert(0, str(DOCS.parent / "tests"))

from test_rooms import FOUNDATION, ORDER  # noqa: E402

WIDTH, ROW, GAP, NAME, WRAP = 880, 44, 8, 130, 96
COLOURS = {  # what kind of work a room does; all with dark text on them
    "#dbe9f6": ("settings", "data", "models", "training"),
    "#e3f1dc": ("exporting", "measure", "pruning", "int8"),
    "#fbe8d3": ("stages", "reporting", "device", "deploy", "steps", "searching"),
    "#ece3f4": (),  # those that see the whole line
}


def sentence(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = PACKAGE / room / "__init__.py"
    text = ast.get_docstring(ast.parse((path if path.is_file() else PACKAGE / f"{room}.py").read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def colour(room: str) -> str:
    """The fill of a room's row."""
    return next((fill for fill, rooms in COLOURS.items() if room in rooms), "#ece3f4")


def row(top: int, name: str, text: str, fill: str) -> list[str]:
    """One room: its name, and what it is for in at most two lines."""
    lines = textwrap.wrap(text, WRAP, max_lines=2, placeholder=" ...")
    first = top + (27 if len(lines) == 1 else 19)
    return [
        f'<rect x="30" y="{top}" width="{WIDTH - 40}" height="{ROW}" rx="6" fill="{fill}"/>',
        f'<text class="room" x="44" y="{top + 27}">{escape(name)}</text>',
        *(f'<text x="{NAME + 44}" y="{first + 17 * i}">{escape(line)}</text>' for i, line in enumerate(lines)),
    ]


def drawing() -> str:
    """The picture, as SVG."""
    height = (ROW + GAP) * (len(ORDER) + 1) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">The rooms of the package: data flows down, and a room imports only from those above it'
        "</title>",
        "<style>text{font:13px sans-serif;fill:#1b1b1b}.room{font-weight:bold;font-size:14px}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<path d="M16 14V{height - 26}m-6-9 6 9 6-9" fill="none" stroke="#555" stroke-width="2"/>',
    ]
    parts += row(10, "foundation", f"What every room may use: {', '.join(FOUNDATION)}", "#e6e6e6")
    for place, room in enumerate(ORDER, start=1):
        parts += row(10 + (ROW + GAP) * place, room, sentence(room), colour(room))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (DOCS / "rooms.svg").write_text(drawing(), encoding="utf-8")
