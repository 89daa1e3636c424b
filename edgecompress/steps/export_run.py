"""`export`: a run's models as ONNX files, with parity on the reported images.

What enters: a run directory with its stages complete, and a target. What leaves: model.onnx, model.int8.onnx, the same
in ORT format if asked, a few sample images and parity.json. The first target's files stand in `export/`, another
target's in `export/<target>/`, because the int8 scheme belongs to the target.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgecompress import console
from edgecompress.data.images import PreparedSplit
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import ImageData, open_data
from edgecompress.exporting.answer_changes import PICTURES, answer_changes, flipped_images
from edgecompress.exporting.answers import LOGITS_ALONE, Answers, append_answers, compare_answers
from edgecompress.exporting.divergence import first_divergence
from edgecompress.exporting.onnx_export import OUTPUT_NAME, Provenance, export_onnx, export_with_preprocessing
from edgecompress.exporting.ort_format import OPERATORS_FILE, convert, mobile_usability, remove_stale
from edgecompress.exporting.parity import (
    Logits,
    cause_of_difference,
    class_changes,
    compare_float,
    compare_int8,
    compare_with_first,
    constant_predictions,
    only_answer,
    run_onnx,
    worst_class,
)
from edgecompress.exporting.parity_variants import (
    Subset,
    choose_subset,
    compare_ort_format,
    compare_variants,
    compare_with_preprocessing,
)
from edgecompress.exporting.preprocessing_graph import FLOAT_FORM, PIXEL_FORM, InputForm
from edgecompress.exporting.samples import save_samples
from edgecompress.int8.conv_kernels import choose_conv_kernels, use_matrix_products
from edgecompress.int8.quantized_model import QuantizedModel, load_quantized
from edgecompress.int8.scheme import Scheme, resolve_scheme
from edgecompress.machine import versions
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint, rebuild
from edgecompress.run_directory import Json, RunDirectory, versioned, write_json
from edgecompress.settings.gates import Gate, record_begun_export, record_gates
from edgecompress.settings.recipe import QatStage, QuantizeStage, Recipe
from edgecompress.settings.target import Target
from edgecompress.stages.train_stages import PreparedSplits, qat_stage
from edgecompress.steps.placement_run import with_float_layers
from edgecompress.steps.quantize_run import quantize_for
from edgecompress.steps.run_state import (
    decision_of,
    last_float_id,
    load_float,
    load_logits,
    recipe_of,
    recipe_sha256,
    record_decision,
    report_indices,
    require_same_data,
)
from edgecompress.steps.training_context import training_context
from edgecompress.training.evaluate import collect_logits

BASELINE_FILE = "baseline.onnx"
FP32_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"
_LAYER_IMAGES = 2  # every layer's output is kept, so few; a broken layer shows on any image


def export_folder(run: RunDirectory, target: Target) -> Path:
    """Where this target's files go: `export/` for the first target of the run, `export/<target>/` for others."""
    first = (run.read_manifest().get("targets") or [target.name])[0]
    return run.export if first == target.name else run.export / target.name


def export_run(
    run: RunDirectory,
    target: Target,
    *,
    int8: bool,
    overrides: tuple[str, ...] = (),
    with_preprocessing: bool = False,
    ort: bool = False,
    answers: Answers = LOGITS_ALONE,
) -> Json:
    """Export and check parity; returns the content of parity.json.

    With `with_preprocessing` the files take uint8 pixels of any size; parity of the model itself is then checked on
    files without, which are not kept. `ort` writes the same models in ORT format beside them;
    `answers` are outputs behind the logits, in every file.
    """
    manifest = run.read_manifest()
    if not manifest.get("targets"):
        manifest = run.update_manifest(lambda m: m.update(targets=[target.name]))
    recipe = recipe_of(manifest, overrides)
    float_model = load_float(run, recipe)
    answers.require_fitting(float_model.architecture.num_classes)
    data = open_data(recipe.data).with_num_classes(float_model.architecture.num_classes)
    require_same_data(manifest, data)
    splits = PreparedSplits(data, cache=False)
    folder = export_folder(run, target)
    with tempfile.TemporaryDirectory() as scratch:
        work = _Work(
            run=run,
            manifest=manifest,
            recipe=recipe,
            target=target,
            float_model=float_model,
            data=data,
            splits=splits,
            indices=report_indices(data, recipe),
            folder=folder,
            plain=Path(scratch) if with_preprocessing else folder,
            provenance=Provenance(data.class_names, recipe.name, recipe_sha256(recipe), versions()),
            form=PIXEL_FORM if with_preprocessing else FLOAT_FORM,
            answers=answers,
        )
        with run.replacing(folder, meanwhile=lambda m: record_begun_export(m, target.name)):
            parity = _export_and_compare(work, int8=int8, ort=ort)
            save_samples(work.split, work.preprocessing, folder, work.form)
            gates = parity_gates(parity, target)
            parity["failures"] = [gate.sentence for gate in gates if not gate.passed]
            write_json(folder / "parity.json", versioned(parity))

            def change(document: Json) -> None:
                record_gates(document, gates, step="export", target=target.name)
                document.setdefault("exports", {})[target.name] = {
                    "folder": folder.relative_to(run.path).as_posix(),
                    "input_form": work.form,
                    "int8": int8,
                    "ort_format": ort,
                    "outputs": _outputs(work),
                }

            run.update_manifest(change)
    return parity


