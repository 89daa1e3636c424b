"""Why a layer loses by int8, and which setting mends it.

What enters: a calibrated int8 model, its calibration images, held-out images and every layer's sensitivity. What
leaves: for the worst layers, causes with numbers and settings of the recipe. No cause is guessed from statistics: each
is an experiment. The layer alone is run again with one thing changed (another range, a range for each channel, its
outliers or its weights in float), and the cause is named where that change wins back what was lost. What the setting
does to the whole int8 model is simulated the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from edgecompress import console
from edgecompress.int8.causes import (
    NARROW_CHANNEL,
    NARROW_WEIGHTS,
    OUTLIER,
    SATURATION,
    WEIGHTS,
    Cause,
    float_operators,
    layer_integers,
    percent,
    sixteen_bit_sums,
)
from edgecompress.int8.grids import METHODS, Grid, Rounders, observe_grids
from edgecompress.int8.histogram import Range
from edgecompress.int8.mixed import MixedModel, Setting, decibels, module_name, noise
from edgecompress.int8.sensitivity import LayerSensitivity, Sensitivity
from edgecompress.settings.recipe import QuantizeStage

Json = dict[str, Any]

HEALTHY_DB = 40.0  # a layer that loses less alone is not asked further
_PART = 0.2  # share of a layer's loss from which on one of its parts is asked
_HELPS_DB = 1.0  # what another setting must win back in the layer alone
_EXPLAINS_DB = 6.0  # one bit: what a change that no setting makes must win back in a tensor to be called the cause
_HALF_DB = 3.0  # half of a layer's loss: from which on weights that were rounded with care are still the cause
_FEW_STEPS = 16  # of 256: a channel that uses fewer has less than 4 bits
_FEW_INTEGERS = 16  # a channel of weights is narrow when their root mean square is below the limit over this
_SAME_DB = 0.1
_SAMPLES = "samples"
_FAR = 1.5  # a range this many times wider than what was seen was not made for these images
_EFFORTS = ("fast", "balanced", "best")


@dataclass(frozen=True)
class Diagnosis:
    """One layer: what int8 costs in it alone, which of its parts cost that, and why. Without causes nothing is wrong.

    `parts` are shares of the layer's loss: its weights, and each tensor that is rounded for it.
    """

    layer: str
    alone_sqnr_db: float
    gain_db: float
    parts: dict[str, float]
    causes: tuple[Cause, ...]

    def to_dict(self) -> Json:
        """As JSON holds it."""
        return asdict(self) | {"causes": [asdict(cause) for cause in self.causes]}


@dataclass(frozen=True)
class Findings:
    """The worst layers' diagnoses, what holds for the model as a whole, and full int8's SQNR by calibration method.

    What concerns the model costs speed (operators in float), or is lost on a device only (16-bit sums).
    """

    layers: tuple[Diagnosis, ...]
    model: tuple[Cause, ...]
    methods: dict[str, float]

    def to_dict(self) -> Json:
        """As JSON holds it."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "model": [asdict(cause) for cause in self.model],
            "methods": dict(self.methods),
        }


def diagnose(
    mixed: MixedModel,
    images: Tensor,
    found: Sensitivity,
    *,
    calibration: Iterable[Tensor],
    stage: QuantizeStage,
    saturates: bool,
    worst: int = 5,
) -> Findings:
    """Diagnose the `worst` layers of `found` on one normalized batch [N, C, H, W].

    `calibration` gives the batches that the model was calibrated on, from which other methods choose other ranges.
    `saturates`: whether the target adds products in 16 bits (x86 without VNNI).
    """
    doctor = _Doctor(mixed, images, found, stage, calibration)
    rows = found.worst_first()[:worst]
    with console.progress("asking for causes", len(rows)) as advance:
        diagnoses = []
        for row in rows:
            diagnoses.append(doctor.examine(row))
            advance()
    of_the_model = [*(sixteen_bit_sums(mixed) if saturates else []), *float_operators(mixed, stage)]
    return Findings(tuple(diagnoses), tuple(of_the_model), doctor.methods)


