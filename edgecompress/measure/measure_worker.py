"""One measuring process: models in, raw latencies out. Run as `python -m edgecompress.measure.measure_worker`.

What enters: a JSON request on stdin. What leaves: a JSON reply on stdout and nothing else there. The process
imports only numpy and ONNX Runtime, so that it weighs what a user's own process would weigh, and
it judges nothing: every latency is handed back as measured.

Requests: {"mode": "latency", "models": {name: path}, "order": [names], "seconds", "window_ms", "settings": {name: {}}}
or {"mode": "fresh" | "arena" | "kernels" | "sustained", "model": path, ...} or {"mode": "copy", "bytes", "threads"}.
Beside them what a session needs: "threads", "providers", "provider_options" [{}], "input_npy", "batch", "shapes"
{input: [sizes]}, "cpu_affinity" [CPU], "optimization", "execution", "inter_op_threads", "arena", "memory_pattern",
"session" {key: value}; `settings` may change any of it, but the CPUs, for one model.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import get_clock_info, perf_counter, perf_counter_ns, process_time_ns, sleep, time
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

MIN_INFERENCES_PER_WINDOW = 3
MAX_INFERENCES_PER_WINDOW = 500  # a tiny model would otherwise hand back megabytes of numbers
MIN_ROUNDS = 4
STEADY_WINDOWS = 8  # the last ones, whose halves are compared
STEADY_FRACTION = 0.01  # a trend below this does not matter
STEADY_DEVIATIONS = 3.0  # nor one that so many standard errors of the windows' own noise explain
CLOCK_SECONDS = 1e-6  # a clock for the time on the CPU that ticks more coarsely says nothing about an inference
WARM_UP_SHARE = 0.3  # of the time allowed; the rest measures
REFERENCE_STEPS = 20_000  # about 1 ms of pure Python: no memory, no threads, the same work each time
RANDOM_IMAGES = 4
MAX_IMAGES = 64
MIN_PROFILED, MAX_PROFILED = 10, 300
SENSOR_SECONDS = 0.02
COPIES = 5
# The element types that can be made up; integers beside bytes get 0 and 1, which every table of embeddings has.
DTYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
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


def _session(path: str, settings: dict[str, Any], options: ort.SessionOptions | None = None) -> ort.InferenceSession:
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
    options = options or session_options(settings)
    session = ort.InferenceSession(path, options, providers=wanted, provider_options=provider_options)
    # ONNX Runtime drops a provider that it cannot load with no more than a line in its log.
    absent = [provider for provider in wanted if provider not in session.get_providers()]
    if absent:
        raise SystemExit(f"ONNX Runtime could not load {', '.join(absent)}; it offers {ort.get_available_providers()}")
    return session


def input_shape(name: str, shape: list[Any], *, batch: int, given: dict[str, list[Any]]) -> list[int]:
    """The shape that an input is measured with: a free first axis is the batch, `given` {input: sizes} fills others.

    Raises ValueError where a free axis has no size, or a fixed one another than was given.
    """
    wanted: list[Any] = list(given.get(name, shape))
    fixed = [axis for axis, size in enumerate(shape) if isinstance(size, int)]
    if len(wanted) != len(shape) or any(wanted[axis] != shape[axis] for axis in fixed):
        raise ValueError(f"input '{name}' is {shape} in the file; {wanted} does not fit it")
    if wanted and not isinstance(wanted[0], int):
        wanted[0] = batch
    if not all(isinstance(size, int) and size > 0 for size in wanted):
        raise ValueError(f"input '{name}' has free axes {shape}; only the first may be left open")
    return [int(size) for size in wanted]


def random_input(kind: str, shape: list[int], generator: np.random.Generator) -> npt.NDArray[Any]:
    """Random values of one of `DTYPES`. Raises ValueError for any other type."""
    if kind not in DTYPES:
        raise ValueError(f"{kind} cannot be made up; known are {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max + 1
        return generator.integers(low, high, size=shape).astype(dtype)
    return generator.integers(0, 2, size=shape).astype(dtype)


def feeds(session: ort.InferenceSession, settings: dict[str, Any]) -> list[dict[str, npt.NDArray[Any]]]:
    """What the inferences get in turn: the given images [N, ...] in batches, random values for all other inputs.

    Raises ValueError where the first input cannot take the images of the batch that was asked for: a throughput counts
    the images asked for, so they must be those fed.
    """
    nodes, asked = session.get_inputs(), settings.get("batch")
    batch = int(asked or 1)
    given: dict[str, Any] = dict(settings.get("shapes") or {})
    images: Any = None
    if settings.get("input_npy") is not None:
        # Mapped, so that images which are never used do not count as the model's memory.
        images = np.load(settings["input_npy"], mmap_mode="r", allow_pickle=False)[:MAX_IMAGES]
        given[nodes[0].name] = [nodes[0].shape[0], *images.shape[1:]]
    shapes = {node.name: input_shape(node.name, node.shape, batch=batch, given=given) for node in nodes}
    fed = shapes[nodes[0].name]
    if asked is not None and fed and fed[0] != batch:
        raise ValueError(f"input '{nodes[0].name}' is fed {fed[0]} images at a time; a batch of {batch} was asked for")
    generator = np.random.default_rng(0)
    if images is None:
        return [
            {node.name: random_input(node.type, shapes[node.name], generator) for node in nodes}
            for _ in range(RANDOM_IMAGES)
        ]
    others = {node.name: random_input(node.type, shapes[node.name], generator) for node in nodes[1:]}
    first, dtype = nodes[0].name, DTYPES.get(nodes[0].type, images.dtype)
    size = shapes[first][0]
    starts = range(0, max(len(images) - size, 0) + 1, size)
    picks = [np.arange(start, start + size) % len(images) for start in starts]  # fewer images than a batch: again
    return [{first: np.array(images[pick], dtype=dtype), **others} for pick in picks]


class _Model:
    """A session, its images, and windows of timed inferences."""

    def __init__(self, path: str, settings: dict[str, Any], options: ort.SessionOptions | None = None) -> None:
        start = perf_counter_ns()
        self.session = _session(path, settings, options)
        self.load_ms = (perf_counter_ns() - start) / 1e6
        try:
            self.feeds = feeds(self.session, settings)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        self.next_feed = 0
        self.on_cpu_ns = 0
        self.window_on_cpu_ms: list[float] = []

    def infer_ns(self) -> int:
        feed = self.feeds[self.next_feed]
        self.next_feed = (self.next_feed + 1) % len(self.feeds)
        run = self.session.run
        on_cpu = process_time_ns()
        start = perf_counter_ns()
        run(None, feed)
        spent = perf_counter_ns() - start
        self.on_cpu_ns = process_time_ns() - on_cpu
        return spent

    def window(self, milliseconds: float, *, at_least: int = MIN_INFERENCES_PER_WINDOW) -> list[float]:
        """Latencies in ms of repeated inferences over about `milliseconds`."""
        latencies: list[float] = []
        self.window_on_cpu_ms = []
        deadline = perf_counter_ns() + int(milliseconds * 1e6)
        while len(latencies) < MAX_INFERENCES_PER_WINDOW:
            latencies.append(self.infer_ns() / 1e6)
            self.window_on_cpu_ms.append(self.on_cpu_ns / 1e6)
            if perf_counter_ns() >= deadline and len(latencies) >= at_least:
                break
        return latencies


def reference_ms() -> float:
    """Milliseconds of a fixed piece of pure Python: what it varies by is the machine's noise, not the model's."""
    start = perf_counter_ns()
    total = 0
    for step in range(REFERENCE_STEPS):
        total += step & 7
    return (perf_counter_ns() - start) / 1e6


def is_steady(medians: list[float]) -> bool:
    """Whether the last windows show no trend that their own noise does not explain.

    Their earlier half is compared with their later half. The noise is taken from the differences of neighbours (von
    Neumann, Annals of Mathematical Statistics 1941; as a test for steady state: Cao and Rhinehart, Journal of Process
    Control 1995), which a trend hardly touches, so that noise alone never counts as warming up, however strong.
    """
    if len(medians) < STEADY_WINDOWS:
        return False
    last = np.log(medians[-STEADY_WINDOWS:])
    half = STEADY_WINDOWS // 2
    shift = abs(last[half:].mean() - last[:half].mean())
    noise = np.sqrt(np.mean(np.diff(last) ** 2) / 2 * (2 / half))
    return bool(shift <= max(STEADY_FRACTION, STEADY_DEVIATIONS * noise))


def _warm_up(models: dict[str, _Model], window_ms: float, seconds: float, *, on_cpu: bool) -> bool:
    """Run windows until every model is steady or the time is spent. Returns whether all are steady.

    As many windows as the judgement needs are always run, however short the time. With `on_cpu` the time on the CPU is
    judged: who else wants the CPU changes from moment to moment, and is not the model's warming up.
    """
    medians: dict[str, list[float]] = {name: [] for name in models}
    deadline = perf_counter() + seconds
    while True:
        for name, model in models.items():
            latencies = model.window(window_ms, at_least=1)
            medians[name].append(median(model.window_on_cpu_ms if on_cpu else latencies))
        steady = all(is_steady(values) for values in medians.values())
        enough = all(len(values) >= STEADY_WINDOWS for values in medians.values())
        if steady or (enough and perf_counter() >= deadline):
            return steady


def _frequency_files() -> list[Path]:
    """Where the kernel tells the frequency of each CPU that this process may run on; empty where it does not."""
    cpus = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    files = [Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in cpus]
    return [file for file in files if file.is_file()]


def _megahertz(files: list[Path]) -> float | None:
    """The highest frequency of these CPUs now: the others may be asleep."""
    try:
        return max((int(file.read_text(encoding="ascii")) / 1e3 for file in files), default=None)
    except (OSError, ValueError):
        return None


def _runs_on_one_thread(settings: dict[str, Any]) -> bool:
    """Whether an inference does all its work in the process's one busy thread, so that its time on the CPU is known."""
    return (
        int(settings["threads"]) == 1
        and settings.get("execution", "sequential") == "sequential"
        and list(settings["providers"]) == ["CPUExecutionProvider"]
        and get_clock_info("process_time").resolution <= CLOCK_SECONDS
    )


