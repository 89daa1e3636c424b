"""Can I trust it? Parity at every hand-over, the classes and images that int8 changed, confidence, and layers.

What enters: the manifest, parity.json, and what `sensitivity` and `debug-int8` left. What leaves: the facts of the
page's third question, the pictures of flipped images within them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecompress.reporting import summary, value_text
from edgecompress.reporting.fact_rows import command_text, fact_rows, sayings
from edgecompress.reporting.figures import figures_of
from edgecompress.reporting.summary import Json, entries, section
from edgecompress.reporting.trust_figures import calibration_rows, class_figure, layer_figure, reliability_figure
from edgecompress.reporting.value_text import number

WORST_CLASSES = 20
_NAME_CHARACTERS = 80
_PICTURE_BYTES = 40_000  # a larger file is none of ours
_PNG = b"\x89PNG\r\n\x1a\n"
_TORCH_AGREEMENT = "torch_int8_top1_agreement"
_FP32_DIFFERENCES = {"largest difference": "max_abs_diff", "relative": "max_relative_diff"}
_INT8_DIFFERENCES = {"signal to noise": "sqnr_db"}
_TORCH_DIFFERENCES = {"largest difference": "torch_int8_max_abs_diff"}


def class_rows(parity: Json) -> list[dict[str, Any]]:
    """Every class with both accuracies, worst change first."""
    rows: list[dict[str, Any]] = []
    for entry in entries(parity, "classes"):
        before, after = number(entry.get("accuracy_fp32")), number(entry.get("accuracy_int8"))
        if before is None or after is None:
            continue
        flips = entry.get("flips")
        row = {
            "name": value_text.printable(entry.get("name", "?"), limit=_NAME_CHARACTERS),
            "samples": entry.get("samples"),
        }
        row |= {"accuracy_fp32": before, "accuracy_int8": after, "delta": after - before}
        rows.append(row | {"flips": len(flips) if isinstance(flips, list) else flips})
    return sorted(rows, key=lambda row: (row["delta"], -(number(row["flips"]) or 0.0), row["name"]))


def trust_facts(
    manifest: Json,
    parity: Json,
    target: str,
    *,
    pictures: Path | None = None,
    sensitivity: Json | None = None,
    debug: Json | None = None,
    run: str | None = None,
) -> dict[str, Any]:
    """Parity, gates, the classes and images that int8 changed most, confidence, and the layers that lose.

    `pictures` is the folder that parity.json's pictures of flipped images are relative to.
    """
    classes = class_rows(parity)
    changed = [row for row in classes if row["delta"] != 0 or row["flips"]]
    gates = [gate for gate in entries(manifest, "gates") if gate.get("target") in (None, target)]
    return {
        "parity": {key: parity.get(key) for key in ("target", "samples", "split", "constant_predictions")},
        "accuracy": {name: section(parity, "onnx_int8").get(f"accuracy_{name}") for name in ("fp32", "int8")},
        "comparisons": [
            *_comparisons(parity, {str(gate.get("gate")): gate.get("passed") for gate in gates}),
            *_other_comparisons(parity),
        ],
        "remarks": [*parity_remarks(parity), *layer_notes(manifest)],
        "scheme": fact_rows(
            {
                **section(parity, "onnx_int8", "scheme"),
                "layers_kept_in_float": section(parity, "onnx_int8").get("float_layers"),
            }
        ),
        "gates": [
            {
                "label": value_text.gate_label(gate),
                "name": name,
                **{key: gate.get(key) for key in ("value", "limit", "passed")},
            }
            for gate, name in ((gate, str(gate.get("gate", "gate"))) for gate in gates)
        ],
        "figures": figures_of(reliability_figure(parity), class_figure(classes), layer_figure(sensitivity or {})),
        "confidence": calibration_rows(parity, summary.stage_rows(manifest)),
        "confusions": _confusions(parity),
        "flipped": _flipped(parity, pictures),
        "causes": _causes(debug or {}),
        "layers_studied": bool(sensitivity),
        "study": command_text("debug-int8", *([run] if run else []), "--target", target),
        "classes": changed[:WORST_CLASSES],
        "classes_total": len(classes),
        "classes_changed": len(changed),
        "classes_hidden": max(0, len(changed) - WORST_CLASSES),
    }


def layer_notes(manifest: Json) -> list[str]:
    """What stages found about layers that no gate asks for."""
    return [note for stage in entries(manifest, "stages") for note in sayings(stage.get("layer_notes"))]


def _comparisons(parity: Json, passed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each hand-over; `passed` holds the gates' outcomes, which are finer than the file's own."""
    fp32, int8 = section(parity, "onnx_fp32"), section(parity, "onnx_int8")
    wanted = (
        ("ONNX fp32", "PyTorch fp32", fp32, "fp32_min_top1_agreement", "top1_agreement", _FP32_DIFFERENCES),
        ("ONNX int8", "ONNX fp32", int8, "int8_min_top1_agreement", "top1_agreement", _INT8_DIFFERENCES),
        ("ONNX int8", "PyTorch int8", int8, "torch_int8_min_top1_agreement", _TORCH_AGREEMENT, _TORCH_DIFFERENCES),
    )
    rows = []
    for what, against, facts, gate, agreement, differences in wanted:
        known = [(label, facts[key], key) for label, key in differences.items() if facts.get(key) is not None]
        if known or facts.get(agreement) is not None:
            row = {
                "what": what,
                "against": against,
                "agreement": value_text.quantity_text(facts.get(agreement), agreement),
            }
            row["rest"] = ", ".join(f"{label} {value_text.quantity_text(value, key)}" for label, value, key in known)
            # What the file says of itself covers both int8 rows: a pass holds for each, a miss only for one.
            own = facts.get("passed") if facts is fp32 or facts.get("passed") else None
            rows.append({**row, "passed": own if passed.get(gate) is None or own is False else passed[gate]})
    return rows


