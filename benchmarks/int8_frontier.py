"""Agreement against latency: full int8, and placements that leave the layers in float where the noise is born.

    python benchmarks/int8_frontier.py --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors \
        --data imagenette --class-index class_index.json --other-data birds

First each layer's noise alone in int8 is measured on --noise-images training images that calibration does not see: the
first table. With the runtime's profile of both forms it gives the placements that `placement: auto` would try, as the
best for their cost. Of those that cost at most --max-slowdown more than full int8, --points are made in earnest
(calibrated and rounded with --effort), judged on the images of the reported split and on another source, and timed in
the same processes as fp32 and full int8: the second table. One point is the one with the least noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from edgecompress.data.images import SPLIT_NAMES
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit, calibration_indices, open_data
from edgecompress.exporting.onnx_export import INPUT_NAME, OUTPUT_NAME, Provenance, export_onnx, open_session
from edgecompress.exporting.parity import Logits, sqnr_db, top1_agreement
from edgecompress.int8.layer_costs import costs_by_time
from edgecompress.int8.mixed import MixedModel, exact_globs
from edgecompress.int8.placement import Candidate, candidates
from edgecompress.int8.post_training import quantize
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.int8.scheme import resolve_scheme
from edgecompress.int8.sensitivity import noise_alone
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.measure.integer_graph import inspect_integer_graph
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.operator_times import operator_times
from edgecompress.models.checkpoint import example_input
from edgecompress.models.model_building import create_model
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DataSettings, QuantizeStage
from edgecompress.settings.target import load_target

_BATCH = 32
_SIDE_BY_SIDE = 3  # beside fp32 and full int8; processes take turns through every order
_PROFILE_SECONDS = 2.0
_SHOWN_LAYERS = 8
Pixels = NDArray[np.uint8]


def spread_out(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most `count` candidates that no other beats in cost and noise, at even steps of noise in decibels."""
    front: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.cost, c.noise)):
        if candidate.noise > 0 and (not front or candidate.noise < 0.97 * front[-1].noise):
            front.append(candidate)
    if len(front) <= count:
        return front
    if count == 1:
        return front[-1:]
    levels = np.log([candidate.noise for candidate in front])
    wanted = np.linspace(levels[0], levels[-1], count)
    chosen = sorted({int(np.abs(levels - level).argmin()) for level in wanted})
    return [front[index] for index in chosen]


def _pixels(split: PreparedSplit, indices: NDArray[np.int64]) -> Pixels:
    return np.concatenate([batch.numpy() for batch, _ in split.batches(_BATCH, indices=torch.from_numpy(indices))])


