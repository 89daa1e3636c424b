"""`profile`: measure a run's exported files on a target, and judge them.

What enters: a run directory with its export done, and a target. What leaves: profile/<target>.json with the verdict.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgecompress.deploy.bench_results import measured_elsewhere, read_bench
from edgecompress.deploy.bundle import fill_folder
from edgecompress.deploy.connection import Host
from edgecompress.deploy.remote import measure_on
from edgecompress.errors import RunError
from edgecompress.exporting.parity import without_parity
from edgecompress.exporting.preprocessing_graph import InputForm, input_form
from edgecompress.exporting.samples import latency_note, measuring_input
from edgecompress.measure.explanation import Depth
from edgecompress.measure.measuring import STANDARD
from edgecompress.measure.profiling import profile_models
from edgecompress.measure.verdict import decide
from edgecompress.models.checkpoint import rebuild
from edgecompress.models.onnx_files import read_onnx
from edgecompress.run_directory import Json, RunDirectory, read_json, versioned
from edgecompress.settings.gates import missed_gates
from edgecompress.settings.target import Target
from edgecompress.steps.export_run import BASELINE_FILE
from edgecompress.steps.run_state import last_float_id, recipe_of


def profile_run(
    run: RunDirectory,
    target: Target,
    *,
    folder: Path,
    seconds: float,
    depth: Depth,
    thoroughness: str = STANDARD,
    host: Host | None = None,
    results: Path | None = None,
) -> Json:
    """Measure the ONNX files of `folder` (int8 and baseline where there are any); returns the profile's document.

    `seconds` bounds the time spent on latency, `thoroughness` names a preset of measuring, `depth` says what explains
    it. With `host` the device at the other end of SSH measures, and tests itself first; `results` is a bench.json that
    a device wrote. Raises RunError when nothing was exported for this target.
    """
    models = {"baseline": folder / BASELINE_FILE, "fp32": folder / "model.onnx", "int8": folder / "model.int8.onnx"}
    present = {name: path for name, path in models.items() if path.is_file()}
    if "fp32" not in present:
        raise RunError(
            f"{run.path}: nothing exported for target {target.name}; "
            f"first: edgecompress export {run.path} --int8 --target {target.name}"
        )
    manifest = run.read_manifest()
    form = _one_form(run, present)
    failed: list[str] = []
    if host is None and results is None:
        preprocessing = rebuild(run.stage(last_float_id(recipe_of(manifest))))[0].architecture.preprocessing
        with tempfile.TemporaryDirectory() as scratch:
            inputs = measuring_input(folder, preprocessing, form, Path(scratch))
            how: Json = {"seconds": seconds, "thoroughness": thoroughness, "depth": depth}
            profile = profile_models(present, target=target, input_npy=inputs, **how)
    else:
        there: Json = {"seconds": seconds, "thoroughness": thoroughness, "host": host, "results": results}
        profile, failed = _profile_elsewhere(run, target, present, folder, **there)
    note = latency_note(folder if host is None and results is None else None, form)
    profile |= {"input_form": form, "notes": [*([note] if note and profile["measured"] else []), *profile["notes"]]}
    judged_speed = [target.name] if profile["measured"] else []
    missed = [*without_parity(folder), *missed_gates(manifest, target.name, without_speed_on=judged_speed)]
    accuracy_drop = _accuracy_drop(manifest, folder, has_int8="int8" in present)
    verdict = decide(
        profile,
        target=target,
        gates_missed=[*failed, *missed],
        accuracy_drop=accuracy_drop,
    )
    judged = [] if "int8" in present else ["No int8 file was exported for this target; what is judged is fp32."]
    profile = versioned(profile) | {
        "accuracy_drop": accuracy_drop,
        "verdict": verdict.verdict,
        "reasons": [*judged, *verdict.reasons],
        "missed": verdict.missed,
        "target_facts": target.model_dump(mode="json"),
        "files": run.exported_files(target.name),
    }
    run.write_document(run.profile_path(target.name), profile)
    return profile


def _profile_elsewhere(
    run: RunDirectory,
    target: Target,
    models: dict[str, Path],
    folder: Path,
    *,
    seconds: float,
    thoroughness: str,
    host: Host | None,
    results: Path | None,
) -> tuple[Json, list[str]]:
    """The profile of what a device measured, and what its self-test found wrong.

    What goes to a device are the exported files as they are, and the baseline, so that its figures can be set beside
    those of this machine.
    """
    rows: list[Json] | None = None
    if host is not None:
        with tempfile.TemporaryDirectory(prefix="edgecompress-profile-") as scratch:
            bundle = Path(scratch) / "bundle"
            bundle.mkdir()
            made = fill_folder(
                bundle, run, target, exported=folder, name="bundle", preprocessing_inside=False, with_baseline=True
            )
            kept = run.profile_path(target.name).parent
            found = measure_on(host, bundle, made, target=target, seconds=seconds, thoroughness=thoroughness, kept=kept)
        bench, rows, place = found.bench, found.self_test, host.name
    else:
        assert results is not None
        bench, place = read_bench(results), str(results)
    elsewhere = measured_elsewhere(bench, models, target, place=place)
    measured = {name: path for name, path in models.items() if name in elsewhere.fresh}
    how: Json = {"thoroughness": bench.get("thoroughness", STANDARD), "elsewhere": elsewhere}
    profile = profile_models(measured, target=target, input_npy=None, **how)
    profile["device"]["self_test"] = rows
    failed = [
        f"On {place} the {row['model']} model does not give the expected answers: {'; '.join(row['problems'])}."
        for row in rows or []
        if not row["passed"]
    ]
    return profile, failed


def _one_form(run: RunDirectory, models: dict[str, Path]) -> InputForm:
    """The form of input that all files read. Raises RunError where they differ: one image could not feed them all."""
    forms = {name: input_form(read_onnx(path)) for name, path in models.items()}
    if len(set(forms.values())) > 1:
        found = ", ".join(f"{name}: {form}" for name, form in forms.items())
        raise RunError(f"{run.path}: the exported files read different inputs ({found}); export all of them again")
    return next(iter(forms.values()))


def _accuracy_drop(manifest: Json, folder: Path, *, has_int8: bool) -> float | None:
    """Accuracy of the first model minus that of the model that ships; None where either is unknown.

    An int8 file that was quantized again for this target has its own accuracy, in parity.json beside it.
    """
    recipe = recipe_of(manifest)
    path = folder / "parity.json"
    again = read_json(path).get("onnx_int8_against_first") if has_int8 and path.is_file() else None
    if again is not None:
        return float(again["accuracy_drop"]) if recipe.has_trained_weights else None
    stage_id = recipe.quantize_stage.id if has_int8 else last_float_id(recipe)
    entry: Json = next((e for e in manifest["stages"] if e["id"] == stage_id), {})
    baseline = manifest.get("baseline", {})
    if not recipe.has_trained_weights or "accuracy" not in entry or "accuracy" not in baseline:
        return None
    return float(baseline["accuracy"]) - float(entry["accuracy"])
