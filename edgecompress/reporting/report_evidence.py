"""What stands behind a report's verdict: parity, operators and measuring, and how to make the run again.

What enters: the manifest, the parity and the profile of a run. What leaves: the facts for the last three questions of
the page. Whatever others record (noise, machine, preprocessing) is shown as rows of label and text, so that
a new key reaches the page without a change here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from edgecompress.reporting import profile_text, summary
from edgecompress.reporting.summary import Json, entries, number, section
from edgecompress.run_directory import RunDirectory

WORST_CLASSES = 20
_NAME_CHARACTERS = 80
_SAYING_CHARACTERS = 600
_ISLAND_NAMES = 6
_MODULES = 10
_TORCH_AGREEMENT = "torch_int8_top1_agreement"
_FP32_DIFFERENCES = {"largest difference": "max_abs_diff", "relative": "max_relative_diff"}
_INT8_DIFFERENCES = {"signal to noise": "sqnr_db"}
_TORCH_DIFFERENCES = {"largest difference": "torch_int8_max_abs_diff"}


def run_words(manifest: Json, target: str) -> list[str]:
    """The arguments of `edgecompress` that do this run again for one target."""
    source = str(manifest.get("recipe_source") or manifest.get("recipe_name") or "recipe.yaml")
    overrides = [word for override in manifest.get("overrides") or [] for word in ("--set", str(override))]
    return ["run", source, "--target", target, *overrides]


def command_text(*words: str) -> str:
    """An `edgecompress` command, quoted for a shell."""
    return shlex.join(["edgecompress", *words])


def sayings(texts: object) -> list[str]:
    """Sentences that others wrote, none of them longer than a paragraph."""
    return [summary.printable(text, limit=_SAYING_CHARACTERS) for text in texts] if isinstance(texts, list) else []


def loud_notes(manifest: Json) -> list[str]:
    """The run's notes that come before anything else: all but those that only describe the data."""
    quiet = sayings(section(manifest, "data").get("notes"))
    return [note for note in sayings(manifest.get("notes")) if note not in quiet]


def class_rows(parity: Json) -> list[dict[str, Any]]:
    """Every class with both accuracies, worst change first."""
    rows: list[dict[str, Any]] = []
    for entry in entries(parity, "classes"):
        before, after = number(entry.get("accuracy_fp32")), number(entry.get("accuracy_int8"))
        if before is None or after is None:
            continue
        flips = entry.get("flips")
        row = {
            "name": summary.printable(entry.get("name", "?"), limit=_NAME_CHARACTERS),
            "samples": entry.get("samples"),
        }
        row |= {"accuracy_fp32": before, "accuracy_int8": after, "delta": after - before}
        rows.append(row | {"flips": len(flips) if isinstance(flips, list) else flips})
    return sorted(rows, key=lambda row: (row["delta"], -(number(row["flips"]) or 0.0), row["name"]))


def trust_facts(manifest: Json, parity: Json, target: str) -> dict[str, Any]:
    """Can I trust it? Parity, gates and the classes that int8 changed most."""
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
        "remarks": parity_remarks(parity),
        "scheme": fact_rows(
            {
                **section(parity, "onnx_int8", "scheme"),
                "layers_kept_in_float": section(parity, "onnx_int8").get("float_layers"),
            }
        ),
        "gates": [
            {
                "label": summary.gate_label(gate),
                "name": name,
                **{key: gate.get(key) for key in ("value", "limit", "passed")},
            }
            for gate, name in ((gate, str(gate.get("gate", "gate"))) for gate in gates)
        ],
        "classes": changed[:WORST_CLASSES],
        "classes_total": len(classes),
        "classes_changed": len(changed),
        "classes_hidden": max(0, len(changed) - WORST_CLASSES),
    }


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
                "agreement": summary.quantity_text(facts.get(agreement), agreement),
            }
            row["rest"] = ", ".join(f"{label} {summary.quantity_text(value, key)}" for label, value, key in known)
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
            "agreement": summary.quantity_text(facts.get("top1_agreement"), "top1_agreement"),
            "rest": ", ".join(
                f"{label} {summary.quantity_text(facts[key], key)}"
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
            f"Int8 lost {test.get('lost')} images that fp32 had right and won {test.get('won')} "
            f"(McNemar's exact test: p = {test['p_value']:.2g})."
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
        "reason": summary.printable(island["reason"]) if island.get("reason") else None,
        "names": names[:_ISLAND_NAMES],
        "hidden": hidden,
        "facts": fact_rows(others),
    }


def making_facts(run: RunDirectory, manifest: Json, recipe: Json, target: str) -> dict[str, Any]:
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
        "artifacts": [{"path": str(k), "sha256": str(v)} for k, v in sorted(section(manifest, "artifacts").items())],
        "finished_at": manifest.get("finished_at"),
    }


def _plain(value: object, name: str) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{row['label']}: {row['text']}" for row in fact_rows(value)) or summary.MISSING
    return summary.quantity_text(value, name)


def fact_rows(facts: Json, *, names: bool = False, under: str = "", parent: str = "") -> list[dict[str, str]]:
    """Any mapping as rows of `label` and `text`; nested keys are joined, what is None is left out.

    `names` keeps the keys as they are, for instance those of packages.
    """
    rows: list[dict[str, str]] = []
    for key, value in facts.items():
        label = str(key) if names or under else summary.label_text(str(key))
        label = f"{under}, {label.replace('_', ' ')}" if under else label
        name = f"{parent}_{key}" if parent else str(key)
        if isinstance(value, Mapping):
            rows += fact_rows(value, under=label, parent=name)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            rows += [
                row
                for i, item in enumerate(value, 1)
                if isinstance(item, Mapping)
                for row in fact_rows(item, under=f"{label} {i}")
            ]
        elif value is not None and value != []:
            rows.append({"label": label, "text": str(value) if names else summary.quantity_text(value, name)})
    return rows
