"""What a search found, for people: search.md, and the lines that the terminal shows.

What enters: the content of search.json. What leaves: Markdown, and plain lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgecompress.run_directory import Json

_MOST_TRIALS = 200  # in search.md; search.json holds all


def lines(document: Json) -> Iterator[str]:
    """The front as aligned rows, then the pick and why, then what stands in the way where there is none."""
    rows = [("trial", "accuracy", "latency", "size", "MACs", "run", "")]
    for row in document["front"]:
        mark = "<- pick" if row["trial"] == document["pick"] else "misses a limit" if row["missed"] else ""
        rows.append((*_cells(row), mark))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for cells in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    yield ""
    yield document["reason"]
    for point in document["nearest"]:
        yield f"Nearest: trial {point['trial']} ({point['run']})"
        yield from (f"  - {sentence}" for sentence in point["would_have_to_give"])
    yield from proxy_lines(document)
    spent = document["spent"]
    yield (
        f"{spent['complete']} trials complete, {spent['pruned']} given up early, {spent['failed']} failed; "
        f"{spent['training_epochs']} epochs trained, {spent['stages_from_cache']} stages taken from the cache, "
        f"{spent['seconds']:.0f} s"
    )


def markdown(document: Json) -> str:
    """The content of search.md."""
    head = [
        f"# Search: {document['recipe']} on {document['target']}",
        "",
        f"`{document['command']}`",
        "",
        f"Status: {document['status']}. {document['reason']}",
        "",
        *(f"- Nearest: trial {p['trial']}: {' '.join(p['would_have_to_give'])}" for p in document["nearest"]),
        *([""] if document["nearest"] else []),
        "## The front",
        "",
        "| trial | accuracy (val) | latency, median | size | MACs | run | limits missed |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join((*_cells(row), _cell(' '.join(row['missed']))))} |" for row in document["front"]),
        "",
        "## What was searched",
        "",
        *(f"- `{d['path']}`: {range_text(d)}" for d in document["space"]),
        "",
        "## Trials",
        "",
        "| trial | status | settings | what came of it |",
        "|---|---|---|---|",
        *(_trial_row(trial) for trial in document["trials"][:_MOST_TRIALS]),
    ]
    left = len(document["trials"]) - _MOST_TRIALS
    if left > 0:
        head.append(f"\n{left} more trials stand in search.json.")
    return "\n".join([*head, "", *(f"- {line}" for line in proxy_lines(document)), ""])


def proxy_lines(document: Json) -> Iterator[str]:
    """How well what was cheap ranked what was measured."""
    names = {
        "early_accuracy": "accuracy at the first early epoch ranked the final accuracy",
        "predicted_latency": "the table of layer times ranked the measured latency",
        "macs": "MACs ranked the measured latency",
    }
    for key, words in names.items():
        found = document["proxies"][key]
        if found["rank_correlation"] is not None:
            yield f"{words}: Spearman's rho {found['rank_correlation']:.2f} over {found['trials']} trials"


def _cells(row: Json) -> tuple[str, str, str, str, str, str]:
    latency = row["latency_ms_p50"]
    return (
        str(row["trial"]),
        f"{row['accuracy']:.2%}",
        "not measured" if latency is None else f"{latency:.4g} ms",
        f"{row['size_bytes'] / 1e3:.4g} kB",
        f"{row['macs'] / 1e6:.4g} M",
        str(row["run"]),
    )


def range_text(dimension: Json) -> str:
    """What a field may be, in words."""
    if "choices" in dimension:
        return ", ".join(f"`{choice}`" for choice in dimension["choices"])
    return f"{dimension['low']:g} to {dimension['high']:g}{' (log)' if dimension['log'] else ''}"


def _trial_row(trial: Json) -> str:
    settings = ", ".join(f"{path.removeprefix('stages.')}={value}" for path, value in trial["settings"].items())
    if trial["status"] == "complete":
        outcome = f"{trial['accuracy']:.2%} on val, cost {trial['cost']:.4g}"
    else:
        outcome = str(trial.get("reason") or trial["error"] or "")
    return f"| {trial['id']} | {trial['status']} | {_cell(settings)} | {_cell(outcome)} |"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