class _Doctor:
    """Runs the experiments, each on the same images."""

    def __init__(
        self,
        mixed: MixedModel,
        images: Tensor,
        found: Sensitivity,
        stage: QuantizeStage,
        calibration: Iterable[Tensor],
    ) -> None:
        self.mixed, self.images, self.found, self.stage = mixed, images, found, stage
        self.reference = mixed.logits(images, mixed.float_setting)
        self.full = mixed.setting(())
        self.grids = observe_grids(mixed, images, calibration)
        self.methods = {method: self._with({g: g.range_by(method) for g in self.grids}) for method in METHODS}

    def examine(self, row: LayerSensitivity) -> Diagnosis:
        """One layer's parts and causes."""
        alone = self.mixed.setting(other for other in self.mixed.layers if other != row.layer)
        grids = [grid for grid in self.grids if grid.sources & alone.rounded]
        costs = {"weights": self._noise(Setting(frozenset(), frozenset(), alone.layers))}
        for grid in grids:
            costs[self._name(grid)] = self._noise(_only(alone, grid))
        total = sum(costs.values())
        parts = {name: cost / total if total > 0 else 0.0 for name, cost in costs.items()}
        causes: list[Cause] = []
        if row.alone_sqnr_db < HEALTHY_DB:
            for grid in grids:
                if parts[self._name(grid)] >= _PART:
                    causes += self._activation(alone, grid, row.alone_noise)
            if parts["weights"] >= _PART:
                causes += self._weights(alone, row)
        return Diagnosis(row.layer, row.alone_sqnr_db, row.gain_db, parts, tuple(causes))

    def _activation(self, alone: Setting, grid: Grid, now: float) -> list[Cause]:
        """A range that is too wide or too narrow; where no other range helps, channels or outliers apart from it."""
        choices = {method: grid.range_by(method) for method in METHODS} | {_SAMPLES: grid.range_seen_by(self._seen)}
        noises = {name: self._noise(alone, grid.with_range(ends)) for name, ends in choices.items()}
        # A method is set for all layers: of those that serve this one about as well, the best for all of int8.
        least = min(noises[method] for method in METHODS)
        alike = [method for method in METHODS if _gain(noises[method], least) < _HELPS_DB]
        best = max(alike, key=lambda method: self.methods[method])
        # A setting of the method before more images, which cost the user more.
        name = _SAMPLES if _gain(noises[best], noises[_SAMPLES]) >= _HELPS_DB else best
        gain = _gain(now, noises[name])
        if gain >= _HELPS_DB:
            return self._calibrating(grid, name, choices[name], gain)
        part = _only(alone, grid)
        least = min(self._noise(part), *(self._noise(part, grid.with_range(ends)) for ends in choices.values()))
        channels = _gain(least, self._noise(part, grid.per_channel()))
        outliers = _gain(least, self._noise(part, grid.outliers_in_float()))
        steps = grid.steps()
        few = int((steps < _FEW_STEPS).sum())
        if few and channels >= _EXPLAINS_DB and channels >= outliers - _HELPS_DB:
            words = (
                f"{few} of {len(steps)} channels of {self._name(grid)} use fewer than {_FEW_STEPS} of its 256 steps, "
                f"because others are wider; a scale for each would win {channels:.1f} dB in this tensor, but kernels "
                "have one a tensor"
            )
            numbers = {
                "channels": len(steps),
                "narrow": few,
                "median_steps": float(steps.median()),
                "gain_db": channels,
            }
            return self._excluding(NARROW_CHANNEL, words, grid, numbers)
        if outliers >= _EXPLAINS_DB:
            words = (
                f"{self._spread(grid)}; both matter, so no calibration method wins {_HELPS_DB:g} dB here, while "
                f"outliers in float would win {outliers:.1f} dB in this tensor"
            )
            return self._excluding(OUTLIER, words, grid, {**self._range_numbers(grid), "gain_db": outliers})
        return []

    @property
    def _seen(self) -> str:
        """The method in use, or what comes nearest to it."""
        used = self.stage.calibration.method
        return "percentile 99.99" if used == "percentile" else used if used in METHODS else "mse"

    def _range_words(self, grid: Grid, chosen: Range, gain: float) -> str:
        (start, end), (low, high), (seen_low, seen_high) = grid.range, chosen, grid.seen
        name, wins = self._name(grid), f"wins {gain:.1f} dB in this layer"
        if _width((low, high)) > _width(grid.range):
            return (
                f"the range {start:.4g} to {end:.4g} of {name} cuts off {percent(grid.clipped_share)} of the values, "
                f"which reach from {seen_low:.4g} to {seen_high:.4g}; a wider range {wins}"
            )
        other = f"{min(low, 0.0):.4g} to {max(high, 0.0):.4g} instead {wins}"
        if _width(grid.seen) < _width(grid.range) / _FAR:
            return (
                f"the range {start:.4g} to {end:.4g} of {name} is {_width(grid.range) / _width(grid.seen):.1f} times "
                f"wider than what these images reach: calibration met rare values; {other}"
            )
        if grid.outlier_ratio < _FAR:
            return f"the range {start:.4g} to {end:.4g} of {name} does not fit the values; {other}"
        return f"{self._spread(grid)}; the range is {start:.4g} to {end:.4g}, {other}"

    def _calibrating(self, grid: Grid, name: str, chosen: Range, gain: float) -> list[Cause]:
        """The calibration setting that mends a range, where it does not harm the rest; else a return to float."""
        kind = SATURATION if _width(chosen) > _width(grid.range) else OUTLIER
        words = self._range_words(grid, chosen, gain)
        numbers = {**self._range_numbers(grid), "clipped_share": grid.clipped_share, "gain_db": gain}
        if name == _SAMPLES:
            then = self._with({g: g.range_seen_by(self._seen) for g in self.grids})
            setting = (
                f"calibration.samples: more than {self.stage.calibration.samples}, as varied as what the model meets"
            )
            if self._seen == "minmax" and kind == OUTLIER:  # more images never narrow it
                start, end = grid.range
                setting = f"leave the odd images out of train that bring values as far as {start:.4g} to {end:.4g}"
        else:
            then, percentile = self.methods[name], METHODS[name]
            setting = f"calibration.method: {name.partition(' ')[0]}"
            setting += f", calibration.percentile: {percentile:g}" if percentile is not None else ""
        if then < self.found.full_sqnr_db - _SAME_DB:
            return self._excluding(kind, f"{words}; but {setting} leaves full int8 with {then:.1f} dB", grid, numbers)
        return [Cause(kind, words, setting, then, numbers)]

    def _excluding(self, kind: str, words: str, grid: Grid, numbers: Json) -> list[Cause]:
        """All layers that read or write the tensor back to float: one of them alone would leave it rounded.

        No cause where that does not help all of int8, since nothing would be mended.
        """
        layers = [layer for layer in self.mixed.layers if grid.sources & self._alone(layer).rounded]
        mended = decibels(self._noise(self.mixed.setting(layers)))
        if mended < self.found.full_sqnr_db + _SAME_DB:
            return []
        return [Cause(kind, words, _exclude(layers), mended, numbers)]

    def _weights(self, alone: Setting, row: LayerSensitivity) -> list[Cause]:
        """Weights that would do better in float, and by how much; narrow channels where few integers are used."""
        gain = _gain(row.alone_noise, self._noise(Setting(alone.outputs, alone.edges, frozenset())))
        is_plain = self.stage.effort == "fast"
        if gain < (_HELPS_DB if is_plain else _HALF_DB):
            return []
        limit = self.mixed.model.scheme.weight_limit / _FEW_INTEGERS
        integers = layer_integers(self.mixed, row.layer)
        spreads = [*(_rms(i) for i in integers), *(_rms(i.transpose(0, 1)) for i in integers if i.shape[1] > 1)]
        narrow, channels = sum(int((s < limit).sum()) for s in spreads), sum(len(s) for s in spreads)
        numbers = {"channels": channels, "narrow": narrow, "gain_db": gain}
        words = f"its weights in float, now {self.mixed.model.correction}, would win {gain:.1f} dB in this layer"
        if narrow:
            words += (
                f"; in {narrow} of its {channels} output and input channels the weights use fewer than "
                f"{math.ceil(limit)} integers each way (root mean square), because others are larger"
            )
        kind = NARROW_WEIGHTS if narrow else WEIGHTS
        effort = _next_effort(self.stage.effort)
        if effort is not None:
            return [Cause(kind, words, f"effort: {effort}", None, numbers)]
        if row.gain_db < _SAME_DB:
            return []  # the layers behind it were rounded to make good what it loses
        return [Cause(kind, words, _exclude([row.layer]), row.without_sqnr_db, numbers)]

    def _alone(self, layer: str) -> Setting:
        return self.mixed.setting(other for other in self.mixed.layers if other != layer)

    def _with(self, ranges: Mapping[Grid, Range]) -> float:
        """SQNR of full int8 with other ranges."""
        rounders: Rounders = {}
        for grid, chosen in ranges.items():
            rounders |= grid.with_range(chosen)
        return decibels(self._noise(self.full, rounders))

    def _noise(self, setting: Setting, rounders: Rounders | None = None) -> float:
        with self.mixed.replacing(rounders or {}):
            return noise(self.reference, self.mixed.logits(self.images, setting))

    def _name(self, grid: Grid) -> str:
        """A tensor by what it is behind: the module that made it, or the images."""
        nodes = {node.name: node for node in self.mixed.reference.graph.nodes}
        first = next(node for name, node in nodes.items() if name in grid.sources)
        return "the images" if first.op == "placeholder" else f"the output of {module_name(first)}"

    def _spread(self, grid: Grid) -> str:
        (low, high), (bulk_low, bulk_high) = grid.seen, grid.bulk
        return (
            f"the values of {self._name(grid)} reach from {low:.4g} to {high:.4g}, but 99.9 % lie in {bulk_low:.4g} to "
            f"{bulk_high:.4g}, {grid.outlier_ratio:.1f} times narrower"
        )

    def _range_numbers(self, grid: Grid) -> Json:
        return {"range": grid.range, "seen": grid.seen, "bulk": grid.bulk, "outlier_ratio": grid.outlier_ratio}


