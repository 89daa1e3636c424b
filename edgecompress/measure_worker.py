"""One measuring process: models in, raw latencies out. Run as `python -m edgecompress.measure_worker`.

What enters: a JSON request on stdin. What leaves: a JSON reply on stdout and nothing else there. The process
imports only numpy and ONNX Runtime, so that it weighs what a user's own process would weigh, and
it judges nothing: every latency is handed back as measured.

Requests: {"mode": "latency", "models": {name: path}, "order": [names], "threads", "providers", "input_npy",
"seconds", "window_ms"} or {"mode": "fresh", "model": path, "threads", "providers", "input_npy"}; beside them how a
session is made: "provider_options" [{}], "cpu_affinity" [CPU], "optimization", "execution", "inter_op_threads",
"arena", "memory_pattern", "session" {key: value}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

MIN_INFERENCES_PER_WINDOW = 3
MAX_INFERENCES_PER_WINDOW = 500  # a tiny model would otherwise hand back megabytes of numbers
MIN_ROUNDS = 4
STEADY_WINDOWS = 3
STEADY_FRACTION = 0.03  # windows this close to each other count as steady
WARM_UP_SHARE = 0.3  # of the time allowed; the rest measures
REFERENCE_STEPS = 20_000  # about 1 ms of pure Python: no memory, no threads, the same work each time
RANDOM_IMAGES = 4
MAX_IMAGES = 64
OPTIMIZATION_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
EXECUTION_MODES = {
    "sequential": ort.ExecutionMode.ORT_SEQUENTIAL,
    "parallel": ort.ExecutionMode.ORT_PARALLEL,
}
_DTYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def session_options(settings: dict[str, Any]) -> ort.SessionOptions:
    """The options that every measurement runs with, and what `settings` changes of them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(settings["threads"])
    options.inter_op_num_threads = int(settings.get("inter_op_threads", 1))
    options.execution_mode = EXECUTION_MODES[settings.get("execution", "sequential")]
    options.graph_optimization_level = OPTIMIZATION_LEVELS[settings.get("optimization", "all")]
    options.enable_cpu_mem_arena = bool(settings.get("arena", True))
    options.enable_mem_pattern = bool(settings.get("memory_pattern", True))
    options.log_severity_level = 3
    # Idle threads of one model must not spin through the other model's window.
    entries = {"session.force_spinning_stop": "1", **settings.get("session", {})}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _session(path: str, settings: dict[str, Any]) -> ort.InferenceSession:
    """A session. Its threads inherit the CPUs of this one, so those are set first."""
    cpus = settings.get("cpu_affinity")
    if cpus:
        if sys.platform != "linux":
            raise SystemExit(f"a process cannot be bound to CPUs on {sys.platform}; leave cpu_affinity out")
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            raise SystemExit(f"this process cannot be bound to CPUs {cpus}: {error.strerror}") from error
    wanted = list(settings["providers"])
    provider_options = settings.get("provider_options") or [{} for _ in wanted]
    return ort.InferenceSession(path, session_options(settings), providers=wanted, provider_options=provider_options)


def _inputs(session: ort.InferenceSession, input_npy: str | None) -> list[dict[str, npt.NDArray[Any]]]:
    """Batch-1 feeds: the given images [N, ...], or random ones where none are given."""
    node = session.get_inputs()[0]
    images: npt.NDArray[Any]
    if input_npy is not None:
        # Mapped, so that images which are never used do not count as the model's memory.
        images = np.load(input_npy, mmap_mode="r", allow_pickle=False)[:MAX_IMAGES]
    else:
        if not all(isinstance(size, int) for size in node.shape[1:]):
            raise SystemExit(f"input '{node.name}' has free axes {node.shape}; give images to measure with")
        shape = (RANDOM_IMAGES, *(int(size) for size in node.shape[1:]))
        generator = np.random.default_rng(0)
        if node.type == "tensor(uint8)":
            images = generator.integers(0, 256, size=shape).astype(np.uint8)
        else:
            images = generator.standard_normal(shape, dtype=np.float32)
    dtype = _DTYPES.get(node.type, images.dtype)
    return [{node.name: np.array(images[index : index + 1], dtype=dtype)} for index in range(len(images))]


