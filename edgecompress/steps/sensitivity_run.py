"""`sensitivity`: what int8 costs in each layer of a run's model.

What enters: a run whose quantize stage is complete. What leaves: stages/<id>/sensitivity.json. The stage is made once
more from its float model, with the recorded placement, because its files hold integers alone; the same recipe and
images give the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecompress import console
from edgecompress.data.run_data import calibration_indices, open_data
from edgecompress.errors import RunError
from edgecompress.int8.mixed import MixedModel
from edgecompress.int8.scheme import Scheme
from edgecompress.int8.sensitivity import Sensitivity, measure_sensitivity
from edgecompress.run_directory import Json, RunDirectory
from edgecompress.settings.recipe import QatStage, QuantizeStage
from edgecompress.stages.train_stages import PreparedSplits
from edgecompress.steps.placement_run import held_out, with_float_layers
from edgecompress.steps.quantize_run import quantize_for
from edgecompress.steps.run_state import decision_of, load_float, recipe_of, require_same_data

FILE = "sensitivity.json"


@dataclass(frozen=True)
class Remade:
    """A run's int8 model beside its float one, the images to ask it with, and what every document about it begins with.

    `images` is one normalized batch [N, C, H, W] of val; `calibration` gives the batches that ranges were found on.
    """

    stage: QuantizeStage
    mixed: MixedModel
    images: Tensor
    calibration: Callable[[], Iterator[Tensor]]
    facts: Json


def sensitivity_run(run: RunDirectory, *, images: int) -> Json:
    """Measure every int8 layer on up to `images` held-out images of val; returns the content of sensitivity.json.

    Raises RunError where the quantize stage is not complete, or was trained: its integers cannot be made again here.
    """
    document, _ = sensitivity_of(run, remake(run, images=images))
    return document


def sensitivity_of(run: RunDirectory, remade: Remade) -> tuple[Json, Sensitivity]:
    """Measure every layer and write sensitivity.json."""
    found = measure_sensitivity(remade.mixed, remade.images)
    document = {**remade.facts, **found.to_dict(), "worst_first": [row.layer for row in found.worst_first()]}
    run.write_document(run.stage(remade.stage.id) / FILE, document)
    return document, found


def remake(run: RunDirectory, *, images: int) -> Remade:
    """Quantize once more what the run quantized. Raises RunError as `sensitivity_run` does."""
    manifest = run.read_manifest()
    recipe = recipe_of(manifest)
    stage = recipe.quantize_stage
    entry: Json = next((e for e in manifest["stages"] if e["id"] == stage.id), {})
    if entry.get("status") != "complete":
        raise RunError(f"{run.path}: stage {stage.id} is not complete; go on with: edgecompress apply --resume")
    if isinstance(stage, QatStage):
        raise RunError(
            f"{run.path}: stage {stage.id} is qat, whose integers come from training; "
            "make a run with a quantize stage instead, its layers are the same"
        )
    source = load_float(run, recipe)
    data = open_data(recipe.data).with_num_classes(source.architecture.num_classes)
    require_same_data(manifest, data)
    splits = PreparedSplits(data, cache=False)
    scheme = Scheme(entry["scheme"]["activations"], int(entry["scheme"]["weight_bits"]))
    decided = decision_of(manifest, "placement")
    float_layers = list(decided["value"]["float_layers"]) if decided else []
    console.note(f"quantizing stage {stage.id} once more, to have its float model beside it")
    model, _ = quantize_for(recipe, with_float_layers(stage, float_layers), scheme, source, data, splits)
    chosen = held_out(recipe, run, source, data, splits).images[:images]
    preprocessing = source.architecture.preprocessing
    train = splits.get("train", preprocessing)
    indices = torch.from_numpy(calibration_indices(train.labels.numpy(), stage.calibration.samples, recipe.seed))

    def calibration() -> Iterator[Tensor]:
        for batch, _ in train.batches(stage.calibration.batch_size, indices=indices):
            yield preprocessing.normalize(batch)

    facts: Json = {
        "stage": stage.id,
        "split": "val",
        "scheme": scheme.to_dict(),
        "float_layers": list(model.float_layers),
    }
    return Remade(stage, MixedModel(model), chosen, calibration, facts)
