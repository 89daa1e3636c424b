"""A run's files in, the facts of one target's report out, in the order in which the page asks its questions.

What enters: run.json, metrics.jsonl, parity.json, the profile, and what placement, sensitivity and debug-int8 left, of
which all but the first may be missing. What leaves: one JSON-able document. The pages are rendered from it and hold no
logic of their own, so HTML, Markdown and JSON cannot differ in what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecompress.errors import RunError
from edgecompress.reporting import summary
from edgecompress.reporting.fact_rows import command_text
from edgecompress.reporting.report_decision import budget_rows, decision_facts
from edgecompress.reporting.report_gain import gain_facts
from edgecompress.reporting.report_making import making_facts
from edgecompress.reporting.report_time import time_facts
from edgecompress.reporting.report_trust import trust_facts
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.run_directory import SCHEMA_VERSION, RunDirectory, read_json
from edgecompress.settings.gates import begun_exports

_INT8_FILES = ("placement.json", "sensitivity.json", "debug.json")


def report_document(run: RunDirectory, target: str) -> dict[str, Any]:
    """The facts that all pages are rendered from, as JSON: numbers raw, sentences composed, in the page's order.

    A parity or profile file that does not exist is named under `missing` with the command that makes it. Raises
    RunError when `run` is no run directory, or when a file in it cannot be read.
    """
    manifest = run.read_manifest()
    export = run.export_for(target)
    is_begun = target in begun_exports(manifest)  # then parity.json speaks of files that may be gone
    parity = None if is_begun else _read_if_there(export / "parity.json")
    profile, stale = run.read_profile(target), run.stale_profile(target)
    placement, sensitivity, debug = (_of_the_int8_stage(run, manifest, name) for name in _INT8_FILES)
    stages = summary.stage_rows(manifest)
    recipe = section(manifest, "recipe")
    decision = decision_facts(run, manifest, parity, profile, target)
    changed = run.changed_files()
    return {
        "schema_version": SCHEMA_VERSION,
        "title": f"{manifest.get('recipe_name', 'run')} on {target}",
        "target": target,
        "run": str(run.path),
        "subject": _subject(manifest, recipe),
        "changed": changed,
        "stale_profile": stale,
        "decision": decision | {"notes": [*([stale] if stale else []), *_changed_text(changed), *decision["notes"]]},
        "missing": _missing(run, target, parity, profile),
        "gain": gain_facts(stages, profile or {}, budget_rows(profile or {}, stages), placement),
        "trust": trust_facts(
            manifest,
            parity or {},
            target,
            pictures=export,
            sensitivity=sensitivity,
            debug=debug,
            run=str(run.path),
        ),
        "time": time_facts(profile or {}, parity or {}),
        "making": making_facts(run, manifest, recipe, target, metrics=_metrics(run)),
    }


def _changed_text(changed: Sequence[str]) -> list[str]:
    """The sentence that comes before all others where a file is not what the run left."""
    if not changed:
        return []
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return [
        f"Changed or removed since the run made them: {', '.join(changed[:5])}{more}. What this report says may not be "
        "true of them; restore them, or give the commands again that make them."
    ]


def _of_the_int8_stage(run: RunDirectory, manifest: Json, name: str) -> Json:
    """A file of the stage that made integers; empty where there is none."""
    for stage in reversed(entries(manifest, "stages")):
        if stage.get("kind") in ("quantize", "qat") and stage.get("id"):
            return _read_if_there(run.stage(str(stage["id"])) / name) or {}
    return {}


def _metrics(run: RunDirectory) -> list[Json]:
    try:
        return [record for record in run.read_metrics() if isinstance(record, dict)]
    except ValueError as error:
        raise RunError(f"{run.path / 'metrics.jsonl'}: a line of it is no JSON: {error}; remove that line") from error


def _read_if_there(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None


def _missing(run: RunDirectory, target: str, parity: Json | None, profile: Json | None) -> list[dict[str, str]]:
    wanted = (
        ("parity", "whether the exported files compute what PyTorch computes", ("export", "--int8"), parity),
        ("profile", "how fast and how large the files are on the target", ("profile",), profile),
    )
    return [
        {
            "what": what,
            "meaning": meaning,
            "command": command_text(words[0], str(run.path), *words[1:], "--target", target),
        }
        for what, meaning, words, found in wanted
        if found is None
    ]


def _subject(manifest: Json, recipe: Json) -> dict[str, Any]:
    model = section(manifest, "model").get("name") or section(recipe, "model").get("name")
    data = section(manifest, "data").get("name") or section(recipe, "data").get("name")
    facts = {
        "Model": model,
        "Data": data,
        "Run": manifest.get("started_at"),
        "Seed": manifest.get("seed"),
        "edgecompress": manifest.get("edgecompress_version"),
    }
    return {
        "description": " ".join(str(recipe.get("description") or "").split()),
        "facts": [{"label": label, "text": str(value)} for label, value in facts.items() if value not in (None, "")],
    }