class _Model:
    """A session, its images, and windows of timed inferences."""

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        start = perf_counter_ns()
        self.session = _session(path, request)
        self.load_ms = (perf_counter_ns() - start) / 1e6
        self.feeds = _inputs(self.session, request.get("input_npy"))
        self.next_feed = 0

    def infer_ns(self) -> int:
        feed = self.feeds[self.next_feed]
        self.next_feed = (self.next_feed + 1) % len(self.feeds)
        run = self.session.run
        start = perf_counter_ns()
        run(None, feed)
        return perf_counter_ns() - start

    def window(self, milliseconds: float) -> list[float]:
        """Latencies in ms of repeated inferences over about `milliseconds`."""
        latencies: list[float] = []
        deadline = perf_counter_ns() + int(milliseconds * 1e6)
        while len(latencies) < MAX_INFERENCES_PER_WINDOW:
            latencies.append(self.infer_ns() / 1e6)
            if perf_counter_ns() >= deadline and len(latencies) >= MIN_INFERENCES_PER_WINDOW:
                break
        return latencies


def reference_ms() -> float:
    """Milliseconds of a fixed piece of pure Python: what it varies by is the machine's noise, not the model's."""
    start = perf_counter_ns()
    total = 0
    for step in range(REFERENCE_STEPS):
        total += step & 7
    return (perf_counter_ns() - start) / 1e6


def _is_steady(medians: list[float]) -> bool:
    last = medians[-STEADY_WINDOWS:]
    return len(last) == STEADY_WINDOWS and max(last) <= min(last) * (1 + STEADY_FRACTION)


def _warm_up(models: dict[str, _Model], window_ms: float, seconds: float) -> bool:
    """Run windows until every model is steady or the time is spent. Returns whether all are steady."""
    medians: dict[str, list[float]] = {name: [] for name in models}
    deadline = perf_counter() + seconds
    while True:
        for name, model in models.items():
            medians[name].append(median(model.window(window_ms)))
        steady = all(_is_steady(values) for values in medians.values())
        if steady or perf_counter() >= deadline:
            return steady


def measure_latency(request: dict[str, Any]) -> dict[str, Any]:
    """Interleaved windows: A B, B A, A B, ... so that drift and order hit every model alike."""
    started = perf_counter()
    order: list[str] = request["order"]
    seconds, window_ms = float(request["seconds"]), float(request["window_ms"])
    models = {name: _Model(request["models"][name], request) for name in order}
    loaded = perf_counter()
    steady = _warm_up(models, window_ms / 2, WARM_UP_SHARE * seconds)
    warmed = perf_counter()
    windows: dict[str, list[list[float]]] = {name: [] for name in order}
    reference: list[float] = []
    rounds = 0
    while rounds < MIN_ROUNDS or perf_counter() - loaded < seconds:
        for name in order if rounds % 2 == 0 else reversed(order):
            windows[name].append(models[name].window(window_ms))
        reference.append(reference_ms())
        rounds += 1
    return {
        "windows_ms": {name: [[round(value, 6) for value in w] for w in windows[name]] for name in order},
        "reference_ms": reference,
        "steady": steady,
        "load_seconds": loaded - started,
        "warm_up_seconds": warmed - loaded,
    }


def _status_bytes(field: str) -> int | None:
    """A size from /proc/self/status (VmHWM: peak resident, VmRSS: resident now), or None off Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _peak_rss_bytes() -> int | None:
    """Peak resident memory of this process.

    VmHWM, not ru_maxrss, on Linux: a process inherits ru_maxrss from the one that started it, so a large parent
    would be reported as this model's memory.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None or sys.platform in ("linux", "win32"):
        return peak
    import resource  # not on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def measure_fresh(request: dict[str, Any]) -> dict[str, Any]:
    """Load and first inferences of one model in a process that has done nothing else."""
    before = _status_bytes("VmRSS") or _peak_rss_bytes()
    model = _Model(request["model"], request)
    first_inference_ms = model.infer_ns() / 1e6
    for _ in range(MIN_INFERENCES_PER_WINDOW):
        model.infer_ns()
    return {
        "load_ms": model.load_ms,
        "first_inference_ms": first_inference_ms,
        "rss_before_load_bytes": before,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def main() -> None:
    """Answer one request. stdout is kept for the reply: whatever a library prints goes to stderr."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    answer = {"latency": measure_latency, "fresh": measure_fresh}[request["mode"]](request)
    with reply:
        json.dump(answer, reply)


if __name__ == "__main__":
    main()
