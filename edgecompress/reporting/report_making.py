"""How was it made, and how do I make it again? Commands, recipe, training, data, versions, decisions, hashes.

What enters: the manifest and the lines of metrics.jsonl. What leaves: the facts of the page's last question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from edgecompress.reporting import value_text
from edgecompress.reporting.fact_rows import command_text, fact_rows, run_words, sayings
from edgecompress.reporting.report_decision import loud_notes
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.training_figures import training_figures
from edgecompress.run_directory import RunDirectory


def making_facts(
    run: RunDirectory, manifest: Json, recipe: Json, target: str, *, metrics: Sequence[Json] = ()
) -> dict[str, Any]:
    """How was it made, and how do I make it again? Commands, recipe, data, versions, decisions, hashes."""
    data = section(manifest, "data")
    remarks = [note for facts in (data, section(manifest, "model")) for note in sayings(facts.get("notes"))]
    again, typed = command_text(*run_words(manifest, target)), manifest.get("command")
    return {
        "commands": [
            {"does": "do all of it again, in a new run directory", "text": again},
            {"does": "measure again", "text": command_text("profile", str(run.path), "--target", target)},
            {"does": "write this page again", "text": command_text("report", str(run.path), "--target", target)},
        ],
        "figures": training_figures(metrics),
        "seed": manifest.get("seed"),
        "typed": None if typed == again else typed,
        "recipe_yaml": yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100) if recipe else None,
        "versions": fact_rows(section(manifest, "versions"), names=True),
        "machine": fact_rows(section(manifest, "machine")),
        "data": fact_rows({key: value for key, value in data.items() if key != "notes"}),
        "data_notes": [note for note in remarks if note not in loud_notes(manifest)],
        "preprocessing": fact_rows(section(manifest, "model", "preprocessing")),
        "decisions": [
            {
                "what": str(d.get("what", "?")),
                "value": _plain(d.get("value"), str(d.get("what"))),
                "why": str(d.get("why") or ""),
            }
            for d in entries(manifest, "decisions")
        ],
        "artifacts": [
            {"path": str(k), "sha256": str(v)}
            for k, v in sorted(section(manifest, "artifacts").items())
            if not str(k).startswith("report/")  # no page can hold its own hash
        ],
        "finished_at": manifest.get("finished_at"),
    }


def _plain(value: object, name: str) -> str:
    if name == "placement" and isinstance(value, Mapping):  # its figures stand in the reason
        layers = value.get("float_layers") or []
        named = ", ".join(value_text.printable(layer, limit=60) for layer in layers)
        return f"{value.get('form', 'int8')}; in float: {named or 'nothing'}"
    if isinstance(value, Mapping):
        return "; ".join(f"{row['label']}: {row['text']}" for row in fact_rows(value)) or value_text.MISSING
    return value_text.quantity_text(value, name)
