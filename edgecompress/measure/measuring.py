"""Fresh processes in, latencies with intervals out.

What enters: ONNX files and how to run them. What leaves: raw latencies by process and window, the time that
loading takes and the memory it costs. The measuring is done by `measure_worker` in processes of their
own, because one process's luck lasts as long as it lives; this module only starts them, one at a time, and
decides when enough is known.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress import console
from edgecompress.errors import ProfileError
from edgecompress.measure.answers import Answers
from edgecompress.measure.statistics import (
    Interval,
    RatioInterval,
    drift_over,
    hierarchical_bootstrap_ratio,
    percentile_interval,
)

WORKER = "edgecompress.measure.measure_worker"
MIN_PROCESSES = 5
MAX_PROCESSES = 40
WINDOW_MS = 60.0
NARROW_ENOUGH = 0.015  # relative half-width of the 95 % interval at which measuring stops
FRESH_PROCESSES = 3
# Processes differ more than windows do, so the time allowed is cut into many short processes.
_SHARES = 12
_SHORTEST_SECONDS = 0.15
_LONGEST_SECONDS = 4.0
_TIMEOUT_SECONDS = 120.0
_STDERR_LINES = 8
# With many models at once not every order gets a process, and not every pair is waited for.
_MOST_PERMUTED = 4
Floats = npt.NDArray[np.float64]
Json = dict[str, Any]


@dataclass(frozen=True)
class Thoroughness:
    """How long to measure: seconds allowed, the relative half-width that is narrow enough, and the fewest processes.

    The seconds are a limit for the latency of all models together; the processes that an interval needs always run.
    """

    seconds: float
    narrow_enough: float
    processes: int


STANDARD = "standard"
THOROUGHNESS = {
    "quick": Thoroughness(seconds=4.0, narrow_enough=0.05, processes=MIN_PROCESSES),
    STANDARD: Thoroughness(seconds=20.0, narrow_enough=NARROW_ENOUGH, processes=MIN_PROCESSES),
    "thorough": Thoroughness(seconds=120.0, narrow_enough=0.005, processes=12),
}


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


def _environment() -> dict[str, str]:
    """The worker's environment: the package importable, and no thread pool beside ONNX Runtime's own."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return {**os.environ, **dict.fromkeys(pools, "1"), "PYTHONPATH": os.pathsep.join(paths)}


def _answer(request: dict[str, Any], *, what: str, timeout: float, answers: Answers | None) -> dict[str, Any]:
    """The answer kept from an earlier attempt, or one from a fresh process, which is then kept."""
    known = None if answers is None else answers.take(request)
    if known is not None:
        return known
    answer = _ask_worker(request, what=what, timeout=timeout)
    if answers is not None:
        answers.add(request, answer)
    return answer


def _ask_worker(request: Mapping[str, Any], *, what: str, timeout: float) -> dict[str, Any]:
    """One request to one fresh process. Raises ProfileError with the end of its stderr."""
    command = [sys.executable, "-m", WORKER]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout, env=_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(
            f"measuring {what}: no answer within {timeout:.0f} s; the model is too slow or the machine too busy: "
            "allow more time or measure a smaller model"
        ) from error
    except OSError as error:
        raise ProfileError(f"measuring {what}: {sys.executable} could not be started: {error}") from error
    tail = "\n".join(done.stderr.strip().splitlines()[-_STDERR_LINES:])
    if done.returncode != 0:
        hint = "; it was killed, most likely for want of memory" if done.returncode == -9 else ""
        raise ProfileError(f"measuring {what}: the process ended with code {done.returncode}{hint}\n{tail}")
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise ProfileError(f"measuring {what}: the process gave no readable answer\n{tail}") from error
    if not isinstance(answer, dict):
        raise ProfileError(f"measuring {what}: the process answered {type(answer).__name__}, not an object")
    return answer


def _request(
    mode: str,
    *,
    threads: int,
    providers: Sequence[str],
    input_npy: Path | None,
    session: Mapping[str, Any] | None,
) -> dict[str, Any]:
    images = None if input_npy is None else str(Path(input_npy).resolve())
    common = {"mode": mode, "threads": threads, "providers": list(providers), "input_npy": images}
    return {**common, **(session or {})}


