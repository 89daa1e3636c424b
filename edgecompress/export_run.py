"""`export`: a run's models as ONNX files, with parity on the reported images.

What enters: a run directory with its stages complete, and a target. What leaves: model.onnx, model.int8.onnx, a few
sample images and parity.json. The first target's files stand in `export/`, another target's in
`export/<target>/`, because the int8 scheme belongs to the target.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgecompress import console
from edgecompress.apply_run import quantize_for
from edgecompress.checkpoint import Checkpoint, example_input, load_checkpoint, rebuild
from edgecompress.data import ImageData, open_data
from edgecompress.evaluate import collect_logits
from edgecompress.export import Provenance, export_onnx
from edgecompress.int8.quantized_model import QuantizedModel, load_quantized
from edgecompress.int8.scheme import Scheme, resolve_scheme
from edgecompress.integer_graph import inspect_integer_graph
from edgecompress.machine import versions
from edgecompress.parity import (
    Logits,
    class_changes,
    compare_float,
    compare_int8,
    constant_predictions,
    run_onnx,
)
from edgecompress.placement_run import with_float_layers
from edgecompress.recipe import QatStage, QuantizeStage, Recipe
from edgecompress.run_directory import Json, RunDirectory, atomic_path, write_json
from edgecompress.run_state import (
    Gate,
    decision_of,
    last_float_id,
    load_float,
    load_logits,
    recipe_of,
    recipe_sha256,
    record_decision,
    record_gates,
    report_indices,
    require_same_data,
)
from edgecompress.stages import PreparedSplits, qat_stage
from edgecompress.target import Target
from edgecompress.training_context import training_context

_SAMPLE_IMAGES = 16
BASELINE_FILE = "baseline.onnx"


def export_folder(run: RunDirectory, target: Target) -> Path:
    """Where this target's files go: `export/` for the first target of the run, `export/<target>/` for others."""
    first = (run.read_manifest().get("targets") or [target.name])[0]
    return run.export if first == target.name else run.export / target.name


def export_run(run: RunDirectory, target: Target, *, int8: bool, overrides: tuple[str, ...] = ()) -> Json:
    """Export and check parity; returns the content of parity.json."""
    manifest = run.read_manifest()
    if not manifest.get("targets"):
        manifest = run.update_manifest(lambda m: m.update(targets=[target.name]))
    recipe = recipe_of(manifest, overrides)
    float_model = load_float(run, recipe)
    data = open_data(recipe.data).with_num_classes(float_model.architecture.num_classes)
    require_same_data(manifest, data)
    splits = PreparedSplits(data, cache=False)
    folder = export_folder(run, target)
    provenance = Provenance(data.class_names, recipe.name, recipe_sha256(recipe), versions())
    preprocessing = float_model.architecture.preprocessing
    example = example_input(float_model.architecture)

    console.note(f"exporting fp32 ONNX to {folder / 'model.onnx'}")
    rewrites = export_onnx(
        float_model.module,
        example,
        folder / "model.onnx",
        target=target,
        preprocessing=preprocessing,
        provenance=provenance,
        extra_metadata={"precision": "float32"},
    )
    _export_baseline(run, manifest, recipe, folder, target, provenance)
    split = splits.get(data.report_split, preprocessing)
    indices = report_indices(data, recipe)
    labels = split.labels.numpy()[indices]
    torch_logits = load_logits(run, last_float_id(recipe))[indices]
    onnx_logits = run_onnx(folder / "model.onnx", split, preprocessing, indices)
    parity: Json = {
        "target": target.name,
        "split": data.report_split,
        "samples": len(indices),
        "constant_predictions": constant_predictions(onnx_logits),
        "onnx_fp32": compare_float(torch_logits, onnx_logits, recipe.gates) | {"rewrites": rewrites},
    }
    if int8:
        stage = recipe.quantize_stage
        scheme, why = resolve_scheme(stage, target)
        run.update_manifest(lambda m: record_decision(m, f"int8_scheme:{target.name}", scheme.to_dict(), why))
        model, torch_int8_logits = _int8_model(run, manifest, recipe, stage, scheme, float_model, data, splits, indices)
        console.note(f"exporting int8 ONNX to {folder / 'model.int8.onnx'}")
        export_onnx(
            model.graph,
            example,
            folder / "model.int8.onnx",
            target=target,
            preprocessing=preprocessing,
            provenance=provenance,
            extra_metadata={"precision": "int8", "scheme": str(scheme.to_dict())},
        )
        int8_logits = run_onnx(folder / "model.int8.onnx", split, preprocessing, indices)
        graph = inspect_integer_graph(folder / "model.int8.onnx", on_arm=target.architecture == "aarch64")
        parity["onnx_int8"] = compare_int8(onnx_logits, int8_logits, torch_int8_logits, labels, recipe.gates) | {
            "scheme": scheme.to_dict(),
            "op_counts": graph.op_counts,
            "int8_mac_coverage": graph.int8_mac_coverage,
            "float_layers": list(model.float_layers),
        }
        parity["classes"] = class_changes(onnx_logits, int8_logits, labels, data.class_names)
    _save_samples(split.labels, splits, data, float_model, folder)
    gates = parity_gates(parity, target)
    parity["failures"] = [gate.sentence for gate in gates if not gate.passed]
    write_json(folder / "parity.json", parity)

    def change(document: Json) -> None:
        record_gates(document, gates, step="export", target=target.name)
        document["artifacts"] = run.artifacts()

    run.update_manifest(change)
    return parity