def _only(alone: Setting, grid: Grid) -> Setting:
    """One tensor of a setting rounded and nothing else."""
    edges = frozenset(edge for edge in alone.edges if edge[0] in grid.sources)
    return Setting(alone.outputs & grid.sources, edges, frozenset())


def _gain(before: float, after: float) -> float:
    """By how many dB the second noise is below the first."""
    return decibels(after) - decibels(before) if before > 0 and after > 0 else (math.inf if before > 0 else 0.0)


def _width(ends: Range) -> float:
    """The width of a range with zero inside."""
    return max(ends[1], 0.0) - min(ends[0], 0.0)


def _rms(integers: Tensor) -> Tensor:
    """Root mean square of each row [rows, ...]; rows of zeros are left out."""
    found = integers.flatten(1).float().square().mean(1).sqrt()
    return found[found > 0]


def _next_effort(effort: str) -> str | None:
    """The next effort above that this version knows."""
    known: Mapping[str, Any] = QuantizeStage.model_json_schema()["properties"]["effort"]
    rest = [name for name in _EFFORTS[_EFFORTS.index(effort) + 1 :] if name in known["enum"]]
    return rest[0] if rest else None


def _exclude(layers: Sequence[str]) -> str:
    return f"exclude: [{', '.join(layers)}]"
