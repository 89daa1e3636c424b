"""Latencies as they were measured, and what they say.

What enters: raw latencies by process and window. What leaves: medians, percentiles and ratios with their intervals, and
the same numbers as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.measure.statistics import (
    Interval,
    RatioInterval,
    drift_over,
    hierarchical_bootstrap_ratio,
    percentile_interval,
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LatencyMeasurement:
    """Latencies of models that ran side by side.

    `windows_ms[name][process][window]` is an array of latencies in ms, one per inference;
    `reference_ms[process]` holds the fixed reference loop of each round, `round_at[process]` when it ran (seconds since
    1970), `frequency_mhz[process]` the CPU's frequency then, None where the system does not tell.
    `on_cpu_ms[name][process]` is the median time for which an inference of each window really had a CPU, and
    `on_cpu_shares[name]` the share of their time that the inferences of each process had one; None where more than one
    thread works.
    """

    windows_ms: dict[str, list[list[Floats]]]
    reference_ms: list[Floats]
    steady_processes: int
    seconds: float
    stopped_because: str
    round_at: list[Floats] = field(default_factory=list)
    frequency_mhz: list[Floats] | None = None
    on_cpu_ms: dict[str, list[Floats]] | None = None
    on_cpu_shares: dict[str, Floats] | None = None

    @property
    def processes(self) -> int:
        """Number of fresh processes."""
        return len(self.reference_ms)

    @property
    def windows(self) -> int:
        """Number of windows of each model, over all processes."""
        return sum(len(reference) for reference in self.reference_ms)

    @cached_property
    def window_medians_ms(self) -> dict[str, list[Floats]]:
        """Median latency of each window, by model and process."""
        return {
            name: [np.array([np.median(window) for window in windows]) for windows in processes]
            for name, processes in self.windows_ms.items()
        }

    def latencies_ms(self, name: str) -> Floats:
        """Every latency of one model, over all processes."""
        return np.concatenate([window for process in self.windows_ms[name] for window in process])

    def ratio(self, slower: str, faster: str) -> RatioInterval:
        """How many times as long `slower` takes as `faster`.

        Where one thread does all the work, its time on the CPU is compared. When other processes want the same CPU,
        the system lets each have it for a few milliseconds in turn: a model that takes longer than a turn is nearly
        always interrupted, a shorter one seldom, and the ratio of their latencies tells more of that than of them.
        Where nothing else runs, the two are the same.
        """
        medians = self.window_medians_ms if self.on_cpu_ms is None else self.on_cpu_ms
        return hierarchical_bootstrap_ratio(medians[slower], medians[faster])

    def percentile(self, name: str, percentile: float) -> Interval:
        """A latency percentile of one model, in ms."""
        return percentile_interval(self.windows_ms[name], percentile)

    def drift(self, name: str | None = None) -> Interval | None:
        """Factor by which a model (None: the reference loop) got slower from the first process to the last.

        None where too few processes ran, or their times are not known.
        """
        if len(self.round_at) != len(self.reference_ms):
            return None
        values = self.reference_ms if name is None else self.window_medians_ms[name]
        at = [float(np.median(times)) for times in self.round_at]
        return drift_over(at, [float(np.median(process)) for process in values])

    def to_dict(self) -> dict[str, Any]:
        """Every latency, ready for JSON; `from_dict` reads it back."""
        windows = {
            name: [[window.tolist() for window in process] for process in processes]
            for name, processes in self.windows_ms.items()
        }
        return {
            "windows_ms": windows,
            "reference_ms": [loop.tolist() for loop in self.reference_ms],
            "steady_processes": self.steady_processes,
            "seconds": self.seconds,
            "stopped_because": self.stopped_because,
            "round_at": [times.tolist() for times in self.round_at],
            "on_cpu_ms": self.on_cpu_ms
            and {name: [process.tolist() for process in processes] for name, processes in self.on_cpu_ms.items()},
            "on_cpu_shares": self.on_cpu_shares and {name: s.tolist() for name, s in self.on_cpu_shares.items()},
            "frequency_mhz": None if self.frequency_mhz is None else [f.tolist() for f in self.frequency_mhz],
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> LatencyMeasurement:
        """What `to_dict` wrote."""
        windows = {
            name: [[np.array(window, dtype=np.float64) for window in process] for process in processes]
            for name, processes in document["windows_ms"].items()
        }
        arrays: dict[str, Any] = {
            key: None if document.get(key) is None else [np.array(row, dtype=np.float64) for row in document[key]]
            for key in ("reference_ms", "round_at", "frequency_mhz")
        }
        if document.get("on_cpu_ms") is not None:
            arrays["on_cpu_ms"] = {
                name: [np.array(process, dtype=np.float64) for process in processes]
                for name, processes in document["on_cpu_ms"].items()
            }
            arrays["on_cpu_shares"] = {name: np.array(s) for name, s in document["on_cpu_shares"].items()}
        return cls(**{**document, **arrays, "windows_ms": windows})


@dataclass(frozen=True)
class FreshMeasurement:
    """Loading one model: medians over fresh processes, and the smallest and largest value of each."""

    load_ms: float
    load_ms_range: tuple[float, float]
    first_inference_ms: float
    first_inference_ms_range: tuple[float, float]
    peak_rss_bytes: int | None
    peak_rss_bytes_range: tuple[int, int] | None
    rss_before_load_bytes: int | None
    processes: int
    cold_start_ms: float
    cold_start_ms_range: tuple[float, float]