def _export_baseline(
    run: RunDirectory, manifest: Json, recipe: Recipe, folder: Path, target: Target, provenance: Provenance
) -> None:
    """Write the model that the recipe began with as baseline.onnx, so that the whole gain can be measured.

    Nothing is written where that model is the one exported as fp32.
    """
    baseline = str(manifest["baseline"]["id"])
    if baseline == last_float_id(recipe):
        return
    checkpoint = load_checkpoint(run.stage(baseline))
    export_onnx(
        checkpoint.module,
        example_input(checkpoint.architecture),
        folder / BASELINE_FILE,
        target=target,
        preprocessing=checkpoint.architecture.preprocessing,
        provenance=provenance,
        extra_metadata={"precision": "float32", "stage": baseline},
    )


def _int8_model(
    run: RunDirectory,
    manifest: Json,
    recipe: Recipe,
    stage: QuantizeStage,
    scheme: Scheme,
    float_model: Checkpoint,
    data: ImageData,
    splits: PreparedSplits,
    indices: NDArray[np.int64],
) -> tuple[QuantizedModel, Logits]:
    """The quantize stage's model where scheme and settings are the same; else quantized again for this target."""
    recorded: Json = next((entry for entry in manifest["stages"] if entry["id"] == stage.id), {})
    same_settings = stage == recipe_of(manifest).quantize_stage
    if recorded.get("status") == "complete" and recorded.get("scheme") == scheme.to_dict() and same_settings:
        base, description = rebuild(run.stage(stage.id))
        example = example_input(base.architecture)
        model = load_quantized(run.stage(stage.id), base.module, description, example)
        return model, load_logits(run, stage.id)[indices]
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
    preprocessing = float_model.architecture.preprocessing
    split = splits.get(data.report_split, preprocessing)
    chosen = torch.from_numpy(indices)
    logits = collect_logits(model.simulation(), split, preprocessing, indices=chosen, description="evaluating int8")
    return model, logits.numpy()


def _save_samples(
    labels: torch.Tensor, splits: PreparedSplits, data: ImageData, float_model: Checkpoint, folder: Path
) -> None:
    """Keep a few real images, uint8 [N, C, H, W], so that measuring needs no data set."""
    preprocessing = float_model.architecture.preprocessing
    split = splits.get(data.report_split, preprocessing)
    chosen = torch.linspace(0, len(labels) - 1, min(_SAMPLE_IMAGES, len(labels))).long()
    images = torch.cat([batch for batch, _ in split.batches(_SAMPLE_IMAGES, indices=chosen)])
    with atomic_path(folder / "samples.npy") as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, images.numpy())


def parity_gates(parity: Json, target: Target) -> list[Gate]:
    """The gates that parity.json decides."""
    constant = parity["constant_predictions"]
    checks: list[Json] = [
        {
            "gate": "predictions_vary",
            "value": not constant,
            "limit": True,
            "passed": not constant,
            "sentence": "The model gives every image the same answer, so parity proves nothing.",
        }
    ]
    for part in ("onnx_fp32", "onnx_int8"):
        checks += parity.get(part, {}).get("checks", [])
    return [Gate(**check, step="export", target=target.name) for check in checks]
