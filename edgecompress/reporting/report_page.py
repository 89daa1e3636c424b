"""A run in, one page per target out: self-contained HTML for reading, Markdown for a pull request.

What enters: a run directory. What leaves: report/<target>.html and .md. What a user supplied is escaped by
the template environments and not by each template, so that no place can be forgotten.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgecompress.reporting import summary
from edgecompress.reporting.report_facts import report_document
from edgecompress.reporting.summary import Json
from edgecompress.run_directory import RunDirectory, write_text

__all__ = ["ReportPaths", "markdown_text", "report_document", "write_report"]

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_MARKDOWN_SPECIAL = re.compile(r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


@dataclass(frozen=True)
class ReportPaths:
    """Where the two pages of one target are."""

    html: Path
    markdown: Path


def write_report(run: RunDirectory, target: str) -> ReportPaths:
    """Render both pages of a target and write them atomically. Raises RunError when `run` is no run directory."""
    document = report_document(run, target)
    paths = ReportPaths(html=run.report_path(target, "html"), markdown=run.report_path(target, "md"))
    write_text(paths.html, _html_environment().get_template("report.html.j2").render(document))
    write_text(paths.markdown, markdown_environment().get_template("report.md.j2").render(document))
    return paths


def markdown_text(value: object) -> Markup:
    """A value as Markdown that shows just its characters: on one line, with markup and HTML made inert."""
    text = " ".join(summary.printable(value).split())
    text = _MARKDOWN_SPECIAL.sub(lambda found: "\\" + found[0], text)
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _markdown_code(value: object) -> Markup:
    text = summary.printable(value).rstrip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}\n{text}\n{fence}")


def _typographic(value: object) -> str:
    """Typeset text of ours: true minus signs, units that stay with their number, a dash for what is missing."""
    text = str(value)
    if text == summary.MISSING:
        return "\N{EN DASH}"
    text = re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=\d) (?=(?:%|ms|s|[kMGT]?B|points|dB)(?!\w))", "\N{NO-BREAK SPACE}", text)


def _place(value: float, axis: Json) -> str:
    share = (value - axis["low"]) / (axis["high"] - axis["low"])
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


@functools.cache
def _html_environment() -> Environment:
    def typographic(function: Any) -> Any:
        return lambda *arguments, **keywords: _typographic(function(*arguments, **keywords))

    filters = {name: typographic(function) for name, function in _FILTERS.items()}
    filters["prose"] = _typographic
    return _environment(lambda value: value if isinstance(value, Markup) else summary.printable(value), filters)


@functools.cache
def markdown_environment() -> Environment:
    """Templates whose values come out as Markdown that shows just their characters."""
    finalize = lambda value: value if isinstance(value, Markup) else markdown_text(value)  # noqa: E731
    return _environment(finalize, {**_FILTERS, "prose": str, "code": _markdown_code})


_FILTERS: dict[str, Any] = {
    "percent": summary.percent_text,
    "points": summary.points_text,
    "size": summary.bytes_text,
    "scaled": summary.count_text,
    "duration": summary.seconds_text,
    "quantity": summary.quantity_text,
    "limit": summary.limit_text,
}


def _environment(finalize: Any, filters: Mapping[str, Any]) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {**filters, "place": _place}
    return environment
