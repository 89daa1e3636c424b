"""`debug-int8`: which layers of a run's model lose most by int8, why, and what to set.

What enters: a run whose quantize stage is complete, and its exported int8 file where there is one. What leaves:
stages/<id>/debug.json, and the same in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgecompress.errors import ProfileError
from edgecompress.int8.diagnosis import HEALTHY_DB, diagnose
from edgecompress.int8.scheme import names_vnni, sums_in_32_bits
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.reporting.summary import entries, section
from edgecompress.reporting.value_text import number, percent_text, printable
from edgecompress.run_directory import Json, RunDirectory, versioned
from edgecompress.settings.target import Target
from edgecompress.steps.export_run import export_folder
from edgecompress.steps.sensitivity_run import remake, sensitivity_of

FILE = "debug.json"
INT8_FILE = "model.int8.onnx"
_ISLANDS = 5
_SMALL_PART = 0.05


def debug_run(run: RunDirectory, target: Target, *, images: int, worst: int) -> Json:
    """Diagnose the `worst` layers on up to `images` held-out images; returns the content of debug.json.

    Leaves sensitivity.json as well. Raises RunError where the quantize stage is not complete, or was trained.
    """
    remade = remake(run, images=images)
    measured, found = sensitivity_of(run, remade)
    findings = diagnose(
        remade.mixed,
        remade.images,
        found,
        calibration=remade.calibration(),
        stage=remade.stage,
        saturates=adds_in_16_bits(target),
        worst=worst,
    )
    document: Json = {
        **remade.facts,
        "target": target.name,
        "images": measured["images"],
        "full": measured["full"],
        "layers_in_int8": len(found.layers),
        **findings.to_dict(),
        "exported": _exported(run, target),
    }
    document = versioned(document)
    run.write_document(run.stage(remade.stage.id) / FILE, document)
    return document


def adds_in_16_bits(target: Target) -> bool:
    """Whether a target's kernels add products in 16 bits, which saturate: x86 without VNNI."""
    if target.architecture != "x86_64" or names_vnni(target):
        return False
    return target.int8.weight_bits == 7 or not sums_in_32_bits(target)[0]


def _exported(run: RunDirectory, target: Target) -> Json | None:
    """What the runtime makes of the exported int8 file; None where nothing was exported for the target."""
    file = export_folder(run, target) / INT8_FILE
    if not file.is_file():
        return None
    name = str(file.relative_to(run.path))
    try:
        graph = inspect_integer_graph(file, int8_activations=target.fuses_int8_activations)
    except ProfileError as error:
        return {"file": name, "error": str(error)}
    return {"file": name, "int8_mac_coverage": graph.int8_mac_coverage, "float_islands": graph.float_islands}


def debug_text(document: Mapping[str, Any]) -> Iterator[str]:
    """The document in lines of prose, the worst layer first."""
    full = section(document, "full")
    layers = entries(document, "layers")
    yield (
        f"Full int8: {_decibels(full.get('sqnr_db'))}, {percent_text(full.get('agreement'))} agreement with float, on "
        f"{document.get('images')} held-out images of val. The {len(layers)} of {document.get('layers_in_int8')} int8 "
        "layers that lose most alone:"
    )
    for place, layer in enumerate(layers, start=1):
        yield ""
        yield (
            f"{place}. {printable(layer['layer'])}: {_decibels(layer['alone_sqnr_db'])} alone in int8; its return to "
            f"float changes full int8 by {number(layer['gain_db']) or 0.0:+.1f} dB"
        )
        parts = sorted(layer["parts"].items(), key=lambda part: -float(part[1]))
        named = [f"{float(share):.0%} by {name}" for name, share in parts if float(share) >= _SMALL_PART]
        yield f"   lost by rounding: {', '.join(named)}".replace("% ", " % ")
        for cause in entries(layer, "causes"):
            yield from _cause(cause, full)
        if not layer["causes"]:
            yield f"   {_nothing(layer)}"
    if document.get("model"):
        yield ""
        yield "The model as a whole:"
        for cause in entries(document, "model"):
            yield from _cause(cause, full)
    yield from _exported_text(section(document, "exported"))
    yield ""
    methods = ", ".join(f"{name} {_decibels(value)}" for name, value in section(document, "methods").items())
    yield f"Full int8 by calibration.method, simulated: {methods}."


def _cause(cause: Mapping[str, Any], full: Mapping[str, Any]) -> Iterator[str]:
    yield f"   {cause['kind']}: {cause['words']}"
    then = number(cause["full_sqnr_db"])
    effect = f"  (full int8 then {_decibels(then)}, now {_decibels(full.get('sqnr_db'))})" if then is not None else ""
    yield f"     set: {cause['setting']}{effect}"


def _nothing(layer: Mapping[str, Any]) -> str:
    if (number(layer["alone_sqnr_db"]) or 0.0) >= HEALTHY_DB:
        return f"nothing wrong: it loses little (above {HEALTHY_DB:g} dB)"
    return "nothing wrong: the usual cost of 8 bits; no range, channel or weight stands out"


def _exported_text(exported: Mapping[str, Any]) -> Iterator[str]:
    if not exported:
        return
    yield ""
    if "error" in exported:
        yield f"{exported['file']} could not be inspected: {exported['error']}"
        return
    yield f"{exported['file']} in ONNX Runtime: {percent_text(exported['int8_mac_coverage'])} of the MACs on integers"
    islands = entries(exported, "float_islands")
    for island in islands[:_ISLANDS]:
        operators = ", ".join(f"{count} {name}" for name, count in island["op_types"].items())
        first = printable(island["nodes"][0], limit=60)
        yield f"   in float: {operators}, {percent_text(island['macs_share'])} of the MACs, from {first}"
    if len(islands) > _ISLANDS:
        yield f"   and {len(islands) - _ISLANDS} more float islands"


def _decibels(value: Any) -> str:
    found = number(value)
    return "no loss" if found is None else f"{found:.1f} dB"