def _other_comparisons(parity: Json) -> list[dict[str, Any]]:
    """The same files in other settings, in ORT format, and with the preprocessing inside."""
    parts: list[tuple[str, str, Json]] = []
    for precision in ("fp32", "int8"):
        for run in entries(section(parity, "variants", precision), "runs"):
            optimizer = "" if run.get("graph_optimization") == "all" else ", optimizer off"
            way = f"batch {run.get('batch')}, threads: {run.get('threads')}{optimizer}"
            parts.append((f"ONNX {precision}, {way}", "its usual run", run))
        parts.append((f"ORT format {precision}", f"ONNX {precision}", section(parity, "ort_format", precision)))
        inside = section(parity, "with_preprocessing", precision)
        parts.append((f"ONNX {precision}, preprocessing inside", "Python preprocessing", inside))
    return [
        {
            "what": what,
            "against": against,
            "agreement": value_text.quantity_text(facts.get("top1_agreement"), "top1_agreement"),
            "rest": ", ".join(
                f"{label} {value_text.quantity_text(facts[key], key)}"
                for label, key in _FP32_DIFFERENCES.items()
                if facts.get(key) is not None
            ),
            "passed": facts.get("passed"),
        }
        for what, against, facts in parts
        if facts.get("top1_agreement") is not None
    ]


def parity_remarks(parity: Json) -> list[str]:
    """What else parity found, as sentences: chance or not, the worst class, what phones can run."""
    test, worst = section(parity, "onnx_int8", "mcnemar"), section(parity, "worst_class")
    remarks: list[object] = []
    if number(test.get("p_value")) is not None:
        remarks.append(
            f"Int8 lost {test.get('lost')} image{'s' * (test.get('lost') != 1)} that fp32 had right "
            f"and won {test.get('won')} (McNemar's exact test: p = {test['p_value']:.2g})."
        )
    remarks += [worst["sentence"]] if worst.get("sentence") else []
    for precision, answer in section(parity, "ort_format", "mobile_usability").items():
        verdicts = [
            f"{name.replace('_', ' ')} {section(answer, name).get('with_fixed_shapes')}"
            for name in ("nnapi", "coreml_neuralnetwork", "coreml_mlprogram")
        ]
        remarks.append(
            f"ONNX Runtime's mobile usability checker on {precision}, with shapes fixed: {', '.join(verdicts)}."
        )
    return sayings(remarks)


def _confusions(parity: Json) -> dict[str, Any]:
    """Which class is answered in place of which, where int8 changed how often."""
    rows = [
        {
            **{key: value_text.printable(row.get(key, "?"), limit=_NAME_CHARACTERS) for key in ("class", "answer")},
            **{key: int(number(row.get(key)) or 0) for key in ("fp32", "int8")},
        }
        for row in entries(section(parity, "confusions"), "rows")
    ]
    changed = number(section(parity, "confusions").get("changed"))
    return {"rows": rows, "hidden": max(0, int(changed or 0) - len(rows))}


def _flipped(parity: Json, folder: Path | None) -> list[dict[str, Any]]:
    """The flipped images that parity.json names, by class, each with its picture as a data URI where it is there."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in entries(parity, "flipped"):
        name = value_text.printable(row.get("class", "?"), limit=_NAME_CHARACTERS)
        change = "lost" if row.get("lost") else "won" if row.get("won") else "wrong before and after"
        groups.setdefault(name, []).append(
            {
                "image": value_text.printable(
                    row.get("file") or f"image {row.get('image', '?')}", limit=_NAME_CHARACTERS
                ),
                "picture": _picture(folder, row.get("picture")),
                "change": change,
                **{
                    key: f"{value_text.printable(row.get(key, '?'), limit=40)} "
                    f"({value_text.percent_text(row.get(f'{key}_confidence'))} sure)"
                    for key in ("fp32", "int8")
                },
            }
        )
    return [{"name": name, "images": images} for name, images in groups.items()]


def _picture(folder: Path | None, name: object) -> str | None:
    """A PNG file of the export as a data URI; None where it is not there, or is something else."""
    if folder is None or not isinstance(name, str):
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > _PICTURE_BYTES:
        return None
    content = path.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(_PNG) else None


def _causes(debug: Json) -> list[dict[str, Any]]:
    """Why layers lose, and what mends it, as debug-int8 found."""
    found = [(row.get("layer"), cause) for row in entries(debug, "layers") for cause in entries(row, "causes")]
    found += [("the whole model", cause) for cause in entries(debug, "model")]
    return [
        {
            "layer": value_text.printable(layer, limit=_NAME_CHARACTERS),
            "words": value_text.printable(cause.get("words", ""), limit=600),
            "setting": value_text.printable(cause.get("setting") or "", limit=600),
        }
        for layer, cause in found
    ]
