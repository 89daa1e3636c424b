"""Facts of a figure in, one inline SVG out, drawn by matplotlib.

What enters: a figure's facts as `figures` and its neighbours compose them, of the kinds `rows`, `scatter` and `lines`.
What leaves: markup that is safe to put into a page. Colours become CSS variables, so that a figure follows light and
dark; ids get the figure's own name in front, so that two figures cannot clash; names that users gave never pass
matplotlib's font machinery, which knows neither emoji nor right-to-left text, but are put in afterwards, escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from edgecompress.reporting.summary import Json
from edgecompress.reporting.typography import typographic
from edgecompress.reporting.value_text import number_text, printable

WIDTH, HEIGHT, ROW = 400.0, 270.0, 36.0  # in SVG units, of which a phone shows nearly one a pixel
_FONT = 11.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 10.0, 44.0
_MOST_TICKS = 8
_NAME_CHARACTERS = 30
# Colours that exist only to be replaced: each stands for a CSS variable of report.css.
_INK, _SOFT, _LINE = "#000001", "#000002", "#000003"
_SERIES = {"baseline": "#00000a", "fp32": "#00000b", "int8": "#00000c"}
_OTHERS = ("#00000d", "#00000e", "#00000f")
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    **{color: f"--series-{k}" for k, color in enumerate((*_SERIES.values(), *_OTHERS), 1)},
}
# Colour is never the only difference: each series has a mark and a stroke of its own too.
_MARKS = ("s", "o", "D", "^", "v", "P")
_STROKES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), "-", (0, (3, 1)))
_STYLE: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "edgecompress",
    "text.parse_math": False,
    "font.size": _FONT,
    "font.family": "sans-serif",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}


def series_number(name: object, position: int = 0) -> int:
    """Which of the page's series colours, from 1 to 6, a name has; unknown names take turns by their position."""
    known = list(_SERIES)
    return known.index(str(name)) + 1 if str(name) in known else len(known) + 1 + position % len(_OTHERS)


def draw(facts: Json) -> Markup:
    """The SVG of a figure: it scales with its column, and its title and description are there for screen readers."""
    with mpl.rc_context(_STYLE):
        sheet = _Sheet(facts)
        _KINDS[facts["kind"]](sheet)
        return sheet.svg()


class _Sheet:
    """A figure in the making: axes in SVG units, and the texts and hover titles that are put in at the end."""

    def __init__(self, facts: Json) -> None:
        self.facts = facts
        self.names: list[str] = []
        self.titles: dict[str, str] = {}
        self.height = HEIGHT if facts["kind"] != "rows" else ROW * len(facts["rows"]) + _BOTTOM
        self.figure = Figure(figsize=(WIDTH / 72, self.height / 72), dpi=72)
        self.figure.patch.set_visible(False)
        FigureCanvasSVG(self.figure)

    def axes(self, left: float = _LEFT, top: float = _TOP) -> Axes:
        box = (left / WIDTH, _BOTTOM / self.height)
        size = ((WIDTH - left - _RIGHT) / WIDTH, (self.height - top - _BOTTOM) / self.height)
        axes = self.figure.add_axes((*box, *size))
        axes.patch.set_visible(False)
        axes.tick_params(length=3, width=0.8)
        axes.grid(True, color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        return axes

    def name(self, text: object) -> str:
        """A stand-in for a user's text, which matplotlib can measure."""
        self.names.append(printable(text, limit=_NAME_CHARACTERS))
        return f"@{len(self.names) - 1}@"

    def value(self, text: str) -> str:
        """A stand-in for a value with its unit, which is never cut."""
        self.names.append(typographic(text))
        return f"@{len(self.names) - 1}@"

    def titled(self, artist: Any, text: str) -> None:
        """Give an artist a title that a pointer resting on it shows."""
        key = f"hover{len(self.titles)}"
        artist.set_gid(key)
        self.titles[key] = text

    def svg(self) -> Markup:
        stream = io.StringIO()
        self.figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = stream.getvalue()
        body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
        body = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
        body = re.sub(r"\s*\n\s*", "\n", body)
        for color, variable in _VARIABLES.items():
            body = body.replace(color, f"var({variable})")
        prefix = str(self.facts["id"])
        for key, title in self.titles.items():
            body = body.replace(f'<g id="{key}">', f'<g id="{key}"><title>{escape(title)}</title>')
        body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
        body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
        body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
        body = re.sub(r"font-family: [^;\"]+", "font-family: inherit", body)
        body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
        body = re.sub(r"@(\d+)@", lambda found: str(escape(self.names[int(found[1])])), body)
        head = (
            f'<svg class="plot" role="img" aria-labelledby="{prefix}-title {prefix}-description" '
            f'viewBox="0 0 {WIDTH:g} {self.height:g}"><title id="{prefix}-title">{escape(self.facts["title"])}</title>'
            f'<desc id="{prefix}-description">{escape(description_text(self.facts))}</desc>'
        )
        return Markup(head + body + "</svg>")


def description_text(facts: Json) -> str:
    """What a figure shows, for those who cannot see it: its legend sentence, then its values."""
    values: list[str] = []
    if facts["kind"] == "rows":
        values = [f"{printable(row['label'], limit=_NAME_CHARACTERS)}: {row['text']}." for row in facts["rows"]]
    elif facts["kind"] == "scatter":
        values = [f"{printable(point['label'], limit=_NAME_CHARACTERS)}: {point['text']}." for point in facts["points"]]
    else:
        for line in facts["series"]:
            first, last = (f"{number_text(line['y'][k])} at {number_text(line['x'][k])}" for k in (0, -1))
            values.append(f"{printable(line['name'], limit=_NAME_CHARACTERS)}: {first} to {last}.")
    return " ".join([str(facts["description"]), *values])


def _axis(axes: Axes, which: str, facts: Json) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(str(facts["label"]))
    if facts.get("log"):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        low, high = (axes.get_xlim if which == "x" else axes.get_ylim)()
        wide = high / max(low, 1e-12) > 30
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, integer=bool(facts.get("whole")), steps=[1, 2, 2.5, 5, 10]))
    ticks = facts.get("ticks") or []
    if 0 < len(ticks) <= _MOST_TICKS:  # the few values that were measured, rather than round ones between them
        axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value)))


