"""Sweeps: how a model's throughput grows with the images of a batch and with threads.

What enters: one ONNX file, a target and the latency found for it. What leaves: a scaling table a model, every row
measured beside the others in the same fresh processes, with its efficiency: the gain over one thread for each thread
paid, and the throughput of a batch against that of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import ConfigurationError
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.measuring import measure_latency

KINDS = ("threads", "batch", "options")
BATCHES = (1, 2, 4, 8)
MORE_BATCHES = (1, 2, 4, 8, 16, 32)
PROCESSES = 3
# What one process runs of each row at the least: windows of warming up and of measuring, three inferences each.
_LEAST_INFERENCES = 21
_SPARED = 2.0  # rows are left out when the least time of all would be more than this often the time allowed
Json = dict[str, Any]


def parse_sweeps(text: str | None) -> tuple[str, ...] | None:
    """`threads,batch` as given on the command line; None where nothing was. Raises ConfigurationError."""
    if text is None:
        return None
    kinds = tuple(word.strip() for word in text.split(",") if word.strip())
    if kinds == ("none",):
        return ()
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigurationError(f"--sweep {text}: known are {', '.join(KINDS)}, joined by commas, or none")
    return tuple(dict.fromkeys(kinds))


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and the cores themselves."""
    counts = [1]
    while counts[-1] * 2 < cores:
        counts.append(counts[-1] * 2)
    return counts + [cores] if cores > 1 else counts


def sweep(
    path: Path,
    *,
    kinds: Sequence[str],
    threads: int,
    cores: int,
    providers: Sequence[str],
    input_npy: Path | None,
    batch: int | None,
    expected_ms: float,
    seconds: float,
    batches: Sequence[int] = BATCHES,
    session: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    name: str = "",
) -> Json:
    """Measure `threads` and `batch` rows of one file; returns {"threads": [...], "batch": [...], "left_out": [...]}.

    `batch` is the images of one inference where they are fixed, else None. `expected_ms` is one image's latency at
    `threads`, by which rows that would take too long are left out, and said. Raises ProfileError.
    """
    rows: dict[str, Json] = {}
    left_out: list[str] = []
    counts = thread_counts(cores) if "threads" in kinds else []
    if "threads" in kinds and cores == 1:
        left_out.append("more threads than 1: the machine offers one core")
    rows |= {f"threads {count}": {"threads": count, "batch": batch or 1} for count in counts}
    if "batch" in kinds and batch is not None:
        left_out.append(f"other batches than {batch}: the batch is fixed, by the file or by --shape")
    elif "batch" in kinds:
        allowed = _SPARED * seconds * 1e3 / PROCESSES / _LEAST_INFERENCES
        chosen = [
            size for size in batches if sum(b for b in batches if b <= size) * expected_ms <= allowed or size == 1
        ]
        if len(chosen) < len(batches):
            least = PROCESSES * _LEAST_INFERENCES * expected_ms * sum(batches) / _SPARED / 1e3
            missing = ", ".join(str(size) for size in batches if size not in chosen)
            left_out.append(f"batch {missing}: {least:.0f} s would be needed, {seconds:g} s are allowed")
        if len(chosen) > 1:
            rows |= {f"batch {size}": {"threads": threads, "batch": size} for size in chosen}
    if not rows:
        return {"threads": [], "batch": [], "left_out": left_out, "processes": 0}
    measured = measure_latency(
        dict.fromkeys(rows, path),
        threads=threads,
        providers=providers,
        input_npy=input_npy,
        processes=PROCESSES,
        seconds=seconds,
        narrow_enough=0.03,
        session=session,
        settings=rows,
        shapes=shapes,
        what=f"{name or path.name} by {' and '.join(k for k in kinds if k != 'options')}",
    )
    return {
        "threads": _threads_table(measured, {k: v for k, v in rows.items() if k.startswith("threads")}),
        "batch": _batch_table(measured, {k: v for k, v in rows.items() if k.startswith("batch")}),
        "left_out": left_out,
        "processes": measured.processes,
    }


def _row(measured: LatencyMeasurement, key: str, settings: Json) -> Json:
    median = measured.percentile(key, 50)
    p90 = float(np.percentile(measured.latencies_ms(key), 90))
    return {
        **settings,
        "latency_ms_p50": median.value,
        "latency_ms_p50_ci95": [median.low, median.high],
        "latency_ms_p90": p90,
        "throughput_per_s": 1e3 * settings["batch"] / median.value,
    }


def _threads_table(measured: LatencyMeasurement, rows: Mapping[str, Json]) -> list[Json]:
    """Against one thread: `speedup` and its interval, and `efficiency`, which is the speed-up over the threads."""
    table = []
    first = next(iter(rows), "")
    for key, settings in rows.items():
        ratio = measured.ratio(first, key)
        row = _row(measured, key, settings) | {"speedup": ratio.ratio, "speedup_ci95": [ratio.low, ratio.high]}
        table.append(row | {"efficiency": ratio.ratio / settings["threads"]})
    return table


def _batch_table(measured: LatencyMeasurement, rows: Mapping[str, Json]) -> list[Json]:
    """Against one image at a time: `gain` is the throughput of a batch over that of single images."""
    table = []
    first = next(iter(rows), "")
    for key, settings in rows.items():
        ratio, size = measured.ratio(first, key), settings["batch"]
        row = _row(measured, key, settings) | {"gain": size * ratio.ratio}
        table.append(row | {"gain_ci95": [size * ratio.low, size * ratio.high]})
    return table
