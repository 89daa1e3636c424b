"""`placement: auto`: is full int8 accurate enough and faster than fp32, and where not, which layers go back to float?

What enters: a float checkpoint, its full int8 model, held-out images (val, never test) and a target. What leaves: the
layers that stay in float, and stages/<id>/placement.json with everything that was measured, written after every trial,
so that a run that stops goes on with what it knows. On a target that is not at hand nothing is timed: then accuracy
alone decides, and multiply-accumulates stand in for time.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from edgecompress import console
from edgecompress.data.run_data import ImageData, calibration_indices
from edgecompress.errors import ProfileError
from edgecompress.int8.conv_kernels import choose_conv_kernels, use_matrix_products
from edgecompress.int8.layer_costs import costs_by_macs, costs_by_size, costs_by_time
from edgecompress.int8.mixed import MixedModel, exact_globs
from edgecompress.int8.placement import (
    Candidate,
    LayerCost,
    Limits,
    candidates,
    choose,
    first_accurate,
    front,
    is_faster,
    is_slower,
)
from edgecompress.int8.placement_trial import BATCH, HeldOut, judged, measured_again, timed, write_for_timing
from edgecompress.int8.post_training import quantize
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.sensitivity import noise_alone
from edgecompress.measure.operator_times import operator_times
from edgecompress.measure.profiling import not_at_hand
from edgecompress.models.checkpoint import Checkpoint, example_input, load_checkpoint
from edgecompress.reporting.placement_text import placement_table
from edgecompress.run_directory import Json, RunDirectory, read_json, versioned, write_json
from edgecompress.settings.recipe import QatStage, QuantizeStage, Recipe
from edgecompress.settings.target import Target
from edgecompress.stages.train_stages import PreparedSplits
from edgecompress.steps.run_state import last_float_id
from edgecompress.training.evaluate import accuracy, collect_logits

FILE = "placement.json"
HELD_OUT_IMAGES = 512  # an agreement of 98 % is then known to within 1.2 points
_NOISE_IMAGES = 16
_UNTRAINED_IMAGES = 8  # enough to run on; what random weights answer means nothing
_PROFILE_SECONDS = 1.0
_FACTS = (
    *("speedup", "speedup_ci95", "agreement", "agreement_ci95", "sqnr_db", "accuracy"),
    *("accuracy_drop", "accuracy_drop_ci95", "accurate_enough"),
)
_CALIBRATION_IMAGES = 4  # for files that are only timed, whose scales do not matter


@dataclass(frozen=True)
class Placed:
    """The layers to leave in float (none: full int8), why, and the numbers behind it."""

    float_layers: tuple[str, ...]
    why: str
    facts: Json = field(default_factory=dict)

    @property
    def decision(self) -> Json:
        """The value that run.json records."""
        return {"form": "mixed" if self.float_layers else "full", "float_layers": list(self.float_layers), **self.facts}


def limits_of(recipe: Recipe, stage: QuantizeStage) -> Limits:
    """What the recipe's gates ask of a placement.

    Nothing where the weights were not trained and so mean nothing, or where int8 is trained from here on.
    """
    if not recipe.has_trained_weights or isinstance(stage, QatStage):
        return Limits(None, None)
    return Limits(recipe.gates.max_accuracy_drop, recipe.gates.int8_min_top1_agreement)


def held_out(recipe: Recipe, run: RunDirectory, source: Checkpoint, data: ImageData, splits: PreparedSplits) -> HeldOut:
    """Up to HELD_OUT_IMAGES class-balanced images of val, on which choices are made."""
    preprocessing = source.architecture.preprocessing
    split = splits.get("val", preprocessing)
    count = HELD_OUT_IMAGES if recipe.has_trained_weights else _UNTRAINED_IMAGES
    indices = torch.from_numpy(calibration_indices(split.labels.numpy(), count, recipe.seed))
    images = torch.cat([preprocessing.normalize(batch) for batch, _ in split.batches(BATCH, indices=indices)])
    labels = split.labels[indices]
    manifest = run.read_manifest()
    baseline_id = str(manifest.get("baseline", manifest["stages"][0])["id"])
    baseline = source if baseline_id == last_float_id(recipe) else load_checkpoint(run.stage(baseline_id))
    split = splits.get("val", baseline.architecture.preprocessing)
    logits = collect_logits(
        baseline.module, split, baseline.architecture.preprocessing, indices=indices, description="judging the baseline"
    )
    return HeldOut(images, labels, logits.argmax(dim=1) == labels)


def with_float_layers(stage: QuantizeStage, float_layers: Sequence[str]) -> QuantizeStage:
    """The same settings with these layers (by exact name) in float."""
    return stage.model_copy(update={"exclude": (*stage.exclude, *exact_globs(float_layers))})


def place(
    model: QuantizedModel,
    *,
    source: Checkpoint,
    stage: QuantizeStage,
    target: Target,
    images: HeldOut,
    limits: Limits,
    folder: Path,
) -> Placed:
    """Decide on the placement of a full int8 model. `limits` without numbers stand for weights that were not trained.

    Raises ExportError or ProfileError where the files cannot be made or measured.
    """
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
        search = _Search(model, source, stage, target, images, limits, folder, Path(scratch))
        return search.run()


def confirmed(
    placed: Placed,
    model: QuantizedModel,
    *,
    source: Checkpoint,
    target: Target,
    images: HeldOut,
    limits: Limits,
    folder: Path,
    is_measured: bool,
) -> Placed:
    """The decision with the finished model measured again, under `final` in run.json and in placement.json.

    `is_measured`: this is the very model that was the search's only trial, so its numbers stand. Raises ExportError or
    ProfileError.
    """
    if is_measured:
        final = {key: placed.facts.get(key) for key in _FACTS}
    else:
        final = measured_again(model, source, images, target, placed.facts.get("matrix_product_convs", ()))
        final["accurate_enough"] = limits.judge(final)
        console.note(f"int8 as it leaves the stage, measured again: {_trial_words(final)}")
    path = folder / FILE
    if path.is_file():
        write_json(path, read_json(path) | {"final": final})
    return replace(placed, facts={**placed.facts, "final": final})


class _Search:
    """One search: what is known so far, in `document`, and how to know more."""

    def __init__(
        self,
        model: QuantizedModel,
        source: Checkpoint,
        stage: QuantizeStage,
        target: Target,
        images: HeldOut,
        limits: Limits,
        folder: Path,
        scratch: Path,
    ) -> None:
        self.model, self.source, self.stage, self.target = model, source, stage, target
        self.held_out, self.path, self.scratch = images, folder / FILE, scratch
        self.mixed = MixedModel(model)
        self.why_not_timed = not_at_hand(target)
        self.reference = torch.cat(
            [self.mixed.logits(batch, self.mixed.float_setting) for batch in torch.split(images.images, BATCH)]
        )
        self.limits, self.note = self._reachable(limits)
        self.document = self._start()
        self.started = time.monotonic()

    def run(self) -> Placed:
        """Full int8 first; the search only where that is not enough."""
        full = self._trial(Candidate((), 0.0, 0.0), "full")
        accurate = self.limits.met_by(full)
        is_open = self.limits.judge(full) == "inconclusive"
        if not accurate or _seems_slow(full):
            full = self._with_fastest_kernels(full)
        seems_slow = _seems_slow(full)
        if accurate and not seems_slow:
            return self._finish(full, self._words_for_full(full))
        reasons = []
        if not accurate:
            reasons.append("not accurate enough" + (", though that is inconclusive," if is_open else ""))
        if seems_slow:
            reasons.append("slower than fp32" if is_slower(full) else "not found to be faster than fp32")
        console.note(f"full int8 is {' and '.join(reasons)} ({_trial_words(full)}); searching for a placement")
        ordered = self._candidates()
        if not accurate:
            ordered = self._accurate(ordered)
        self._try(ordered)
        trials = self.document["trials"]
        needs_speed = not self.why_not_timed and self.stage.optimize == "latency"
        best, why = choose(trials, limits=self.limits, optimize=self.stage.optimize, needs_speed=needs_speed)
        return self._finish(best, f"full int8 is {' and '.join(reasons)}; {why}: {_trial_words(best)}")

    def _reachable(self, limits: Limits) -> tuple[Limits, str | None]:
        """Without the limit on accuracy where the float model misses it already: no placement could hold it."""
        limit = limits.max_accuracy_drop
        drop = self.held_out.baseline_accuracy - accuracy(self.reference, self.held_out.labels)
        if limit is None or drop <= limit:
            return limits, None
        text = f"the float model is {100 * drop:.2f} points below the baseline on held-out images already"
        return Limits(None, limits.min_agreement), text

    def _start(self) -> Json:
        """What an earlier, interrupted search of the same kind left, or an empty document."""
        key = {
            "target": self.target.name,
            "scheme": self.model.scheme.to_dict(),
            "stage": self.stage.model_dump(mode="json"),
            "held_out_images": len(self.held_out.labels),
        }
        if self.path.is_file():
            earlier = read_json(self.path)
            if earlier.get("key") == key:
                return earlier
        return {
            "key": key,
            "status": "running",
            "limits": {
                "max_accuracy_drop": self.limits.max_accuracy_drop,
                "min_agreement": self.limits.min_agreement,
                "note": self.note,
            },
            "timed": not self.why_not_timed,
            "not_timed_because": self.why_not_timed,
            "noise_alone": {},
            "segments": [],
            "trials": [],
            "front": [],
            "choice": None,
        }

    def _save(self) -> None:
        self.document["front"] = [trial["id"] for trial in front(self.document["trials"])]
        write_json(self.path, versioned(self.document))

    def _logits(self, float_layers: Sequence[str]) -> Tensor:
        setting = self.mixed.setting(float_layers)
        return torch.cat([self.mixed.logits(batch, setting) for batch in torch.split(self.held_out.images, BATCH)])

    def _judged(self, float_layers: tuple[str, ...]) -> Json:
        """Accuracy of a placement on held-out images, from the simulation; each is run once."""
        cached: Json = self.document.setdefault("accuracy", {})
        key = "\n".join(float_layers)
        if key not in cached:
            cached[key] = judged(self.reference, self._logits(float_layers), self.held_out)
        return dict(cached[key])

    def _trial(self, candidate: Candidate, name: str) -> Json:
        """Judge and measure one placement, and save it."""
        known = next((t for t in self.document["trials"] if tuple(t["float_layers"]) == candidate.float_layers), None)
        if known is not None:
            return dict(known)
        started = time.monotonic()
        trial: Json = {"id": name, "float_layers": list(candidate.float_layers), "predicted": candidate.cost}
        trial |= {"int8_layers": len(self.mixed.layers) - len(candidate.float_layers)}
        trial |= self._judged(candidate.float_layers)
        path = self._export(candidate.float_layers, name)
        trial |= {"accurate_enough": self.limits.judge(trial), "size_bytes": path.stat().st_size}
        trial |= timed(self._fp32(), path, self.target)
        trial["seconds"] = time.monotonic() - started
        self.document["trials"].append(trial)
        self._save()
        return trial

    def _with_fastest_kernels(self, full: Json) -> Json:
        """Full int8 timed again with the kernels that export would choose, which all placements then run with.

        They only ever make int8 faster, so where it is fast enough without, they need no measuring here.
        """
        if "matrix_product_convs" not in self.document:
            chosen = choose_conv_kernels(self._export((), "full"), self.target)
            names = [] if chosen is None else list(chosen.nodes)
            self.document["matrix_product_convs"] = names
            if names:
                full |= timed(self._fp32(), self._export((), "full"), self.target)
                self.document["trials"][0] = full
            self._save()
        return full

    def _export(self, float_layers: tuple[str, ...], name: str) -> Path:
        """The int8 file of a placement. Full int8 is at hand; others are calibrated on a few images, to be timed."""
        graph = self.model.graph
        if float_layers:
            stage = with_float_layers(self.stage, float_layers).model_copy(update={"effort": "fast"})
            few = self.held_out.images[:_CALIBRATION_IMAGES]
            graph = quantize(
                self.source.module,
                stage=stage,
                scheme=self.model.scheme,
                calibration=lambda: iter([few]),
                batches=1,
                example=example_input(self.source.architecture),
            ).graph
        path = self._write(graph, f"{name}.onnx")
        use_matrix_products(path, self.document.get("matrix_product_convs", ()))
        return path

    def _fp32(self) -> Path:
        path = self.scratch / "fp32.onnx"
        return path if path.is_file() else self._write(self.source.module, path.name)

    def _write(self, module: torch.nn.Module, name: str) -> Path:
        return write_for_timing(module, self.source, self.scratch / name, self.target)

    def _candidates(self) -> list[Candidate]:
        """Placements worth a trial, the cheapest first, from each layer's time (or MACs), bytes and noise."""
        by_noise = self.limits.max_accuracy_drop is not None or self.limits.min_agreement is not None
        noises: dict[str, float] = self.document["noise_alone"]
        if by_noise:

            def keep(layer: str, share: float) -> None:
                noises[layer] = share
                self._save()

            images = self.held_out.images[:_NOISE_IMAGES]
            noises |= noise_alone(self.mixed, images, known=noises, on_layer=keep)
        costs = self._costs(noises)
        self.document["segments"] = [cost.__dict__ for cost in costs]
        ordered = candidates(costs, by_noise=by_noise)
        if self.stage.optimize == "size":
            ordered = candidates(costs_by_size(self.mixed, noises), by_noise=by_noise) + ordered
        return list({candidate.float_layers: candidate for candidate in ordered}.values())

    def _costs(self, noises: dict[str, float]) -> list[LayerCost]:
        if self.why_not_timed:
            return costs_by_macs(self.mixed, noises)
        try:
            times = operator_times(
                self._fp32(),
                self._export((), "full"),
                threads=self.target.threads,
                input_npy=None,
                seconds=_PROFILE_SECONDS,
            )
            return costs_by_time(self.mixed, noises, times)
        except ProfileError as error:
            console.warn(f"{error}; layers are compared by their multiply-accumulates instead")
            return costs_by_macs(self.mixed, noises)

    def _accurate(self, ordered: list[Candidate]) -> list[Candidate]:
        """The candidates that are accurate enough by the simulation, the cheapest first; the best where none is."""
        by_noise = sorted(ordered, key=lambda candidate: -candidate.noise)
        with console.progress("judging placements", max(1, len(by_noise).bit_length())) as advance:

            def is_accurate(candidate: Candidate) -> bool:
                advance()
                return self.limits.met_by(self._judged(candidate.float_layers))

            first = first_accurate(by_noise, is_accurate)
        good = [c for c in by_noise[first:] if self.limits.met_by(self._judged(c.float_layers))]
        return sorted(good, key=lambda candidate: candidate.cost) or by_noise[-1:]

    def _try(self, ordered: Sequence[Candidate]) -> None:
        chosen = ordered[: self.stage.placement_trials]
        with console.progress("trying placements", len(chosen)) as advance:
            for number, candidate in enumerate(chosen, start=1):
                if time.monotonic() - self.started > self.stage.placement_seconds:
                    self.document["stopped_because"] = f"placement_seconds ({self.stage.placement_seconds:g}) are spent"
                    console.note(f"search stopped after {number - 1} trials: {self.document['stopped_because']}")
                    break
                advance(1, _trial_words(self._trial(candidate, f"p{number}")))

    def _words_for_full(self, full: Json) -> str:
        accurate = "full int8 is accurate enough"
        if self.limits.judge(full) == "inconclusive":
            accurate += f" by its numbers (inconclusive on {len(self.held_out.labels)} images)"
        if self.why_not_timed:
            return f"{accurate}; {'; '.join(self.why_not_timed)}, so its speed was not measured"
        if is_faster(full):
            return f"{accurate} and faster than fp32: {_trial_words(full)}"
        return f"{accurate}; whether it is faster than fp32 is open: {_trial_words(full)}"

    def _finish(self, chosen: Json, why: str) -> Placed:
        self.document |= {"status": "complete", "choice": chosen["id"], "why": why}
        self._save()
        if len(self.document["trials"]) > 1:
            console.table(placement_table(self.document))
        facts = {key: chosen.get(key) for key in _FACTS} | {
            "trials": len(self.document["trials"]),
            "target": self.target.name,
            "matrix_product_convs": self.document.get("matrix_product_convs", []),
        }
        facts["full_was_accurate"] = self.limits.met_by(self.document["trials"][0])
        return Placed(tuple(chosen["float_layers"]), why, facts)


def _seems_slow(trial: Json) -> bool:
    return trial["speedup"] is not None and trial["speedup"] < 1


def _trial_words(trial: Json) -> str:
    ratio = math.inf if trial["sqnr_db"] is None else trial["sqnr_db"]  # JSON has no name for infinity
    low, high = trial["agreement_ci95"]
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
    words = [f"{100 * trial['agreement']:.1f} % agreement ({interval}), {ratio:.1f} dB"]
    if trial["speedup"] is not None:
        low, high = trial["speedup_ci95"]
        words.append(f"fp32 takes {trial['speedup']:.2f} times as long (95 % interval {low:.2f} to {high:.2f})")
    return ", ".join(words)