class _Frontier:
    """One model, its images, and the files made of it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.target = load_target(arguments.target)
        data = open_data(DataSettings(name="image_folder", root=arguments.data, class_index=arguments.class_index))
        torch.manual_seed(0)
        created = create_model(ModelSettings(name=arguments.model, checkpoint=arguments.checkpoint), data)
        self.module, self.example = created.module.eval(), example_input(created.architecture)
        self.preprocessing: Preprocessing = created.architecture.preprocessing
        train = data.splits["train"].prepare(self.preprocessing, cache=False)
        report = data.splits[data.report_split].prepare(self.preprocessing, cache=False)
        chosen = np.sort(np.random.default_rng(0).permutation(len(report))[: arguments.images])
        self.images, self.labels = _pixels(report, chosen), report.labels.numpy()[chosen]
        calibrating = calibration_indices(train.labels.numpy(), arguments.samples, 0)
        self.calibration = self._normalized(_pixels(train, calibrating))
        others = np.setdiff1d(np.arange(len(train)), calibrating)
        held_out = np.sort(np.random.default_rng(0).permutation(others)[: arguments.noise_images])
        self.held_out = self._normalized(_pixels(train, held_out))
        self.other: Pixels | None = None
        if arguments.other_data is not None:
            other = open_data(DataSettings(name="image_folder", root=arguments.other_data))
            name = next(name for name in reversed(SPLIT_NAMES) if name in other.splits)
            split = other.splits[name].prepare(self.preprocessing, cache=False)
            drawn = np.sort(np.random.default_rng(0).permutation(len(split))[: arguments.other_images])
            self.other = _pixels(split, drawn)
        np.save(folder / "latency.npy", self._normalized(self.images[:16]).numpy())
        self.files: dict[str, Path] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self._export(self.module, "fp32")
        self.reference = self._logits("fp32", self.images)
        self.other_reference = None if self.other is None else self._logits("fp32", self.other)
        self.rows["fp32"] = {"accuracy": self._accuracy(self.reference)}

    def _normalized(self, pixels: Pixels) -> torch.Tensor:
        return self.preprocessing.normalize(torch.from_numpy(pixels)).contiguous(memory_format=torch.channels_last)

    def _accuracy(self, logits: Logits) -> float:
        return float(np.mean(logits.argmax(axis=1) == self.labels))

    def _export(self, module: torch.nn.Module, name: str) -> None:
        self.files[name] = self.folder / f"{name.replace(' ', '_')}.onnx"
        export_onnx(
            module,
            self.example,
            self.files[name],
            target=self.target,
            preprocessing=self.preprocessing,
            provenance=Provenance((), "benchmark", "", versions()),
            extra_metadata={},
        )

    def _logits(self, name: str, images: Pixels) -> Logits:
        session = open_session(self.files[name])
        parts = (self._normalized(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH))
        return np.concatenate([session.run([OUTPUT_NAME], {INPUT_NAME: part.numpy()})[0] for part in parts])

    def add(self, name: str, float_layers: Sequence[str]) -> QuantizedModel:
        """Make a placement with all that the effort has, and judge its file."""
        stage = QuantizeStage.model_validate(
            {
                "kind": "quantize",
                "id": "int8",
                "effort": self.arguments.effort,
                "placement": "full",
                "exclude": list(exact_globs(float_layers)),
            }
        )

        def batches() -> Iterator[torch.Tensor]:
            yield from torch.split(self.calibration, _BATCH)

        model = quantize(
            self.module,
            stage=stage,
            scheme=resolve_scheme(stage, self.target)[0],
            calibration=batches,
            batches=-(-len(self.calibration) // _BATCH),
            example=self.example,
        )
        self._export(model.graph, name)
        logits = self._logits(name, self.images)
        row: dict[str, Any] = {
            "float_layers": list(float_layers),
            "accuracy": self._accuracy(logits),
            "agreement": top1_agreement(self.reference, logits),
            "sqnr_db": sqnr_db(self.reference, logits),
            "int8_mac_coverage": inspect_integer_graph(self.files[name]).int8_mac_coverage,
            "correction": model.correction,
        }
        if self.other is not None and self.other_reference is not None:
            other = self._logits(name, self.other)
            row |= {"other_agreement": top1_agreement(self.other_reference, other)}
            row |= {"other_sqnr_db": sqnr_db(self.other_reference, other)}
        self.rows[name] = row
        return model

    def find(self, model: QuantizedModel) -> tuple[dict[str, float], list[Candidate]]:
        """Each layer's noise alone, and the placements to make."""
        mixed = MixedModel(model)
        noises = noise_alone(mixed, self.held_out)
        times = operator_times(
            self.files["fp32"],
            self.files["full int8"],
            threads=self.arguments.threads,
            input_npy=self.folder / "latency.npy",
            seconds=_PROFILE_SECONDS,
        )
        costs = costs_by_time(mixed, noises, times)
        most = (1 + self.arguments.max_slowdown) * sum(cost.int8_cost for cost in costs)
        found = [candidate for candidate in candidates(costs, by_noise=True) if candidate.cost <= most]
        return noises, spread_out(found, self.arguments.points)

    def measure(self) -> None:
        """Latencies, a few placements at a time beside fp32 and full int8."""
        names = [name for name in self.files if name not in ("fp32", "full int8")]
        for start in range(0, max(1, len(names)), _SIDE_BY_SIDE):
            group = ["full int8", *names[start : start + _SIDE_BY_SIDE]]
            measured = measure_latency(
                {name: self.files[name] for name in ("fp32", *group)},
                threads=self.arguments.threads,
                providers=self.target.providers,
                input_npy=self.folder / "latency.npy",
                seconds=self.arguments.seconds,
            )
            self.rows["fp32"].setdefault("p50_ms", measured.percentile("fp32", 50).value)
            for name in group:
                row = self.rows[name]
                if "p50_ms" in row:
                    continue
                row["p50_ms"] = measured.percentile(name, 50).value
                for key, pair in (("fp32_over_this", ("fp32", name)), ("this_over_full", (name, "full int8"))):
                    if pair[0] != pair[1]:
                        ratio = measured.ratio(*pair)
                        row[key] = {"ratio": ratio.ratio, "ci95": [ratio.low, ratio.high]}