def ask_worker(
    mode: str,
    model: Path,
    *,
    what: str,
    threads: int,
    providers: Sequence[str],
    input_npy: Path | None,
    session: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    **own: Any,
) -> Json:
    """One request about one model to one fresh process; `own` are the mode's keys. Raises ProfileError."""
    request = _request(mode, threads=threads, providers=providers, input_npy=input_npy, session=session)
    request |= {"model": _existing({"model": model})["model"], "shapes": dict(shapes or {}), **own}
    return _ask_worker(request, what=what, timeout=_TIMEOUT_SECONDS)


def copy_seconds(size_bytes: int, *, threads: int) -> float:
    """Median seconds of copying so many bytes in memory, by so many threads at once. Raises ProfileError."""
    request = {"mode": "copy", "bytes": size_bytes, "threads": threads}
    answer = _ask_worker(request, what="the speed of memory", timeout=_TIMEOUT_SECONDS)
    return float(answer["seconds"] * size_bytes / answer["bytes"])


def measure_arena(model: Path, **how: Any) -> int | None:
    """Bytes that ONNX Runtime's arena takes, or None where its log does not tell. Raises ProfileError."""
    size = ask_worker("arena", model, what=f"the arena of {Path(model).name}", **how)["arena_bytes"]
    return None if size is None else int(size)


def _existing(models: Mapping[str, Path]) -> dict[str, str]:
    missing = [str(path) for path in models.values() if not Path(path).is_file()]
    if missing or not models:
        raise ProfileError(f"measuring: no such model file: {', '.join(missing) or 'none given'}; export it first")
    return {name: str(Path(path).resolve()) for name, path in models.items()}


def _widest(measurement: LatencyMeasurement) -> float:
    """The relative half-width that must shrink: the widest among the ratios of any two models, or of one's median.

    Of more than four models, only the ratios to the first one are waited for.
    """
    names = list(measurement.windows_ms)
    if len(names) == 1:
        return measurement.percentile(names[0], 50).relative_half_width
    pairs = itertools.combinations(names, 2) if len(names) <= _MOST_PERMUTED else ((names[0], n) for n in names[1:])
    return max(measurement.ratio(*pair).relative_half_width for pair in pairs)


