"""The step of each output channel's weights: the largest weight's, against the least squared error's.

    python benchmarks/weight_ranges.py --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors \
        --data imagenette --class-index class_index.json --other-data birds

Arms: the step that the largest weight asks for; the step of least squared rounding error in channels of few weights, as
the tool takes it; the same in every channel; and the same among smaller steps only, which cut weights off. Each with
`effort: fast` and `balanced`, and with --seeds choices of calibration images; the mean and the range of the agreement
with the float model and of the SQNR of its logits, on the images' own source and on the other.
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

_ALL = weight_ranges._SHARES
# (channels of at most so many weights, shares of the largest weight's step)
ARMS: dict[str, tuple[float, tuple[float, ...]]] = {
    "the largest weight's": (0, ()),
    "least error, few weights": (weight_ranges._MOST_WEIGHTS, _ALL),
    "least error, all channels": (math.inf, _ALL),
    "least error, smaller steps": (math.inf, tuple(share for share in _ALL if share <= 1.0)),
}


@contextmanager
def chosen_among(most_weights: float, shares: tuple[float, ...]) -> Iterator[None]:
    """Steps are chosen as an arm says within the block."""
    with patch.object(weight_ranges, "_MOST_WEIGHTS", most_weights), patch.object(weight_ranges, "_SHARES", shares):
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
    arguments = parser.parse_args()
    bench = TwoSources(arguments)
    table = Table(title=f"{arguments.model}: {arguments.samples} calibration images, {arguments.seeds} choices of them")
    for column in ("effort", "weight steps", "own source", "", "other source", ""):
        table.add_column(column)
    for effort in arguments.efforts:
        for name, arm in ARMS.items():
            agreements: list[list[float]] = [[], []]
            decibels: list[list[float]] = [[], []]
            for seed in range(arguments.seeds):
                with chosen_among(*arm):
                    int8 = bench.int8(bench.module, effort, bench.calibration(seed))
                for index, (agreement, noise) in enumerate(bench.compare(int8)):
                    agreements[index].append(agreement)
                    decibels[index].append(noise)
            cells = [
                cell
                for found, noise in zip(agreements, decibels, strict=True)
                for cell in (summary(found, "%", 100.0), summary(noise, "dB"))
            ]
            table.add_row(effort, name, *cells)
    console = Console(width=170)
    console.print(table)
    console.print(summarize_machine(describe_machine()))


if __name__ == "__main__":
    main()
