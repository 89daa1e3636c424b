"""Any mapping in, rows of label and text out; and what others wrote, cut to a paragraph.

What enters: parts of run.json, parity.json and profiles as they are. What leaves: rows for a table, so that a new key
reaches the page without a change here; and the commands that a page names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from edgecompress.reporting import value_text
from edgecompress.reporting.summary import Json

_SAYING_CHARACTERS = 600


def command_text(*words: str) -> str:
    """An `edgecompress` command, quoted for a shell."""
    return shlex.join(["edgecompress", *words])


def run_words(manifest: Json, target: str) -> list[str]:
    """The arguments of `edgecompress` that do this run again for one target."""
    source = str(manifest.get("recipe_source") or manifest.get("recipe_name") or "recipe.yaml")
    overrides = [word for override in manifest.get("overrides") or [] for word in ("--set", str(override))]
    return ["run", source, "--target", target, *overrides]


def sayings(texts: object) -> list[str]:
    """Sentences that others wrote, none of them longer than a paragraph."""
    return [value_text.printable(text, limit=_SAYING_CHARACTERS) for text in texts] if isinstance(texts, list) else []


def fact_rows(facts: Json, *, names: bool = False, under: str = "", parent: str = "") -> list[dict[str, str]]:
    """Any mapping as rows of `label` and `text`; nested keys are joined, what is None is left out.

    `names` keeps the keys as they are, for instance those of packages.
    """
    rows: list[dict[str, str]] = []
    for key, value in facts.items():
        label = str(key) if names or under else value_text.label_text(str(key))
        label = f"{under}, {label.replace('_', ' ')}" if under else label
        name = f"{parent}_{key}" if parent else str(key)
        if isinstance(value, Mapping):
            rows += fact_rows(value, under=label, parent=name)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            rows += [
                row
                for i, item in enumerate(value, 1)
                if isinstance(item, Mapping)
                for row in fact_rows(item, under=f"{label} {i}")
            ]
        elif value is not None and value != []:
            rows.append({"label": label, "text": str(value) if names else value_text.quantity_text(value, name)})
    return rows