@dataclass(frozen=True)
class _Work:
    """What the parts of one export share. `plain` is where the files that read normalized floats go."""

    run: RunDirectory
    manifest: Json
    recipe: Recipe
    target: Target
    float_model: Checkpoint
    data: ImageData
    splits: PreparedSplits
    indices: NDArray[np.int64]
    folder: Path
    plain: Path
    provenance: Provenance
    form: InputForm
    answers: Answers

    @property
    def preprocessing(self) -> Preprocessing:
        return self.float_model.architecture.preprocessing

    @property
    def split(self) -> PreparedSplit:
        return self.splits.get(self.data.report_split, self.preprocessing)

    def export(self, module: nn.Module, name: str, checkpoint: Checkpoint, **metadata: str) -> dict[str, int]:
        """Write one plain file; returns the rewrites that were made."""
        return export_onnx(
            module,
            example_input(checkpoint.architecture),
            self.plain / name,
            target=self.target,
            preprocessing=checkpoint.architecture.preprocessing,
            provenance=self.provenance,
            extra_metadata=metadata,
        )


def _export_and_compare(work: _Work, *, int8: bool, ort: bool) -> Json:
    """Write the files of one target; returns parity.json without its failures."""
    recipe, gates, indices = work.recipe, work.recipe.gates, work.indices
    stale = [] if int8 else _earlier_int8(work)
    console.note(f"exporting fp32 ONNX to {work.folder / FP32_FILE}")
    rewrites = work.export(work.float_model.module, FP32_FILE, work.float_model, precision="float32")
    baseline = _export_baseline(work)
    labels = work.split.labels.numpy()[indices]
    torch_logits = load_logits(work.run, last_float_id(recipe))[indices]
    onnx_logits = run_onnx(work.plain / FP32_FILE, work.split, work.preprocessing, indices, target=work.target)
    parity: Json = {
        "target": work.target.name,
        "split": work.data.report_split,
        "samples": len(indices),
        "input_form": work.form,
        "constant_predictions": constant_predictions(onnx_logits),
        "constant_class": only_answer(onnx_logits, work.data.class_names),
        "onnx_fp32": compare_float(torch_logits, onnx_logits, gates) | {"rewrites": rewrites},
    }
    usual = {"fp32": onnx_logits}
    python = {"fp32": torch_logits}
    if int8:
        usual["int8"] = python["int8"] = _export_int8(work, parity, onnx_logits, labels)
    subset = choose_subset(
        work.split, work.preprocessing, indices, samples=gates.variant_samples, seed=recipe.data.split_seed
    )
    if not parity["onnx_fp32"]["passed"]:
        _name_the_layer(work, parity["onnx_fp32"], subset)
    plain = {"fp32": work.plain / FP32_FILE} | ({"int8": work.plain / INT8_FILE} if int8 else {})
    chosen = {precision: logits[subset.positions] for precision, logits in usual.items()}
    parity["variants"] = {
        precision: compare_variants(path, subset, chosen[precision], gates, precision=precision, target=work.target)
        for precision, path in plain.items()
    }
    if work.form == PIXEL_FORM:
        names = [path.name for path in plain.values()] + ([BASELINE_FILE] if baseline else [])
        for name in names:
            export_with_preprocessing(work.plain / name, work.folder / name)
        files = {precision: work.folder / path.name for precision, path in plain.items()}
        references = {precision: logits[subset.positions] for precision, logits in python.items()}
        parity["with_preprocessing"], chosen = compare_with_preprocessing(
            files, references, subset, labels[subset.positions], gates, target=work.target
        )
    if work.answers:
        files = {precision: work.folder / path.name for precision, path in plain.items()}
        for path in [*files.values(), *([work.folder / BASELINE_FILE] if baseline else [])]:
            append_answers(path, work.answers)
        parity["answers"] = compare_answers(
            files, subset, work.answers, whole_images=work.form == PIXEL_FORM, target=work.target
        )
    for path in stale:
        path.unlink()
    _write_ort_format(work, parity, chosen, subset, wanted=ort)
    return parity


