"""Values in, text that a page or a pull request shows as it is out.

What enters: texts, ours and users'. What leaves: Markdown in which nothing is markup, and typeset text.
"""

from __future__ import annotations

import re

from markupsafe import Markup

from edgecompress.reporting import value_text

_MARKDOWN_SPECIAL = re.compile(r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def markdown_text(value: object) -> Markup:
    """A value as Markdown that shows just its characters: on one line, with markup and HTML made inert."""
    text = " ".join(value_text.printable(value).split())
    text = _MARKDOWN_SPECIAL.sub(lambda found: "\\" + found[0], text)
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def markdown_code(value: object) -> Markup:
    """A block of code that no run of backticks within it can end."""
    text = value_text.printable(value).rstrip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}\n{text}\n{fence}")


def typographic(value: object) -> str:
    """Typeset text of ours: true minus signs, units that stay with their number, a dash for what is missing."""
    text = str(value)
    if text == value_text.MISSING:
        return "\N{EN DASH}"
    text = re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=\d) (?=(?:%|ms|s|[kMGT]?B|points|dB)(?!\w))", "\N{NO-BREAK SPACE}", text)
