"""The quantize stage in a run: calibrated, placed by measuring, trained on where it is `qat`, judged and saved.

What enters: the recipe, the float checkpoint before the stage, data and a target. What leaves: the stage's folder, the
decisions in run.json, and the facts of its entry there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecompress import console
from edgecompress.data.run_data import ImageData, calibration_indices
from edgecompress.int8.dead_channels import IMAGES as DEAD_CHANNEL_IMAGES
from edgecompress.int8.dead_channels import dead_channels, dead_sentence
from edgecompress.int8.placement_trial import HeldOut
from edgecompress.int8.post_training import quantize
from edgecompress.int8.quantized_model import QuantizedModel, save_quantized
from edgecompress.int8.scheme import Scheme, resolve_scheme
from edgecompress.models.checkpoint import Checkpoint, describe, example_input
from edgecompress.run_directory import Json, RunDirectory
from edgecompress.settings.recipe import QatStage, QuantizeStage, Recipe
from edgecompress.settings.target import Target, own_target
from edgecompress.stages.train_stages import PreparedSplits, qat_stage
from edgecompress.steps.placement_run import Placed, confirmed, held_out, limits_of, place, with_float_layers
from edgecompress.steps.run_state import cost_entry, decision_of, evaluation_entry, record_decision, save_answers
from edgecompress.steps.training_context import stage_progress, training_context
from edgecompress.training.evaluate import collect_logits


def quantize_for(
    recipe: Recipe,
    stage: QuantizeStage,
    scheme: Scheme,
    source: Checkpoint,
    data: ImageData,
    splits: PreparedSplits,
) -> tuple[QuantizedModel, int]:
    """Quantize a float checkpoint under a scheme; returns the int8 model and the number of calibration images."""
    preprocessing = source.architecture.preprocessing
    train = splits.get("train", preprocessing)
    indices = torch.from_numpy(calibration_indices(train.labels.numpy(), stage.calibration.samples, recipe.seed))
    size = stage.calibration.batch_size

    def batches() -> Iterator[Tensor]:
        for images, _ in train.batches(size, indices=indices):
            yield preprocessing.normalize(images).contiguous(memory_format=torch.channels_last)

    model = quantize(
        source.module,
        stage=stage,
        scheme=scheme,
        calibration=batches,
        batches=-(-len(indices) // size),
        example=example_input(source.architecture),
    )
    return model, len(indices)


@dataclass(frozen=True)
class _Int8:
    """The int8 model in its placement, and what judged it; `images` None where the recipe asks for full int8."""

    model: QuantizedModel
    samples: int
    placed: Placed
    images: HeldOut | None = None
    is_measured: bool = False


def _placed_model(
    recipe: Recipe,
    stage: QuantizeStage,
    scheme: Scheme,
    run: RunDirectory,
    current: Checkpoint,
    data: ImageData,
    splits: PreparedSplits,
    target: Target | None,
) -> _Int8:
    """The int8 model in the placement that the recipe asks for, or that was decided on and recorded by measuring."""
    decided = decision_of(run.read_manifest(), "placement")
    if stage.placement == "full":
        placed = Placed((), "the recipe asks for full int8")
        run.update_manifest(lambda m: record_decision(m, "placement", placed.decision, placed.why, stage=stage.id))
        model, samples = quantize_for(recipe, stage, scheme, current, data, splits)
        return _Int8(model, samples, placed)
    images = held_out(recipe, run, current, data, splits)
    if decided is not None:
        console.note(f"placement: as recorded ({decided['why']})")
        facts = {key: value for key, value in decided["value"].items() if key not in ("form", "float_layers")}
        placed = Placed(tuple(decided["value"]["float_layers"]), decided["why"], facts)
    else:
        model, samples = quantize_for(recipe, stage, scheme, current, data, splits)
        placed = place(
            model,
            source=current,
            stage=stage,
            target=target or own_target(),
            images=images,
            limits=limits_of(recipe, stage),
            folder=run.stage(stage.id),
        )
        run.update_manifest(lambda m: record_decision(m, "placement", placed.decision, placed.why, stage=stage.id))
        console.note(f"placement: {placed.why}")
        if not placed.float_layers:
            return _Int8(model, samples, placed, images, is_measured=placed.facts["trials"] == 1)
    model, samples = quantize_for(recipe, with_float_layers(stage, placed.float_layers), scheme, current, data, splits)
    return _Int8(model, samples, placed, images)


def run_quantize_stage(
    recipe: Recipe,
    stage: QuantizeStage,
    run: RunDirectory,
    current: Checkpoint,
    data: ImageData,
    splits: PreparedSplits,
    target: Target | None,
) -> Json:
    """Make the stage's int8 model and save it in its folder; returns what run.json says of the stage."""
    scheme, why = resolve_scheme(stage, target)
    made = _placed_model(recipe, stage, scheme, run, current, data, splits, target)
    model, samples = made.model, made.samples
    trained = None
    if isinstance(stage, QatStage):
        labels: Json = {"stage": stage.id}
        context = training_context(recipe, run, data, splits, target, labels, progress=stage_progress(run, stage.id))
        trained = qat_stage(stage, model, current, context)
        (console.note if trained.is_trained else console.warn)(f"stage {stage.id}: {trained.summary}")
        model = trained.model
    if made.images is not None:
        placed = confirmed(
            made.placed,
            model,
            source=current,
            target=target or own_target(),
            images=made.images,
            limits=limits_of(recipe, stage),
            folder=run.stage(stage.id),
            is_measured=made.is_measured and trained is None,
        )
        run.update_manifest(lambda m: record_decision(m, "placement", placed.decision, placed.why, stage=stage.id))
    save_quantized(model, run.stage(stage.id), float_model=describe(current))
    preprocessing = current.architecture.preprocessing
    split = splits.get(data.report_split, preprocessing)
    logits = collect_logits(model.simulation(), split, preprocessing, description=f"evaluating {stage.id}")
    save_answers(run, stage.id, logits, split.labels)
    name = target.name if target else "this machine"
    run.update_manifest(lambda m: record_decision(m, f"int8_scheme:{name}", scheme.to_dict(), why, stage=stage.id))
    float_layers = f", {len(model.float_layers)} in float" if model.float_layers else ""
    summary = (
        f"{len(model.quantized_layers)} layers in int8{float_layers}; {scheme.activations} activations, "
        f"{scheme.weight_bits}-bit weights per channel; {model.correction}; calibrated on {samples} images"
    )
    if samples < stage.calibration.samples:
        summary += f" (all of train; {stage.calibration.samples} were asked for)"
    facts: Json = {"only_zeros": list(model.only_zeros)} | _dead_channels(
        recipe, stage, run, made.model, current, splits
    )
    if trained is not None:
        summary = f"{trained.summary}; {summary}"
        facts |= {"qat": trained.facts, "epochs": trained.facts["epochs"]}
    cost = cost_entry(run, current, stage.id, example_input(current.architecture)) | {"sparsity": model.sparsity}
    return (
        evaluation_entry(logits, split.labels, data.report_split)
        | cost
        | facts
        | {"calibration_samples": samples, "scheme": scheme.to_dict(), "summary": summary}
        | {"calibration": model.calibration.to_dict() if model.calibration else None}
    )


def _dead_channels(
    recipe: Recipe,
    stage: QuantizeStage,
    run: RunDirectory,
    model: QuantizedModel,
    source: Checkpoint,
    splits: PreparedSplits,
) -> Json:
    """Which layers have channels that say nothing, for run.json; said to the user too where there are any."""
    if model.reference is None:
        return {}
    preprocessing = source.architecture.preprocessing
    train = splits.get("train", preprocessing)
    # Of every class, as calibration sees them: train may be sorted, and what one class lacks is not dead.
    chosen = torch.from_numpy(calibration_indices(train.labels.numpy(), DEAD_CHANNEL_IMAGES, recipe.seed))
    images, _ = next(train.batches(DEAD_CHANNEL_IMAGES, indices=chosen))
    dead = dead_channels(model.reference, preprocessing.normalize(images))
    notes = [f"stage {stage.id}: {dead_sentence(dead, len(images))}."] if dead else []
    for text in notes:
        console.note(text)
    run.update_manifest(lambda m: m["notes"].extend(text for text in notes if text not in m["notes"]))
    counts = {name: {"dead": count, "channels": total} for name, (count, total) in dead.items()}
    return {"layer_notes": notes, "dead_channels": counts}
