"""`sensitivity`: what int8 costs in each layer of a run's model.

What enters: a run whose quantize stage is complete. What leaves: stages/<id>/sensitivity.json. The stage is made once
more from its float model, with the recorded placement, because its files hold integers alone; the same recipe and
images give the same integers.
"""

from __future__ import annotations

from edgecompress import console
from edgecompress.apply_run import quantize_for
from edgecompress.data import open_data
from edgecompress.errors import RunError
from edgecompress.int8.mixed import MixedModel
from edgecompress.int8.scheme import Scheme
from edgecompress.int8.sensitivity import measure_sensitivity
from edgecompress.placement_run import held_out, with_float_layers
from edgecompress.recipe import QatStage
from edgecompress.run_directory import Json, RunDirectory, write_json
from edgecompress.run_state import decision_of, load_float, recipe_of, require_same_data
from edgecompress.stages import PreparedSplits

FILE = "sensitivity.json"


def sensitivity_run(run: RunDirectory, *, images: int) -> Json:
    """Measure every int8 layer on up to `images` held-out images of val; returns the content of sensitivity.json.

    Raises RunError where the quantize stage is not complete, or was trained: its integers cannot be made again here.
    """
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
    found = measure_sensitivity(MixedModel(model), chosen)
    document: Json = {
        "stage": stage.id,
        "split": "val",
        "scheme": scheme.to_dict(),
        "float_layers": list(model.float_layers),
        **found.to_dict(),
        "worst_first": [row.layer for row in found.worst_first()],
    }
    write_json(run.stage(stage.id) / FILE, document)
    run.update_manifest(lambda m: m.update(artifacts=run.artifacts()))
    return document