def _export_int8(work: _Work, parity: Json, onnx_logits: Logits, labels: NDArray[np.int64]) -> Logits:
    """Write the int8 file and its parts of parity.json; returns its logits."""
    recipe, target = work.recipe, work.target
    stage = recipe.quantize_stage
    scheme, why = resolve_scheme(stage, target)
    work.run.update_manifest(lambda m: record_decision(m, f"int8_scheme:{target.name}", scheme.to_dict(), why))
    is_new = not _is_the_stages_model(work, stage, scheme)
    model, torch_int8_logits = (_quantized_again if is_new else _stage_model)(work, stage, scheme)
    console.note(f"exporting int8 ONNX to {work.folder / INT8_FILE}")
    work.export(model.graph, INT8_FILE, work.float_model, precision="int8", scheme=str(scheme.to_dict()))
    path = work.plain / INT8_FILE
    kernels = _choose_kernels(work, path)
    int8_logits = run_onnx(path, work.split, work.preprocessing, work.indices, target=target)
    graph = inspect_integer_graph(path, int8_activations=target.fuses_int8_activations)
    cause = cause_of_difference(activations=scheme.activations, weight_bits=scheme.weight_bits, target=target)
    parity["onnx_int8"] = compare_int8(
        onnx_logits, int8_logits, torch_int8_logits, labels, recipe.gates, cause=cause
    ) | {
        "scheme": scheme.to_dict(),
        "op_counts": graph.op_counts,
        "int8_mac_coverage": graph.int8_mac_coverage,
        "float_layers": list(model.float_layers),
        "matrix_product_convs": kernels,
    }
    if is_new:
        first = str(work.manifest["baseline"]["id"])
        first_logits = load_logits(work.run, first)[work.indices]
        parity["onnx_int8_against_first"] = compare_with_first(
            first_logits, int8_logits, labels, recipe.gates, first=first, target=target.name
        )
    parity["classes"] = class_changes(onnx_logits, int8_logits, labels, work.data.class_names)
    parity |= answer_changes(onnx_logits, int8_logits, labels, work.data.class_names)
    parity["flipped"] = flipped_images(
        onnx_logits, int8_logits, work.split, work.indices, work.data.class_names, work.folder
    )
    parity["worst_class"] = worst_class(parity["classes"], recipe.gates)
    return int8_logits


def _choose_kernels(work: _Work, path: Path) -> int:
    """Let convolutions of the int8 file run through their fastest kernels; returns how many changed theirs.

    A choice that was made for this target before is made again without measuring.
    """
    what = f"conv_kernels:{work.target.name}"
    recorded = decision_of(work.run.read_manifest(), what)
    if recorded is not None:
        wanted = recorded["value"]["nodes"]
        present = use_matrix_products(path, wanted)
        if present < len(wanted):
            console.note(
                f"{len(wanted) - present} convolutions of the recorded choice of kernels are not in {path.name}"
            )
        return present
    chosen = choose_conv_kernels(path, work.target)
    if chosen is None:
        return 0
    console.note(chosen.sentence)
    work.run.update_manifest(lambda m: record_decision(m, what, chosen.to_dict(), chosen.sentence))
    return use_matrix_products(path, chosen.nodes)


def _name_the_layer(work: _Work, part: Json, subset: Subset) -> None:
    """Say in the failed comparison where the file first differs from PyTorch."""
    images = work.preprocessing.normalize(subset.prepared[:_LAYER_IMAGES])
    limit = work.recipe.gates.fp32_max_relative_diff
    found = first_divergence(work.float_model.module, work.plain / FP32_FILE, images, target=work.target, limit=limit)
    part["first_divergence"] = None if found is None else found.to_dict()
    words = "" if found is None else f" {found.sentence}"
    for check in part["checks"]:
        if not check["passed"]:
            check["sentence"] += words


def _earlier_int8(work: _Work) -> list[Path]:
    """The files about int8 of an earlier export, which an export without int8 removes, and says so first.

    Nothing compares them with the new fp32 file, whose form may be another one, and parity.json will not know them.
    """
    path = work.folder / INT8_FILE
    if not path.is_file():
        return []
    console.warn(f"{path} of an earlier export goes: without --int8 nothing proves it; export with --int8 to have both")
    return [path, *(work.folder / PICTURES).glob("*.png")]


def _outputs(work: _Work) -> list[str]:
    return [OUTPUT_NAME, *work.answers.outputs]


