"""What explains a latency, as tables for a terminal; and files side by side.

What enters: a profile's document. What leaves: rich tables and lines, in the units and words of `summary`. A part that
was not measured leaves no table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from edgecompress.reporting.summary import Json, entries, plain_table, section
from edgecompress.reporting.value_text import (
    MISSING,
    bytes_text,
    count_text,
    number_text,
    percent_text,
    printable,
    quantity_text,
)

_TOP = 8
_FILE_ROWS = (
    ("Latency, median", ("latency_ms", "p50")),
    ("Latency, 90th percentile", ("latency_ms", "p90")),
    ("Throughput", ("throughput_per_s",)),
    ("File size", ("size_bytes",)),
    ("Peak memory", ("peak_rss_bytes",)),
    ("of it by the model", ("model_rss_bytes",)),
    ("Arena", ("arena_bytes",)),
    ("Load time", ("load_ms",)),
    ("First inference", ("first_inference_ms",)),
    ("MACs on integers", ("int8_mac_coverage",)),
)


def interval_text(value: object, interval: object, unit: str = "") -> str:
    """`1.86 [1.81, 1.91]`, or the value alone where it has no interval."""
    if not isinstance(interval, (list, tuple)) or len(interval) != 2 or interval[0] == interval[1]:
        return f"{number_text(value)}{unit}"
    return f"{number_text(value)}{unit} [{number_text(interval[0])}, {number_text(interval[1])}]"


def files_table(document: Json) -> Table:
    """Every file a column, every figure a row, and how many times as fast as the first file each one is."""
    models = section(document, "models")
    where = printable(document.get("target", "this target"), limit=40)
    title = f"Measured on {where}" if document.get("measured") else f"Files for {where}, which was not at hand"
    table = plain_table(title, [("", False), *((printable(name, limit=30), True) for name in models)])
    for label, keys in _FILE_ROWS:
        values = [section(model, *keys[:-1]).get(keys[-1]) for model in models.values()]
        if any(value is not None for value in values):
            table.add_row(label, *(Text(quantity_text(value, "_".join(keys))) for value in values))
    table.add_row("MACs", *(Text(count_text(model.get("macs"))) for model in models.values()))
    reference = document.get("reference")
    if document.get("measured") and len(models) > 1:
        ratios = section(document, "ratios")
        cells = [
            "reference" if name == reference else interval_text(ratios[name]["ratio"], ratios[name]["ci95"], "x")
            for name in models
        ]
        table.add_row("Speed against the first", *(Text(cell) for cell in cells))
    return table


def comparison_table(document: Json) -> Table:
    """The figures of compared runs side by side, each with its difference to the first."""
    names = [printable(candidate["name"], limit=40) for candidate in entries(document, "candidates")]
    table = plain_table("Side by side", [("", False), *((f"{k}: {name}", True) for k, name in enumerate(names, 1))])
    for row in entries(document, "metrics"):
        cells = [
            "\n".join(filter(None, [cell["text"], *((cell["difference_text"], cell["images_text"]) if k else ())]))
            for k, cell in enumerate(row["cells"])
        ]
        table.add_row(row["label"], *(Text(cell) for cell in cells))
    verdicts = [Text(str(candidate["label"])) for candidate in entries(document, "candidates")]
    table.add_row("Verdict", *verdicts)
    return table


def explanation_tables(document: Json) -> Iterator[Table | Text]:
    """Scaling, modules, roofline, options and providers, as far as they are there."""
    for name, tables in section(document, "scaling").items():
        yield from _scaling(name, tables or {})
    for name, model in section(document, "models").items():
        yield from _modules(name, model)
    yield from _roofline(section(document, "roofline"))
    yield from _providers(section(document, "providers"))
    yield from _options(section(document, "options"))


def scaling_rows(tables: Json) -> list[dict[str, str]]:
    """The rows of one model's sweep as texts: `what`, `latency`, `throughput`, `gain`, `efficiency`."""
    rows = []
    for key, word, ratio in (("threads", "thread", "speedup"), ("batch", "image", "gain")):
        for row in entries(tables, key):
            count = row[key]
            what = f"{count} {word}{'' if count == 1 else 's'}" + (" at a time" if key == "batch" else "")
            rows.append(
                {
                    "what": what,
                    "latency": f"{number_text(row['latency_ms_p50'])} ms",
                    "throughput": f"{number_text(row['throughput_per_s'])}/s",
                    "gain": "1" if count == 1 else interval_text(row[ratio], row[f"{ratio}_ci95"]),
                    "efficiency": percent_text(row["efficiency"]) if key == "threads" else MISSING,
                }
            )
    return rows


def _scaling(name: str, tables: Json) -> Iterator[Table | Text]:
    rows = scaling_rows(tables)
    if rows:
        headers = [("", False), *((word, True) for word in ("latency", "throughput", "gain", "efficiency"))]
        table = plain_table(f"Scaling of {printable(name, limit=40)}", headers)
        for row in rows:
            table.add_row(*(Text(row[key]) for key in ("what", "latency", "throughput", "gain", "efficiency")))
        yield table
    for text in tables.get("left_out") or []:
        yield Text(f"Not swept for {printable(name, limit=40)}: {printable(text)}.")


def _modules(name: str, model: Json) -> Iterator[Table]:
    rows = entries(model, "modules")
    if not rows:
        return
    title = f"Where {printable(name, limit=40)} spends its time, by ONNX Runtime's profile"
    table = plain_table(title, [("module", False), ("ms", True), ("share", True), ("kernels", False)])
    for row in module_rows(rows, _TOP):
        table.add_row(*(Text(row[key]) for key in ("module", "ms", "share", "kernels")))
    yield table


