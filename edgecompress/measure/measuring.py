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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress import console
from edgecompress.errors import ProfileError
from edgecompress.measure.answers import Answers
from edgecompress.measure.latencies import Floats, FreshMeasurement, LatencyMeasurement

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
    shapes: Mapping[str, Sequence[int | None]] | None = None,
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
    shapes: Mapping[str, Sequence[int | None]] | None = None,
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
    shapes: Mapping[str, Sequence[int | None]] | None = None,
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
