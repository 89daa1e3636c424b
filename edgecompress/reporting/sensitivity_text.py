"""What each group of channels is worth, as a table for a terminal, and the proposal as lines for a recipe.

What enters: the channels' part of sensitivity.json. What leaves: a rich table and plain lines.
"""

from __future__ import annotations

import json

from rich import box
from rich.table import Table
from rich.text import Text

from edgecompress.reporting.summary import Json, entries
from edgecompress.reporting.value_text import number_text, percent_text, printable


def channels_table(document: Json) -> Table:
    """One row a group and ratio, in the model's order."""
    table = Table(title=Text("Sensitivity to pruning"), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.caption_justify = "left"
    table.add_column("channels of", overflow="fold")
    for header in ("removed", "accuracy", "loss", "MACs", "latency [95 %]"):
        table.add_column(header, justify="right", overflow="fold")
    for group in entries(document, "groups"):
        name = printable(group["group"], limit=40)
        others = len(group["layers"]) - 1
        label = f"{name} and {others} more" if others else name
        if not group["points"]:
            table.add_row(Text(label), "too few", *(["-"] * 4))
        for point in group["points"]:
            removed = round(point["removed"] * group["channels"])
            cells = [
                f"{removed} of {group['channels']}",
                percent_text(point["accuracy"]),
                f"{point['loss_increase']:+.3f}",
                f"-{percent_text(point['removed_macs'])}",
                _latency(point["latency"]),
            ]
            table.add_row(Text(label), *(Text(cell) for cell in cells))
            label = ""
    reasons = document.get("not_timed_because") or []
    untimed = f"; latency was not measured: {'; '.join(reasons)}" if reasons else ""
    table.caption = Text(
        f"model {document['stage']}: accuracy {percent_text(document['accuracy'])} on {document['images']} held-out "
        f"images; each group cut alone by {document['importance']}, to multiples of {document['channel_multiple']}, "
        f"batch norm settled, not finetuned{untimed}"
    )
    return table


def proposal_lines(proposal: Json) -> list[str]:
    """The proposed ratios as they stand in a recipe."""
    if proposal["layer_ratios"] is None:
        return [str(proposal["reason"])]
    removed = percent_text(proposal["removed_macs"])
    first = f"proposed for macs_ratio {proposal['macs_ratio']:g} (removes {removed} of the MACs):"
    rows = [f"      {json.dumps(name)}: {ratio:g}" for name, ratio in proposal["layer_ratios"].items()]
    return [first, "    layer_ratios:", *rows]


def _latency(latency: Json | None) -> str:
    if latency is None:
        return "-"
    low, share, high = (number_text(latency[key]) for key in ("low", "share", "high"))
    return f"x {share} [{low}, {high}]"