def module_rows(rows: Sequence[Json], most: int) -> list[dict[str, str]]:
    """The dearest modules as texts, and one row for all others."""
    named = [row for row in rows if row.get("module") is not None]
    shown, hidden = named[:most], [*named[most:], *(row for row in rows if row.get("module") is None)]
    texts = [
        {
            "module": printable(row["module"], limit=60),
            "ms": number_text(row["ms"]),
            "share": percent_text(row["share"]),
            "kernels": printable(_kernels(row), limit=80),
        }
        for row in shown
    ]
    if hidden:
        count = sum(int(row.get("modules", 1)) for row in hidden)
        total = {key: sum(row[key] for row in hidden) for key in ("ms", "share")}
        ms, share = number_text(total["ms"]), percent_text(total["share"])
        texts.append({"module": f"{count} more", "ms": ms, "share": share, "kernels": ""})
    return texts


def _kernels(row: Json) -> str:
    return ", ".join(
        f"{count} {name}" if count != 1 else str(name) for name, count in section(row, "operators").items()
    )


def roofline_sentences(roofline: Json) -> list[str]:
    """What the machine can do at most, and the share of it that each model reaches."""
    sentences = []
    for count, peak in section(roofline, "threads").items():
        threads = f"{count} thread{'' if count == '1' else 's'}"
        sentences.append(
            f"Peak of {threads}, measured here: {number_text(peak['float_gmacs_per_s'])} GMAC/s in float, "
            f"{number_text(peak['int8_gmacs_per_s'])} in int8; memory {number_text(peak['memory_gb_per_s'])} GB/s."
        )
    for name, share in section(roofline, "models").items():
        sentences.append(
            f"{printable(name, limit=40)} runs at {number_text(share['gmacs_per_s'])} GMAC/s: "
            f"{percent_text(share['share_of_peak'])} of the peak for its mix of float and int8, "
            f"{percent_text(share['share_of_convolution_peak'])} of what convolutions reach."
        )
    return sentences


def _roofline(roofline: Json) -> Iterator[Text]:
    for sentence in roofline_sentences(roofline):
        yield Text(sentence)


def _providers(providers: Json) -> Iterator[Table | Text]:
    if not providers:
        return
    title = f"Execution providers for {printable(providers.get('model'), limit=40)}"
    headers = [("provider", False), ("median", True), ("speed against CPU", True), ("nodes it took", True)]
    table = plain_table(title, headers)
    for row in entries(providers, "rows"):
        if row.get("error"):
            table.add_row(row["provider"], MISSING, MISSING, Text(printable(row["error"], limit=60)))
            continue
        took = section(row, "nodes_by_provider")
        nodes = f"{took.get(row['provider'], 0)} of {sum(took.values())}" if took else MISSING
        ratio = interval_text(row["speedup"], row["speedup_ci95"], "x")
        table.add_row(row["provider"], f"{number_text(row['latency_ms_p50'])} ms", ratio, nodes)
    yield table
    if providers.get("absent"):
        yield Text(f"Not in this build of ONNX Runtime: {', '.join(providers['absent'])}.")


def _options(options: Json) -> Iterator[Table | Text]:
    if not options:
        return
    title = f"Session options for {printable(options.get('model'), limit=40)}, each alone"
    table = plain_table(title, [("option", False), ("median", True), ("speed against the target's", True)])
    for row in entries(options, "rows"):
        ratio = interval_text(row["speedup"], row["speedup_ci95"], "x")
        table.add_row(row["option"], f"{number_text(row['latency_ms_p50'])} ms", ratio)
    yield table
    yield Text(options_sentence(options))
    yield Text(str(section(options, "best").get("python", "")))


def options_sentence(options: Json) -> str:
    """Which options are worth setting, and what they bring as measured again, together where they are several."""
    used = section(options, "best").get("options") or []
    checked = section(options, "checked")
    gain = interval_text(checked.get("speedup"), checked.get("speedup_ci95"), "x")
    if not used and checked:
        return f"None of them is better beyond doubt when measured again ({gain}); the target's own settings stay:"
    if not used:
        return "None of them is better beyond doubt; the target's own settings stay:"
    return f"Better beyond doubt, and {gain} {'together' if len(used) > 1 else 'again'}: {', '.join(used)}. To copy:"


def memory_sentence(models: Mapping[str, Any]) -> str | None:
    """What each model adds to the process, and what the arena takes of it."""
    parts = [
        f"{printable(name, limit=40)} adds {bytes_text(model.get('model_rss_bytes'))} to the process"
        + (f" (arena {bytes_text(model['arena_bytes'])})" if model.get("arena_bytes") is not None else "")
        for name, model in models.items()
        if model.get("model_rss_bytes") is not None
    ]
    return f"Memory: {'; '.join(parts)}." if parts else None


def budget_lines(document: Json) -> list[str]:
    """The target's budgets for each file, one reason a line."""
    words = {"met": "MET", "missed": "MISSED", "open": "OPEN"}
    lines = [f"Budgets of {printable(document.get('target', 'this target'))}"]
    for name, budget in section(document, "budgets").items():
        lines.append(f"  {printable(name, limit=40)}: {words[budget['status']]}")
        lines += [f"    - {' '.join(printable(reason).split())}" for reason in budget["reasons"]]
    return lines
