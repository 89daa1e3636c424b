"""Accuracy against the share of channels removed, one small chart a group, as SVG.

What enters: the channels' part of sensitivity.json. What leaves: one SVG document without scripts or fonts of its own.
All charts share one scale, so that a steep one stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from edgecompress.reporting.summary import Json

_WIDTH, _HEIGHT, _COLUMNS = 200, 120, 4
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 26, 22


def sensitivity_svg(document: Json) -> str:
    """The figure of a document with `accuracy` and `groups`."""
    groups = [group for group in document["groups"] if group["points"]]
    lowest = min((point["accuracy"] for group in groups for point in group["points"]), default=0.0)
    low, high = min(lowest, document["accuracy"]), max(1e-9, document["accuracy"])
    rows = -(-len(groups) // _COLUMNS)
    width, height = _COLUMNS * _WIDTH, max(1, rows) * _HEIGHT
    parts = [_chart(group, index, document["accuracy"], low, high) for index, group in enumerate(groups)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="9">\n<title>Accuracy against the share of channels removed</title>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _chart(group: Json, index: int, baseline: float, low: float, high: float) -> str:
    left, top = index % _COLUMNS * _WIDTH, index // _COLUMNS * _HEIGHT
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(removed: float, accuracy: float) -> tuple[float, float]:
        share = (accuracy - low) / max(high - low, 1e-9)
        return left + _LEFT + inner_width * removed, top + _TOP + inner_height * (1 - min(max(share, 0.0), 1.0))

    points = [place(0.0, baseline), *(place(point["removed"], point["accuracy"]) for point in group["points"])]
    start, end = place(0.0, low), place(1.0, low)
    lines = [
        _text(left + _LEFT, top + 12, _short(group["group"]), "start"),
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="#999"/>',
        *_ticks(place, low, high),
        f'<polyline points="{_path(points)}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#1f5fa8"/>' for x, y in points),
    ]
    return "\n".join(lines)


def _ticks(place: object, low: float, high: float) -> list[str]:
    assert callable(place)
    marks = []
    for value in (low, high):
        x, y = place(0.0, value)
        marks.append(_text(x - 4, y + 3, f"{100 * value:.0f} %", "end"))
    for removed in (0.0, 0.5, 1.0):
        x, y = place(removed, low)
        marks.append(_text(x, y + 12, f"{100 * removed:.0f} %", "middle"))
    return marks


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else "..." + name[-(limit - 3) :]
