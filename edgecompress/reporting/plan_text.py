"""What a command would do, as a table for a terminal, and its sums in sentences.

What enters: the plan of a dry run. What leaves: rich's table and plain lines, the command without --dry-run last.
"""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from edgecompress.reporting.value_text import bytes_text
from edgecompress.run_directory import Json


def plan_table(document: Json) -> Table:
    """One row a step."""
    table = Table(title="What would be done", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "what", "time", "disk", "memory"):
        table.add_column(name, justify="left" if name in ("step", "what") else "right", overflow="fold")
    for step in document["steps"]:
        figures = [duration_text(step["seconds"]), bytes_text(step["disk_bytes"]), bytes_text(step["memory_bytes"])]
        table.add_row(Text(step["step"]), Text(step["what"]), *(["", "", ""] if step["done"] else figures))
    return table


def plan_lines(document: Json) -> list[str]:
    """Sums, warnings, and the next command."""
    search = document.get("search")
    place = "run directory" if search is None else "search directory"
    free, available = bytes_text(document["free_disk_bytes"]), bytes_text(document["available_memory_bytes"])
    return [
        *(_search_lines(search) if search is not None else ()),
        f"about {duration_text(document['seconds'])}, at most, as busy as the machine is now; "
        f"{bytes_text(document['disk_bytes'])} of disk ({free} free); "
        f"{bytes_text(document['memory_bytes'])} of memory at most ({available} available)",
        f"estimated in {document['probe']['seconds']:.1f} s from {document['probe']['how']}; int8 is rough",
        *(f"warning: {text}" for text in document["warnings"]),
        f"{place}: {document['output']}; nothing was written",
        f"next: {document['command']}",
    ]


def _search_lines(search: Json) -> list[str]:
    """How many trials, and over what."""
    done = f", {search['trials_done']} of them done" if search["trials_done"] else ""
    fit = " fit in the time" if search["limited_by"] == "time" else ""
    return [
        f"searched {'by default' if search['space_is_default'] else 'as declared'}:",
        *(f"  {text}" for text in search["space_in_words"]),
        f"{search['trials']} trials{fit}{done}; those that are given up early take less",
        *(f"not this machine, so nothing is timed: {text}" for text in search["not_measured_because"]),
    ]


def duration_text(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
