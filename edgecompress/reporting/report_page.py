"""A run in, one page per target out: self-contained HTML to read, Markdown for a pull request, JSON for machines.

What enters: a run directory. What leaves: report/<target>.html, .md and .json. What a user supplied is escaped by
the template environments and not by each template, so that no place can be forgotten.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgecompress import console
from edgecompress.reporting import drawing, value_text
from edgecompress.reporting.report_facts import report_document
from edgecompress.reporting.typography import markdown_code, markdown_text, typographic
from edgecompress.run_directory import RunDirectory, reading_documents, write_json, write_text

__all__ = ["FORMATS", "ReportPaths", "markdown_text", "render_html", "report_document", "write_pages", "write_report"]

FORMATS = ("html", "md", "json")

_TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class ReportPaths:
    """Where the pages of one target are; None for a form that was not asked for."""

    html: Path | None = None
    markdown: Path | None = None
    json: Path | None = None

    def to_dict(self) -> dict[str, str]:
        """Those that were written, by form."""
        found = {"html": self.html, "markdown": self.markdown, "json": self.json}
        return {name: str(path) for name, path in found.items() if path is not None}


def write_report(run: RunDirectory, target: str, formats: Collection[str] = FORMATS) -> ReportPaths:
    """Render the pages of a target and write them atomically. Raises RunError when a file of the run makes no sense."""
    with console.busy(f"writing the report for {target}"), reading_documents(run), run.replacing(run.path / "report"):
        document = report_document(run, target)
        if document["stale_profile"] or document["changed"]:
            console.warn(document["decision"]["notes"][0])
        return write_pages(document, run.report_path(target, "html"), "report", formats)


def write_pages(document: dict[str, Any], html: Path, template: str, formats: Collection[str]) -> ReportPaths:
    """Write a document in the forms that are asked for, beside each other under the name of `html`."""
    paths = {name: html.parent / f"{html.name.removesuffix('.html')}.{name}" for name in FORMATS if name in formats}
    if "html" in paths:
        write_text(paths["html"], render_html(f"{template}.html.j2", document))
    if "md" in paths:
        write_text(paths["md"], markdown_environment().get_template(f"{template}.md.j2").render(document))
    if "json" in paths:
        write_json(paths["json"], document)
    return ReportPaths(html=paths.get("html"), markdown=paths.get("md"), json=paths.get("json"))


def render_html(template: str, document: Mapping[str, Any]) -> str:
    """A page that holds its style and its script, and allows the browser nothing beside them."""
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _html_environment().get_template(template).render(document, script=Markup(script), script_sha256=digest)


@functools.cache
def _html_environment() -> Environment:
    def typeset(function: Any) -> Any:
        return lambda *arguments, **keywords: typographic(function(*arguments, **keywords))

    filters = {name: typeset(function) for name, function in _FILTERS.items()}
    filters |= {"prose": typographic, "draw": drawing.draw, "legend": drawing.legend_of}
    return _environment(lambda value: value if isinstance(value, Markup) else value_text.printable(value), filters)


@functools.cache
def markdown_environment() -> Environment:
    """Templates whose values come out as Markdown that shows just their characters."""
    finalize = lambda value: value if isinstance(value, Markup) else markdown_text(value)  # noqa: E731
    return _environment(finalize, {**_FILTERS, "prose": str, "code": markdown_code})


_FILTERS: dict[str, Any] = {
    "percent": value_text.percent_text,
    "points": value_text.points_text,
    "size": value_text.bytes_text,
    "scaled": value_text.count_text,
    "duration": value_text.seconds_text,
    "quantity": value_text.quantity_text,
    "limit": value_text.limit_text,
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
    environment.filters |= filters
    return environment
