"""What was found about layers and placements, as tables for a terminal.

What enters: placement.json and sensitivity.json as documents. What leaves: rich tables.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.value_text import bytes_text, number, number_text, percent_text, printable

_NAMED = 3


def placement_table(document: Json) -> Table:
    """Every placement that was tried, the chosen one marked, those on the front with a star."""
    table = _table("Placements", "placement", "in float", "agreement", "SQNR", "accuracy", "size", "fp32 / this [95 %]")
    front = document.get("front") or []
    for trial in entries(document, "trials"):
        name = str(trial["id"]) + (" *" if trial["id"] in front else "")
        chosen = trial["id"] == document.get("choice")
        cells = [
            f"{name} (chosen)" if chosen else name,
            _names(trial["float_layers"]),
            percent_text(trial["agreement"]),
            _decibels(trial["sqnr_db"]),
            percent_text(trial["accuracy"]),
            bytes_text(trial["size_bytes"]),
            _ratio(trial),
        ]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if chosen else None)
    table.caption = Text("on held-out images; * not beaten in both latency and agreement")
    return table


def sensitivity_table(document: Json) -> Table:
    """Every layer, the one that loses most first."""
    full = section(document, "full")
    table = _table("Sensitivity to int8", "layer", "alone", "alone agrees", "all but this", "agrees", "gain")
    for row in sorted(entries(document, "layers"), key=lambda row: -(number(row["alone_noise"]) or 0.0)):
        cells = [
            printable(row["layer"], limit=40),
            _decibels(row["alone_sqnr_db"]),
            percent_text(row["alone_agreement"]),
            _decibels(row["without_sqnr_db"]),
            percent_text(row["without_agreement"]),
            f"{row['gain_db']:+.2f} dB" if number(row["gain_db"]) is not None else "-",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    table.caption = Text(
        f"full int8: {_decibels(full.get('sqnr_db'))}, {percent_text(full.get('agreement'))} agreement with float; "
        f"{document.get('images')} held-out images; alone: only this layer in int8; gain: by its return to float"
    )
    return table


def _names(layers: Any) -> str:
    names = [printable(layer, limit=30) for layer in layers]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more if names else "none (full int8)"


def _decibels(value: object) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.1f} dB"


def _ratio(trial: Json) -> str:
    ratio = number(trial.get("speedup"))
    if ratio is None:
        return "not measured"
    low, high = trial["speedup_ci95"]
    return f"{number_text(ratio)} [{number_text(low)}, {number_text(high)}]"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column(first, overflow="fold")
    for header in others:
        table.add_column(header, justify="left" if header == "in float" else "right", overflow="fold")
    return table