def _tick_text(value: float) -> str:
    text = f"{value:.6g}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else text.replace("-", "\N{MINUS SIGN}")


def _style_of(name: object, position: int, chosen: int | None = None) -> tuple[str, Any, Any]:
    """Colour, mark and stroke: by name, or the `chosen` one of the six."""
    place = series_number(name, position) - 1 if chosen is None else chosen % len(_MARKS)
    return (*_SERIES.values(), *_OTHERS)[place], _MARKS[place], _STROKES[place]


def _rows(sheet: _Sheet) -> None:
    """A bar or a dot for each row, with its name and value above it."""
    facts, rows = sheet.facts, sheet.facts["rows"]
    axes = sheet.axes(left=8.0, top=0.0)
    axes.set_ylim(len(rows), 0)
    axes.set_xlim(*_bounds(facts))
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    if facts.get("mark") is not None:
        axes.axvline(facts["mark"], color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
    for index, row in enumerate(rows):
        y, color = index + 0.72, _style_of(row.get("series", row["label"]), index)[0]
        if row.get("bar") is not None:
            (bar,) = axes.barh(y, row["bar"], height=0.28, color=color, left=axes.get_xlim()[0])
            sheet.titled(bar, f"{printable(row['label'], limit=_NAME_CHARACTERS)}: {row['text']}")
        if row.get("low") is not None:
            axes.errorbar(
                (row["low"] + row["high"]) / 2, y, xerr=(row["high"] - row["low"]) / 2, color=_INK, capsize=3.5, lw=1.4
            )
        if row.get("dot") is not None:
            (dot,) = axes.plot(row["dot"], y, marker="o", markersize=7, color=color, clip_on=False)
            sheet.titled(dot, f"{printable(row['label'], limit=_NAME_CHARACTERS)}: {row['text']}")
        inside = axes.get_yaxis_transform()
        axes.text(0.0, index + 0.44, sheet.name(row["label"]), transform=inside, weight="bold")
        axes.text(1.0, index + 0.44, sheet.value(row["text"]), transform=inside, ha="right")
    _axis(axes, "x", facts["x"])


def _bounds(facts: Json) -> tuple[float, float]:
    keys = ("bar", "dot", "low", "high")
    values = [row[key] for row in facts["rows"] for key in keys if row.get(key) is not None]
    values += [facts["mark"]] if facts.get("mark") is not None else []
    if any(row.get("bar") is not None for row in facts["rows"]):
        return 0.0, 1.04 * max([*values, 1e-12])
    margin = max(0.08 * (max(values) - min(values)), 1e-3)
    low, high = min(values) - margin, max(values) + margin
    limits = facts["x"].get("limits") or (low, high)
    return max(low, limits[0]), min(high, limits[1])


def _scatter(sheet: _Sheet) -> None:
    """A mark with intervals for each variant, and a line through those that no other beats in both."""
    facts = sheet.facts
    axes = sheet.axes()
    for which in ("x", "y"):
        (axes.set_xlim if which == "x" else axes.set_ylim)(*_spread(facts, which))
    front = sorted((p["x"], p["y"]) for p in facts["points"] if p.get("front"))
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=_SOFT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for position, point in enumerate(facts["points"]):
        color, mark, _ = _style_of(point.get("series", point["label"]), position, point.get("color"))
        for which in ("x", "y"):
            low, high = point.get(f"{which}_ci95") or (None, None)
            if low is not None and high is not None:
                across = ([low, high], [point["y"]] * 2) if which == "x" else ([point["x"]] * 2, [low, high])
                axes.plot(*across, color=color, linewidth=1.3)
        (dot,) = axes.plot(point["x"], point["y"], marker=mark, markersize=7.5, color=color, linestyle="none")
        sheet.titled(dot, f"{printable(point['label'], limit=_NAME_CHARACTERS)}: {point['text']}")
    for which in ("x", "y"):
        _axis(axes, which, facts[which])
    _name_points(sheet, axes)


def _spread(facts: Json, which: str) -> tuple[float, float]:
    values = [point[which] for point in facts["points"]]
    values += [end for point in facts["points"] for end in point.get(f"{which}_ci95") or () if end is not None]
    low, high = min(values), max(values)
    if facts[which].get("log"):
        return low / 1.6, high * 1.6
    margin = max(0.12 * (high - low), 0.02 * abs(high), 1e-6)
    limits = facts[which].get("limits")
    low, high = low - margin, high + margin
    # A point at the very end of a limited axis still needs room for its mark.
    return (
        (low, high) if limits is None else (max(low, limits[0] - 0.25 * margin), min(high, limits[1] + 0.25 * margin))
    )


def _name_points(sheet: _Sheet, axes: Axes) -> None:
    """Each name beside its mark: the first of four corners where it covers neither a mark nor another name."""
    places = [
        (float(x), float(y)) for x, y in (axes.transData.transform((p["x"], p["y"])) for p in sheet.facts["points"])
    ]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for (x, y), point in zip(places, sheet.facts["points"], strict=True):
        text = printable(point["label"], limit=_NAME_CHARACTERS)
        wide = 0.56 * _FONT * len(text)
        corners = [
            (x + 9, y + 9),
            (x - 9 - wide, y + 9),
            (x + 9, y - 9),
            (x - 9 - wide, y - 9),
            (x + 9, y + 23),
            (x + 9, y - 23),
        ]
        boxes = [(left, middle - 6, left + wide, middle + 6) for left, middle in corners]
        free = [
            box
            for box in boxes
            if box[0] > _LEFT and box[2] < WIDTH and not any(_overlap(box, other) for other in taken)
        ]
        box = (free or [boxes[0] if boxes[0][2] < WIDTH else boxes[1]])[0]
        taken.append(box)
        at_left = box[0] < x
        at = ((box[2] if at_left else box[0]) / WIDTH, (box[1] + 6) / sheet.height)
        side = "right" if at_left else "left"
        axes.text(*at, sheet.name(text), transform=sheet.figure.transFigure, ha=side, va="center")


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _lines(sheet: _Sheet) -> None:
    """A line for each series, with marks and intervals where they are given."""
    facts = sheet.facts
    axes = sheet.axes()
    for position, line in enumerate(facts["series"]):
        color, mark, stroke = _style_of(line["name"], line.get("color", position))
        marked = mark if line.get("marks") else None
        if line.get("low") is not None:
            axes.vlines(line["x"], line["low"], line["high"], color=color, linewidth=1.3)
        (drawn,) = axes.plot(
            line["x"],
            line["y"],
            color=_SOFT if line.get("quiet") else color,
            linestyle="none" if line.get("points") else stroke,
            marker=marked,
            markersize=5.5,
            linewidth=1.1 if line.get("quiet") else 1.8,
        )
        sheet.titled(drawn, printable(line["name"], limit=_NAME_CHARACTERS))
    for mark in facts.get("marks") or []:
        axes.axvline(mark, color=_LINE, linewidth=1.2)
    for which in ("x", "y"):
        limits = facts[which].get("limits")
        if limits is not None:
            (axes.set_xlim if which == "x" else axes.set_ylim)(*limits)
        _axis(axes, which, facts[which])


_KINDS: dict[str, Callable[[_Sheet], None]] = {"rows": _rows, "scatter": _scatter, "lines": _lines}


def legend_of(facts: Json) -> Sequence[dict[str, Any]]:
    """What the colours of a figure of lines mean: names with their series number, for the page to set as text."""
    if facts["kind"] != "lines":
        return []
    return [
        {
            "name": printable(line["name"], limit=_NAME_CHARACTERS),
            "series": series_number(line["name"], line.get("color", k)),
        }
        for k, line in enumerate(facts["series"])
        if not line.get("quiet")
    ]
