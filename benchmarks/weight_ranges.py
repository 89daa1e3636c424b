"""The step of each output channel's weights: the largest weight's, against the one whose rounding does least harm.

    python benchmarks/weight_ranges.py --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors \
        --data imagenette --class-index class_index.json --other-data birds

Arms: the step that the largest weight asks for; in channels of few weights the step of least squared rounding error;
the same with the sum of the errors beside their squares, as the tool has it; and that in every channel. For each effort
of --efforts and with --seeds choices of calibration images: the mean and the range of the agreement with the float
model and of the SQNR of its logits, on the images' own source and on the other. --target x86-avx2 has 7-bit weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from two_sources import TwoSources, add_arguments

from edgecompress.int8 import weight_ranges
from edgecompress.machine import describe_machine, summarize_machine

# (channels of at most so many weights, what the sum of the errors counts beside their squares)
ARMS: dict[str, tuple[float, float]] = {
    "the largest weight's": (0, 0.0),
    "least squares, few weights": (weight_ranges._MOST_WEIGHTS, 0.0),
    "least harm, few weights": (weight_ranges._MOST_WEIGHTS, weight_ranges._SUM_WEIGHT),
    "least harm, all channels": (math.inf, weight_ranges._SUM_WEIGHT),
}


@contextmanager
def chosen_by(most_weights: float, sum_weight: float) -> Iterator[None]:
    """Steps are chosen as an arm says within the block."""
    with (
        patch.object(weight_ranges, "_MOST_WEIGHTS", most_weights),
        patch.object(weight_ranges, "_SUM_WEIGHT", sum_weight),
    ):
        yield


def summary(values: list[float], unit: str, scale: float = 1.0) -> str:
    """Mean and range."""
    low, middle, high = (function(values) * scale for function in (min, mean, max))
    return f"{middle:.2f} {unit} [{low:.2f}, {high:.2f}]" if len(values) > 1 else f"{middle:.2f} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, samples=128)
    parser.add_argument("--seeds", type=int, default=3, help="choices of calibration images")
    parser.add_argument("--efforts", nargs="*", default=["fast", "balanced"])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=[*ARMS])
    arguments = parser.parse_args()
    bench = TwoSources(arguments)
    drawn = f"{arguments.seeds} choices of {arguments.samples} calibration images"
    table = Table(title=f"{arguments.model}, target {arguments.target}: {drawn}")
    for column in ("effort", "weight steps", "own source", "", "other source", ""):
        table.add_column(column)
    for effort in arguments.efforts:
        for name in arguments.arms:
            agreements: list[list[float]] = [[], []]
            decibels: list[list[float]] = [[], []]
            for seed in range(arguments.seeds):
                with chosen_by(*ARMS[name]):
                    int8 = bench.int8(bench.module, effort, bench.calibration(seed))
                for index, (agreement, sqnr_db) in enumerate(bench.compare(int8)):
                    agreements[index].append(agreement)
                    decibels[index].append(sqnr_db)
            cells = [
                cell
                for of_source in zip(agreements, decibels, strict=True)
                for cell in (summary(of_source[0], "%", 100.0), summary(of_source[1], "dB"))
            ]
            table.add_row(effort, name, *cells)
    console = Console(width=170)
    console.print(table)
    console.print(summarize_machine(describe_machine()))


if __name__ == "__main__":
    main()