def measure_latency(request: dict[str, Any]) -> dict[str, Any]:
    """Interleaved windows: A B, B A, A B, ... so that drift and order hit every model alike."""
    started = perf_counter()
    order: list[str] = request["order"]
    seconds, window_ms = float(request["seconds"]), float(request["window_ms"])
    own: dict[str, dict[str, Any]] = request.get("settings") or {}
    models = {name: _Model(request["models"][name], {**request, **own.get(name, {})}) for name in order}
    alone = all(_runs_on_one_thread({**request, **own.get(name, {})}) for name in order)
    loaded = perf_counter()
    steady = _warm_up(models, window_ms / 4, WARM_UP_SHARE * seconds, on_cpu=alone)
    warmed = perf_counter()
    windows: dict[str, list[list[float]]] = {name: [] for name in order}
    reference: list[float] = []
    round_at: list[float] = []
    frequencies: list[float | None] = []
    files = _frequency_files()
    on_cpu: dict[str, list[float]] = {name: [] for name in order}
    spent: dict[str, float] = dict.fromkeys(order, 0.0)
    ran: dict[str, float] = dict.fromkeys(order, 0.0)
    rounds = 0
    while rounds < MIN_ROUNDS or perf_counter() - loaded < seconds:
        for name in order if rounds % 2 == 0 else reversed(order):
            windows[name].append(models[name].window(window_ms))
            on_cpu[name].append(median(models[name].window_on_cpu_ms))
            spent[name] += sum(windows[name][-1])
            ran[name] += sum(models[name].window_on_cpu_ms)
        reference.append(reference_ms())
        frequencies.append(_megahertz(files))
        round_at.append(time())
        rounds += 1
    return {
        "windows_ms": {name: [[round(value, 6) for value in w] for w in windows[name]] for name in order},
        "on_cpu_ms": on_cpu if alone else None,
        "on_cpu_share": {name: ran[name] / spent[name] for name in order} if alone else None,
        "reference_ms": reference,
        "round_at": round_at,
        "frequency_mhz": None if None in frequencies else frequencies,
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


def measure_arena(request: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime's CPU arena takes from the system, as its own log tells; its API does not.

    The arena holds what inferences write, and the weights that were laid out anew; not the file's own weights.
    """
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)  # the log is written by C++, to the descriptor
        try:
            ort.set_default_logger_severity(1)
            model = _Model(request["model"], request)
            for _ in range(MIN_INFERENCES_PER_WINDOW):
                model.infer_ns()
        finally:
            os.dup2(kept, 2)
            log.seek(0)
            text = log.read().decode("utf-8", errors="replace")
    sizes = [int(size) for size in re.findall(r"Extended allocation by (\d+) bytes", text)]
    reserved = [int(size) for size in re.findall(r"Reserving memory in BFCArena for \S+ size: (\d+)", text)]
    told = "BFCArena" in text
    return {"arena_bytes": sum(sizes) + sum(reserved) if told else None, "reserved_bytes": sum(reserved)}


def measure_kernels(request: dict[str, Any]) -> dict[str, Any]:
    """Every kernel of the optimized graph by ONNX Runtime's own profile, in the order in which they first ran.

    `ms` is the median over inferences; `ms_low` the tenth percentile, since whatever else the machine does only ever
    makes a kernel slower. `inference_ms` is the median of whole inferences while profiling, which costs a little.
    """
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as folder:
        options = session_options(request)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        model = _Model(request["model"], request, options)
        deadline = perf_counter() + float(request["seconds"])
        whole: list[float] = []
        while len(whole) < MAX_PROFILED and (len(whole) <= MIN_PROFILED or perf_counter() < deadline):
            whole.append(model.infer_ns() / 1e6)
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        facts = event["args"]
        name, operator = name[: -len("_kernel_time")], str(facts.get("op_name", ""))
        found = {"name": name, "operator": operator, "provider": facts.get("provider"), "times": []}
        found["output"] = facts.get("output_type_shape")
        kernels.setdefault((name, operator), found)["times"].append(float(event["dur"]) / 1e3)
    answer = []
    for kernel in kernels.values():
        times = np.array(kernel.pop("times"))
        # A node that runs several times in one inference (in a loop) counts with all of them.
        runs = max(1, round(len(times) / len(whole)))
        low, middle = np.quantile(times, [0.1, 0.5])
        answer.append({**kernel, "ms": float(middle) * runs, "ms_low": float(low) * runs})
    return {"kernels": answer, "inferences": len(whole), "inference_ms": median(whole)}


def measure_sustained(request: dict[str, Any]) -> dict[str, Any]:
    """Inferences back to back for `seconds`, with the energy counters and power sensors of the platform around them.

    `counters` and `sensors` are files of one number each; the same is read over as long a time of doing nothing.
    """
    model = _Model(request["model"], request)
    seconds = float(request["seconds"])
    counters, sensors = list(request["counters"]), list(request["sensors"])
    model.window(seconds * 1e3 * WARM_UP_SHARE)

    def observed(work: Callable[[], None]) -> dict[str, Any]:
        samples: list[list[float]] = []
        before, started, runs = [_number(path) for path in counters], perf_counter(), 0
        while perf_counter() - started < seconds:
            work()
            runs += 1
            if len(samples) < (perf_counter() - started) / SENSOR_SECONDS:
                samples.append([_number(path) for path in sensors])
        spent = perf_counter() - started
        after = [_number(path) for path in counters]
        return {"before": before, "after": after, "samples": samples, "seconds": spent, "runs": runs}

    def infer() -> None:
        model.infer_ns()

    return {"busy": observed(infer), "idle": observed(lambda: sleep(SENSOR_SECONDS))}


def _number(path: str) -> float:
    return float(Path(path).read_text(encoding="ascii").strip())


def measure_copy(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of copying `bytes` from one buffer to another, by `threads` at once; each buffer is read or written once.

    The median of several copies, after one that touches every page.
    """
    threads = int(request["threads"])
    share = int(request["bytes"]) // threads // 8
    pairs = [(np.ones(share), np.zeros(share)) for _ in range(threads)]

    def copy(pair: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> None:
        np.copyto(pair[1], pair[0])  # without the interpreter's lock

    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPIES + 1):
            start = perf_counter()
            list(pool.map(copy, pairs))
            times.append(perf_counter() - start)
    return {"seconds": median(times[1:]), "bytes": share * threads * 8}


def main() -> None:
    """Answer one request. stdout is kept for the reply: whatever a library prints goes to stderr."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    modes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "latency": measure_latency,
        "fresh": measure_fresh,
        "arena": measure_arena,
        "kernels": measure_kernels,
        "sustained": measure_sustained,
        "copy": measure_copy,
    }
    answer = modes[request["mode"]](request)
    with reply:
        json.dump(answer, reply)


if __name__ == "__main__":
    main()
