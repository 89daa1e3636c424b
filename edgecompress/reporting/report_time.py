"""Where does the time go? Operators, what stays in float, scaling, the roofline, and how quiet the measuring was.

What enters: a profile, and parity.json where the profile lacks an operator count. What leaves: the facts of the page's
fourth question.
"""

from __future__ import annotations

from typing import Any

from edgecompress.reporting import profile_text, summary, value_text
from edgecompress.reporting.fact_rows import fact_rows, sayings
from edgecompress.reporting.figures import figures_of
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.time_figures import (
    distribution_figure,
    memory_figure,
    operator_figure,
    roofline_figure,
    scaling_figure,
)
from edgecompress.reporting.value_text import number

_ISLAND_NAMES = 6
_MODULES = 10


def time_facts(profile: Json, parity: Json) -> dict[str, Any]:
    """Where does the time go? Operators, what stays in float, and how quiet the measuring was."""
    models = {name: section(profile, "models", name) for name in ("fp32", "int8")}
    int8_graph = section(parity, "onnx_int8")
    counts = {name: section(profile, "op_counts", name) or section(models[name], "op_counts") for name in models}
    counts["int8"] = counts["int8"] or section(int8_graph, "op_counts")
    operators = sorted(
        {*counts["fp32"], *counts["int8"]},
        key=lambda op: (*(-(number(counts[name].get(op)) or 0) for name in ("int8", "fp32")), op),
    )
    coverages = (source.get("int8_mac_coverage") for source in (profile, int8_graph))
    islands = entries(profile, "float_islands") or entries(models["int8"], "float_islands")
    device = section(profile, "device")
    return {
        **_explained(profile),
        "figures": figures_of(
            distribution_figure(profile),
            operator_figure(profile),
            scaling_figure(profile, "threads"),
            scaling_figure(profile, "batch"),
            roofline_figure(profile),
            memory_figure(profile),
        ),
        "operators": [
            {"name": op, "kind": _operator_kind(op), "fp32": counts["fp32"].get(op), "int8": counts["int8"].get(op)}
            for op in operators
        ],
        "coverage": next((coverage for coverage in coverages if coverage is not None), None),
        "islands": [_island(island) for island in islands],
        "islands_hidden": max(0, int(number(models["int8"].get("float_islands_total")) or 0) - len(islands)),
        "notes": sayings(profile.get("notes")),
        "measured_on": device.get("summary") or device.get("cpu"),
        "device": fact_rows({key: value for key, value in device.items() if key != "summary"}),
        "noise": fact_rows(section(profile, "noise")),
        "method": fact_rows(section(profile, "method")),
        "target_facts": fact_rows(section(profile, "target_facts")),
    }


def _explained(profile: Json) -> dict[str, Any]:
    """What explains the latency of the model that ships: its modules, its scaling, the roofline, memory, options."""
    shipped = summary.shipped_model(profile)
    options = section(profile, "options")
    return {
        "explained": shipped,
        "modules": profile_text.module_rows(entries(section(profile, "models", shipped), "modules"), _MODULES),
        "scaling": profile_text.scaling_rows(section(profile, "scaling", shipped)),
        "roofline": profile_text.roofline_sentences(section(profile, "roofline")),
        "memory": profile_text.memory_sentence(section(profile, "models")),
        "options": {
            "sentence": profile_text.options_sentence(options) if options else None,
            "python": section(options, "best").get("python"),
        },
    }


def _operator_kind(operator: str) -> str:
    name = operator.rsplit(".", 1)[-1]
    if name in ("QuantizeLinear", "DequantizeLinear"):
        return "conversion"
    return "integer" if name.startswith(("QLinear", "QGemm", "QAttention")) or name.endswith("Integer") else "other"


def _island(island: Json) -> dict[str, Any]:
    given = island.get("nodes", island.get("names", island.get("name")))
    names = [str(name) for name in given] if isinstance(given, list) else [str(given)] if given is not None else []
    hidden = max(0, len(names) - _ISLAND_NAMES)
    types = ", ".join(str(name) for name in section(island, "op_types"))
    named = ("op_type", "op_types", "names", "name", "nodes", "reason")
    others = {key: value for key, value in island.items() if key not in named}
    return {
        "op_type": types or island.get("op_type", "?"),
        "reason": value_text.printable(island["reason"]) if island.get("reason") else None,
        "names": names[:_ISLAND_NAMES],
        "hidden": hidden,
        "facts": fact_rows(others),
    }