def _ratio(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['ratio']:.2f} [{entry['ci95'][0]:.2f}, {entry['ci95'][1]:.2f}]"


def show(console: Console, frontier: _Frontier, noises: dict[str, float]) -> None:
    """Where noise is born, and the front."""
    total = sum(noises.values())
    born = Table(title=f"{frontier.arguments.model}: noise of the logits by the layer alone in int8")
    for column in ("layer", "share", "SQNR alone"):
        born.add_column(column, justify="left" if column == "layer" else "right")
    for layer, share in sorted(noises.items(), key=lambda item: -item[1])[:_SHOWN_LAYERS]:
        born.add_row(layer, f"{share / total:.1%}", f"{-10 * np.log10(share):.1f} dB")
    console.print(born)
    table = Table(title=f"{len(frontier.images)} images, effort {frontier.arguments.effort}")
    columns = ("", "in float", "int8 MACs", "top-1", "agreement", "SQNR", "other source", "ms", "fp32 / this")
    for column in (*columns, "this / full int8"):
        table.add_column(column, justify="left" if column in ("", "in float") else "right")
    for name, row in frontier.rows.items():
        layers = row.get("float_layers", [])
        told = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        other = f"{row['other_agreement']:.2%}, {row['other_sqnr_db']:.1f} dB" if "other_agreement" in row else ""
        table.add_row(
            name,
            told,
            f"{row['int8_mac_coverage']:.1%}" if "int8_mac_coverage" in row else "",
            f"{row['accuracy']:.2%}",
            f"{row['agreement']:.2%}" if "agreement" in row else "",
            f"{row['sqnr_db']:.1f} dB" if "sqnr_db" in row else "",
            other,
            f"{row['p50_ms']:.2f}" if "p50_ms" in row else "",
            _ratio(row.get("fp32_over_this")),
            _ratio(row.get("this_over_full")),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="for instance timm/tf_efficientnet_lite0")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="an image folder with train/ and val/")
    parser.add_argument("--class-index", type=Path)
    parser.add_argument("--other-data", type=Path, help="an image folder of another source; its labels are not used")
    parser.add_argument("--other-images", type=int, default=500, help="images of it, at most")
    parser.add_argument("--samples", type=int, default=64, help="calibration images")
    parser.add_argument("--noise-images", type=int, default=16, help="images that rank the layers")
    parser.add_argument("--images", type=int, default=2000, help="images evaluated, at most")
    parser.add_argument("--points", type=int, default=5, help="placements beside full int8")
    parser.add_argument("--max-slowdown", type=float, default=0.25, help="of full int8's predicted time, a fraction")
    parser.add_argument("--effort", choices=["fast", "balanced", "best"], default="balanced")
    parser.add_argument("--seconds", type=float, default=25.0, help="time for the latency of each group of files")
    parser.add_argument("--threads", type=int, default=1, help="threads of the latencies")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--json", type=Path, help="also write every number here")
    parser.add_argument("--keep", type=Path, help="keep the files here")
    arguments = parser.parse_args()
    console, notes = Console(width=190), Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        frontier = _Frontier(arguments, folder)
        noises, found = frontier.find(frontier.add("full int8", ()))
        for number, candidate in enumerate(found, start=1):
            notes.print(f"placement {number} of {len(found)}: {len(candidate.float_layers)} layers in float")
            frontier.add(f"{len(candidate.float_layers)} in float", candidate.float_layers)
        if arguments.seconds > 0:
            frontier.measure()
        show(console, frontier, noises)
    facts = describe_machine()
    console.print(f"machine: {summarize_machine(facts)}; versions: {versions()}")
    if arguments.json is not None:
        document = {"machine": facts, "noise_alone": noises, "rows": frontier.rows}
        arguments.json.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