def _orders(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Orders to load the models in: all of them, or with many models each one first and each one last in turn."""
    if len(names) <= _MOST_PERMUTED:
        return list(itertools.permutations(names))
    turned = [(*names[start:], *names[:start]) for start in range(len(names))]
    return [order for forth in turned for order in (forth, forth[::-1])]


def measure_latency(
    models: Mapping[str, Path],
    *,
    threads: int,
    providers: Sequence[str],
    input_npy: Path | None,
    processes: int = MIN_PROCESSES,
    seconds: float = 30.0,
    narrow_enough: float = NARROW_ENOUGH,
    answers: Answers | None = None,
    session: Mapping[str, Any] | None = None,
    settings: Mapping[str, Json] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    what: str | None = None,
) -> LatencyMeasurement:
    """Measure models side by side in at least `processes` fresh processes.

    Goes on, process by process, until the 95 % intervals of all latency ratios have a relative half-width below
    `narrow_enough` or `seconds` (start-up included) are spent; `stopped_because` says which. `input_npy` holds
    preprocessed images [N, ...], run one at a time; None stands for random ones. `answers` of an attempt that was
    cut off are used before any process is started. `session` holds a target's session settings, for all models
    alike; `settings` [name] changes threads, batch, providers or any of those for one of the models, which may share
    a file. `shapes` [input] gives free axes a size; `what` names it all on the terminal. Raises ProfileError.
    """
    paths = _existing(models)
    share = min(max(seconds / _SHARES, _SHORTEST_SECONDS), _LONGEST_SECONDS)
    request = _request("latency", threads=threads, providers=providers, input_npy=input_npy, session=session)
    request |= {"models": paths, "seconds": share, "window_ms": min(WINDOW_MS, share * 1e3 / 10)}
    request |= {"settings": dict(settings or {}), "shapes": dict(shapes or {})}
    windows: dict[str, list[list[Floats]]] = {name: [] for name in paths}
    reference: list[Floats] = []
    round_at: list[Floats] = []
    frequency: list[Floats] = []
    on_cpu: dict[str, list[Floats]] = {name: [] for name in paths}
    shares: dict[str, list[float]] = {name: [] for name in paths}
    steady, started = 0, time.monotonic()
    what = what or " and ".join(paths)
    # Who is loaded first gets another memory layout, so processes take turns.
    orders = _orders(list(paths))
    with console.progress(f"measuring {what}", processes) as advance:
        while True:
            order = orders[len(reference) % len(orders)]
            asked = request | {"order": list(order)}
            answer = _answer(asked, what=what, timeout=_TIMEOUT_SECONDS + 10 * share, answers=answers)
            for name in paths:
                windows[name].append([np.array(window) for window in answer["windows_ms"][name]])
            reference.append(np.array(answer["reference_ms"]))
            round_at.append(np.array(answer["round_at"]))
            if answer["on_cpu_ms"] is not None:
                for name in paths:
                    on_cpu[name].append(np.array(answer["on_cpu_ms"][name]))
                    shares[name].append(answer["on_cpu_share"][name])
            if answer["frequency_mhz"] is not None:
                frequency.append(np.array(answer["frequency_mhz"]))
            steady += bool(answer["steady"])
            spent = time.monotonic() - started
            if len(reference) < processes:
                advance(1)
                continue
            every = len(reference)
            so_far = LatencyMeasurement(
                windows,
                reference,
                steady,
                spent,
                "",
                round_at,
                frequency if len(frequency) == every else None,
                on_cpu if all(len(processes) == every for processes in on_cpu.values()) else None,
                {name: np.array(values) for name, values in shares.items()} if shares[next(iter(paths))] else None,
            )
            width = _widest(so_far)
            known = f", interval +-{width:.1%}" if width < 1 else ""
            advance(1, f"{len(reference)} processes{known}")
            reason = None
            if width < narrow_enough:
                reason = f"the 95 % interval is within {width:.1%}, which is narrow enough ({narrow_enough:.1%})"
            elif len(reference) >= MAX_PROCESSES:
                reason = f"{MAX_PROCESSES} processes were measured; the 95 % interval is within {width:.1%}"
            elif spent * (1 + 1 / len(reference)) > seconds:
                reason = f"the time allowed ({seconds:g} s) is spent; the 95 % interval is within {width:.1%}"
            if reason is not None:
                return replace(so_far, stopped_because=reason)


def measure_fresh(
    model: Path,
    *,
    threads: int,
    providers: Sequence[str],
    input_npy: Path | None,
    processes: int = FRESH_PROCESSES,
    answers: Answers | None = None,
    session: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> FreshMeasurement:
    """Load time, first inference and memory of one model, each from `processes` fresh processes.

    The file is in the page cache after the first of them. Raises ProfileError.
    """
    path = _existing({"model": model})["model"]
    request = _request("fresh", threads=threads, providers=providers, input_npy=input_npy, session=session)
    request |= {"model": path, "shapes": dict(shapes or {})}
    what = f"loading of {Path(model).name}"
    replies = [_answer(request, what=what, timeout=_TIMEOUT_SECONDS, answers=answers) for _ in range(processes)]

    replies = [{**reply, "cold_start_ms": reply["load_ms"] + reply["first_inference_ms"]} for reply in replies]

    def spread(key: str) -> tuple[Any, Any, Any]:
        values = [reply[key] for reply in replies if reply[key] is not None]
        if not values:
            return None, None, None
        return statistics.median(values), min(values), max(values)

    load, first, peak = spread("load_ms"), spread("first_inference_ms"), spread("peak_rss_bytes")
    cold = spread("cold_start_ms")
    before = spread("rss_before_load_bytes")[0]
    return FreshMeasurement(
        load_ms=load[0],
        load_ms_range=load[1:],
        first_inference_ms=first[0],
        first_inference_ms_range=first[1:],
        peak_rss_bytes=None if peak[0] is None else int(peak[0]),
        peak_rss_bytes_range=None if peak[0] is None else peak[1:],
        rss_before_load_bytes=None if before is None else int(before),
        processes=processes,
        cold_start_ms=cold[0],
        cold_start_ms_range=cold[1:],
    )
