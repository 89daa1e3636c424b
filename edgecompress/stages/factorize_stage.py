"""The stage `factorize`: layers of low rank, where they are faster, finetuned like pruning.

What enters: the checkpoint of the stage before, the stage's settings, prepared data. What leaves: a `StageOutcome`.
Every candidate is timed beside the layer that it would replace, on the target, because fewer multiply-accumulates in
two layers are often slower than more in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgecompress import console
from edgecompress.data.statistics_batches import statistics_batches
from edgecompress.errors import PruningError
from edgecompress.measure.latency_trial import LatencyShare, input_shapes, layer_trial
from edgecompress.models.channel_groups import matching
from edgecompress.models.checkpoint import Checkpoint, example_input
from edgecompress.models.complexity import measure_complexity, weight_layers
from edgecompress.models.factorize import Factorization, Spectrum, choose, energy_for, factors, replace, spectra
from edgecompress.models.model_building import copy_of
from edgecompress.models.model_history import History
from edgecompress.pruning.prune import reestimate_batch_norm
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.stages.train_stages import Json, StageContext, StageOutcome, fit_stage, stage_loss
from edgecompress.training.teaching import describe_teaching

TimeLayer = Callable[[Factorization], LatencyShare]


def factorize_stage(stage: FactorizeStage, current: Checkpoint, context: StageContext) -> StageOutcome:
    """Replace layers by two of low rank, re-estimate batch norm and finetune."""
    module = copy_of(current.module)
    architecture = current.architecture
    example = example_input(architecture)
    before = measure_complexity(module, example)
    decided = context.decide(f"ranks:{stage.id}", lambda: _decided(stage, current, context))
    steps = [Factorization(row["layer"], row["form"], int(row["rank"])) for row in decided["layers"]]
    for step in steps:
        replace(module, step, with_weights=True)
    train = context.splits.get("train", architecture.preprocessing)
    batches = statistics_batches(train, architecture.preprocessing, stage.batch_size, context.recipe.seed)
    reestimate_batch_norm(module, (images for images, _ in batches))
    history: History = (*current.history, *steps)
    checkpoint = Checkpoint(module, architecture, history)
    loss = stage_loss(stage, stage.teacher, checkpoint, context)
    fit_stage(stage, checkpoint, context, loss=loss)
    after = measure_complexity(module, example)
    slower = f", {len(decided['slower'])} left whole that were not faster" if decided["slower"] else ""
    summary = (
        f"factorized {len(steps)} layers{slower}: {decided['energy']:.1%} of their energy kept, "
        f"{1 - after.macs / before.macs:.1%} of the MACs and {1 - after.params / before.params:.1%} of the parameters "
        f"removed; finetuned {stage.epochs} epochs"
        f"{' with ' + describe_teaching(stage.teacher, loss, stage.epochs) if stage.teacher else ''}"
    )
    return StageOutcome(checkpoint, stage.epochs, summary)


def _decided(stage: FactorizeStage, current: Checkpoint, context: StageContext) -> tuple[Json, str]:
    """Which layers, with which rank, as a decision: only those that are faster, where it is measured."""
    module, example = current.module, example_input(current.architecture)
    layers = weight_layers(module)
    excluded = matching(stage.exclude, list(layers), field="exclude")
    found = spectra(module, example, {name: layer for name, layer in layers.items() if name not in excluded})
    if not found:
        raise PruningError(
            f"stage {stage.id}: no layer can be factorized: there is no plain convolution or linear layer"
        )
    total = measure_complexity(module, example).macs
    shapes = input_shapes(module, example)

    def time_layer(step: Factorization) -> LatencyShare:
        layer = layers[step.layer]
        pair = factors(layer, step.form, step.rank)
        return layer_trial(
            layer, pair, shapes[step.layer], context.target, what=f"stage {stage.id}: a factorized layer"
        )

    chosen = _Choice(stage, found, total, time_layer if stage.measured else None)
    steps = chosen.settle()
    rows = [{**step.__dict__, **chosen.timings(step)} for step in steps.values()]
    slower = [{**step.__dict__, **chosen.timings(step)} for step in chosen.slower]
    names = ", ".join(f"{step.layer} ({step.form}, rank {step.rank})" for step in steps.values())
    why = (
        f"{chosen.energy:.1%} of the energy kept; {len(rows)} layers{' faster when measured' if stage.measured else ''}"
    )
    console.note(f"stage {stage.id}: {why}: {names}")
    return {"energy": chosen.energy, "layers": rows, "slower": slower, "measured": stage.measured}, why


class _Choice:
    """Ranks for the stage's goal, over layers that turn out to be faster."""

    def __init__(self, stage: FactorizeStage, found: list[Spectrum], macs: int, time_layer: TimeLayer | None) -> None:
        self.stage, self.macs, self.time_layer = stage, macs, time_layer
        self.found = found
        self.energy = stage.energy or 1.0
        self.slower: list[Factorization] = []
        self._timed: dict[Factorization, LatencyShare] = {}

    def settle(self) -> Mapping[str, Factorization]:
        """The steps to take. A layer that is not faster at its rank is left out, and the budget is met by the others.

        Raises PruningError where no layer is left, or too few for the budget.
        """
        while True:
            steps = self._steps()
            slow = [step for step in steps.values() if not self._is_faster(step)]
            if not slow:
                break
            self.slower += slow
            names = {step.layer for step in slow}
            self.found = [spectrum for spectrum in self.found if spectrum.layer not in names]
            if self.stage.energy is not None:
                steps = {name: step for name, step in steps.items() if name not in names}
                break
        if not steps:
            tried = f"; {len(self.slower)} were tried and are not faster here" if self.slower else ""
            raise PruningError(
                f"stage {self.stage.id}: nothing was factorized: at an energy of {self.energy:.1%} no layer "
                f"{'is faster' if self.slower else 'has fewer MACs'} as two{tried}; lower energy, or take the stage out"
            )
        return steps

    def _steps(self) -> dict[str, Factorization]:
        share = self.stage.macs_ratio
        if share is not None:
            energy = energy_for(self.found, share * self.macs) if self.found else None
            if energy is None:
                left = f", of the layers that are faster ({len(self.slower)} are not)" if self.slower else ""
                raise PruningError(
                    f"stage {self.stage.id}: macs_ratio {share:g} cannot be reached by low rank{left}; ask for less, "
                    "set measured: false, or prune channels"
                )
            self.energy = energy
        return choose(self.found, self.energy)

    def _is_faster(self, step: Factorization) -> bool:
        """Beyond doubt: the whole 95 % interval of the two layers' time is below the one layer's."""
        if self.time_layer is None:
            return True
        if step not in self._timed:
            self._timed[step] = self.time_layer(step)
        return self._timed[step].high < 1

    def timings(self, step: Factorization) -> Json:
        """What was measured of a step, for the record."""
        timed = self._timed.get(step)
        return {"latency": None if timed is None else timed.to_dict()}