def _write_ort_format(
    work: _Work, parity: Json, references: dict[str, Logits], subset: Subset, *, wanted: bool
) -> None:
    """Write .ort files and their part of parity.json, or remove those that belong to an earlier export."""
    removed = remove_stale(work.folder)
    if not wanted:
        if removed:
            console.note(f"removed {', '.join(removed)} of an earlier export; export with --ort to write them again")
        return
    names = {"fp32": FP32_FILE, "int8": INT8_FILE}
    console.note(f"writing ORT format to {work.folder}")
    models = {precision: work.folder / names[precision] for precision in references}
    files = dict(zip(models, convert(list(models.values()), work.folder, target=work.target), strict=True))
    parity["ort_format"] = compare_ort_format(
        files, references, subset, work.recipe.gates, whole_images=work.form == PIXEL_FORM, target=work.target
    ) | {
        "required_operators": OPERATORS_FILE,
        "mobile_usability": {precision: mobile_usability(path) for precision, path in models.items()},
    }


def _export_baseline(work: _Work) -> bool:
    """Write the model that the recipe began with as baseline.onnx, so that the whole gain can be measured.

    Nothing is written where that model is the one exported as fp32.
    """
    baseline = str(work.manifest["baseline"]["id"])
    if baseline == last_float_id(work.recipe):
        return False
    checkpoint = load_checkpoint(work.run.stage(baseline))
    work.export(checkpoint.module, BASELINE_FILE, checkpoint, precision="float32", stage=baseline)
    return True


def _is_the_stages_model(work: _Work, stage: QuantizeStage, scheme: Scheme) -> bool:
    """Whether the quantize stage's model is what this export asks for: scheme and settings are the same."""
    recorded: Json = next((entry for entry in work.manifest["stages"] if entry["id"] == stage.id), {})
    same_settings = stage == recipe_of(work.manifest).quantize_stage
    return recorded.get("status") == "complete" and recorded.get("scheme") == scheme.to_dict() and same_settings


def _stage_model(work: _Work, stage: QuantizeStage, _: Scheme) -> tuple[QuantizedModel, Logits]:
    folder = work.run.stage(stage.id)
    base, description = rebuild(folder)
    model = load_quantized(folder, base.module, description, example_input(base.architecture))
    return model, load_logits(work.run, stage.id)[work.indices]


def _quantized_again(work: _Work, stage: QuantizeStage, scheme: Scheme) -> tuple[QuantizedModel, Logits]:
    """The last float model quantized for this target, as the quantize stage would."""
    run, manifest, recipe, data, splits = work.run, work.manifest, work.recipe, work.data, work.splits
    float_model, indices = work.float_model, work.indices
    console.note(
        f"quantizing again: this target wants {scheme.activations} activations, {scheme.weight_bits}-bit weights"
    )
    decided = decision_of(manifest, "placement")
    if decided is not None and not decided["value"].get("full_was_accurate", True):
        # Found for another scheme; what a layer loses there it mostly loses here too. Speed says nothing here.
        stage = with_float_layers(stage, decided["value"]["float_layers"])
    model, _ = quantize_for(recipe, stage, scheme, float_model, data, splits)
    if isinstance(stage, QatStage):
        # Weights trained for one scheme's roundings are not those of another: this target gets its own training.
        console.note(f"training again for this scheme, {stage.epochs} epochs")
        labels: Json = {"stage": stage.id, "scheme": scheme.to_dict()}
        context = training_context(recipe, run, data, splits, None, labels)
        trained = qat_stage(stage, model, float_model, context)
        (console.note if trained.is_trained else console.warn)(f"stage {stage.id}: {trained.summary}")
        model = trained.model
    preprocessing = work.preprocessing
    split = work.split
    chosen = torch.from_numpy(indices)
    logits = collect_logits(model.simulation(), split, preprocessing, indices=chosen, description="evaluating int8")
    return model, logits.numpy()


def parity_gates(parity: Json, target: Target) -> list[Gate]:
    """The gates that parity.json decides."""
    constant = parity["constant_predictions"]
    checks: list[Json] = [
        {
            "gate": "predictions_vary",
            "value": not constant,
            "limit": True,
            "passed": not constant,
            "sentence": "The model gives every image the same answer"
            + (f", '{parity['constant_class']}'" if parity.get("constant_class") is not None else "")
            + ", so parity proves nothing.",
        }
    ]
    parts = ("onnx_fp32", "onnx_int8", "onnx_int8_against_first", "worst_class")
    for part in (*parts, "with_preprocessing", "answers", "ort_format"):
        checks += parity.get(part, {}).get("checks", [])
    for part in parity.get("variants", {}).values():
        checks += part["checks"]
    return [Gate(**check, step="export", target=target.name) for check in checks]
