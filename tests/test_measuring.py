"""Real processes, real sessions: small models, and only ratios that no machine would turn round."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edgecompress.errors import ProfileError
from edgecompress.machine import usable_cpus
from edgecompress.measure import measuring
from edgecompress.measure.answers import Answers
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.measuring import measure_arena, measure_fresh, measure_latency
from edgecompress.settings.target import Target
from onnx_models import SIZE, residual_net, save

CPU = ("CPUExecutionProvider",)
WHEN: dict[str, Any] = {
    "round_at": [0.0, 0.1, 0.2, 0.3],
    "frequency_mhz": None,
    "on_cpu_ms": None,
    "on_cpu_share": None,
}


def test_slower_model_is_found_slower_in_five_processes(tmp_path: Path) -> None:
    models = {
        "large": residual_net(tmp_path / "large.onnx", 64, 32),
        "small": residual_net(tmp_path / "small.onnx", 8, 32),
    }
    measured = measure_latency(models, threads=1, providers=CPU, input_npy=None, seconds=0.5)
    assert measured.processes >= 5
    assert measured.seconds > 0.5
    assert "time allowed" in measured.stopped_because or "narrow enough" in measured.stopped_because
    ratio = measured.ratio("large", "small")
    assert 1.5 < ratio.low < ratio.ratio < ratio.high
    assert measured.ratio("small", "large").ratio == pytest.approx(1 / ratio.ratio)
    p50, p99 = measured.percentile("small", 50), measured.percentile("small", 99)
    assert 0 < p50.value <= p99.value
    for process in range(measured.processes):
        windows = [measured.windows_ms[name][process] for name in models]
        assert len(windows[0]) == len(windows[1]) == len(measured.reference_ms[process]) >= 4
        assert all(len(window) >= 3 for model in windows for window in model)


def test_measuring_goes_on_until_the_interval_is_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invented answers: processes that disagree by 25 % need more than five of them; equal ones do not."""
    model = residual_net(tmp_path / "net.onnx")
    spreads = np.random.default_rng(1).normal(0, 0.05, 200)

    def answer_with(effect: float):  # type: ignore[no-untyped-def]
        asked: list[list[str]] = []

        def answer(request, **_):  # type: ignore[no-untyped-def]
            latency = float(np.exp(effect * spreads[len(asked)]))
            asked.append(request["order"])
            windows = {"a": [[latency] * 3] * 4, "b": [[1.0] * 3] * 4}
            return {"windows_ms": windows, "reference_ms": [1.0] * 4, "steady": True, **WHEN}

        return asked, answer

    models = {"a": model, "b": model}
    asked, answer = answer_with(0.0)
    monkeypatch.setattr(measuring, "_ask_worker", answer)
    calm = measure_latency(models, threads=1, providers=CPU, input_npy=None, seconds=60)
    assert calm.processes == 5
    assert "narrow enough" in calm.stopped_because
    assert asked[:2] == [["a", "b"], ["b", "a"]]

    _, answer = answer_with(5.0)
    monkeypatch.setattr(measuring, "_ask_worker", answer)
    wild = measure_latency(models, threads=1, providers=CPU, input_npy=None, seconds=60)
    assert wild.processes == measuring.MAX_PROCESSES
    assert "processes were measured" in wild.stopped_because

    monkeypatch.setattr(measuring, "_ask_worker", answer_with(5.0)[1])
    hurried = measure_latency(models, threads=1, providers=CPU, input_npy=None, seconds=1e-6)
    assert hurried.processes == 5
    assert "time allowed" in hurried.stopped_because


def test_three_models_take_turns_and_every_pair_must_be_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invented answers: `b` and `c` waver against each other, and `a` between them hides a half of it."""
    model = residual_net(tmp_path / "net.onnx")
    asked: list[list[str]] = []

    def answer(request, **_):  # type: ignore[no-untyped-def]
        sway = 1.011 ** (-1) ** len(asked)
        asked.append(request["order"])
        windows = {"a": [[1.0] * 3] * 4, "b": [[sway] * 3] * 4, "c": [[1 / sway] * 3] * 4}
        return {"windows_ms": windows, "reference_ms": [1.0] * 4, "steady": True, **WHEN}

    monkeypatch.setattr(measuring, "_ask_worker", answer)
    models = {"a": model, "b": model, "c": model}
    measured = measure_latency(models, threads=1, providers=CPU, input_npy=None, seconds=60)
    assert {tuple(order) for order in asked[:6]} == set(itertools.permutations("abc"))
    widths = {pair: measured.ratio(*pair).relative_half_width for pair in itertools.combinations("abc", 2)}
    assert widths["b", "c"] > 1.9 * widths["a", "b"]
    assert max(widths.values()) < measuring.NARROW_ENOUGH
    before = LatencyMeasurement(
        {name: processes[:-1] for name, processes in measured.windows_ms.items()}, [], 0, 0.0, ""
    )
    assert before.ratio("a", "b").relative_half_width < measuring.NARROW_ENOUGH  # one pair alone would have stopped it
    assert measured.processes > measuring.MIN_PROCESSES


def test_fresh_process_does_not_count_the_parents_memory(tmp_path: Path) -> None:
    ballast = np.ones(50_000_000)  # 400 MB here, which the started process must not be charged for
    measured = measure_fresh(residual_net(tmp_path / "net.onnx"), threads=1, providers=CPU, input_npy=None, processes=1)
    assert ballast[0] == 1
    assert measured.load_ms > 0
    assert measured.first_inference_ms > 0
    assert measured.peak_rss_bytes is None or 10e6 < measured.peak_rss_bytes < 300e6
    if measured.peak_rss_bytes is not None and measured.rss_before_load_bytes is not None:
        assert measured.peak_rss_bytes > measured.rss_before_load_bytes


def test_given_images_are_what_runs(tmp_path: Path) -> None:
    model = residual_net(tmp_path / "net.onnx")
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    np.save(good, np.zeros((2, 3, SIZE, SIZE), np.float32))
    np.save(bad, np.zeros((2, 1, SIZE, SIZE), np.float32))
    assert measure_fresh(model, threads=1, providers=CPU, input_npy=good, processes=1).processes == 1
    with pytest.raises(ProfileError, match=r"(?s)code 1.*input"):
        measure_fresh(model, threads=1, providers=CPU, input_npy=bad, processes=1)


def test_failing_process_is_reported_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ProfileError, match=r"(?s)loading of broken\.onnx.*code 1.*[Pp]rotobuf"):
        measure_fresh(broken, threads=1, providers=CPU, input_npy=None)
    with pytest.raises(ProfileError, match="no such model file"):
        measure_latency({"fp32": tmp_path / "absent.onnx"}, threads=1, providers=CPU, input_npy=None)


def test_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_TIMEOUT_SECONDS", 0.01)
    with pytest.raises(ProfileError, match="no answer within"):
        measure_fresh(residual_net(tmp_path / "net.onnx"), threads=1, providers=CPU, input_npy=None)


def test_worker_needs_neither_torch_nor_pydantic() -> None:
    program = (
        "import json, sys, edgecompress.measure.measure_worker; "
        "print(json.dumps([m for m in ('torch', 'onnx', 'pydantic', 'rich', 'scipy') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=measuring._environment()
    )
    assert json.loads(done.stdout) == []


def test_an_attempt_that_was_cut_off_goes_on_with_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt stands in another folder, as on a device, and starts only the processes that are missing."""
    kept: list[dict[str, Any]] = []
    asked: list[str] = []
    ask = measuring._ask_worker

    def cut_off_after_two(request: Any, **how: Any) -> Any:
        asked.append(request["mode"])
        if len(asked) == 3:
            raise ProfileError("the cable was pulled")
        return ask(request, **how)

    monkeypatch.setattr(measuring, "_ask_worker", cut_off_after_two)
    how: dict[str, Any] = {"threads": 1, "providers": CPU, "input_npy": None, "seconds": 0.2}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = {"net": residual_net(tmp_path / "first" / "net.onnx")}
    with pytest.raises(ProfileError, match="cable"):
        measure_latency(first, **how, answers=Answers(keep=kept.append))
    assert len(kept) == 2

    monkeypatch.setattr(measuring, "_ask_worker", lambda request, **how: asked.append("again") or ask(request, **how))
    second = {"net": residual_net(tmp_path / "second" / "net.onnx")}
    measured = measure_latency(second, **how, answers=Answers(json.loads(json.dumps(kept))))
    assert asked.count("again") == measured.processes - 2
    replayed = measured.latencies_ms("net")[: len(kept[0]["answer"]["windows_ms"]["net"][0])]
    assert replayed.tolist() == kept[0]["answer"]["windows_ms"]["net"][0]
    assert LatencyMeasurement.from_dict(json.loads(json.dumps(measured.to_dict()))).ratio("net", "net").ratio == 1.0


def test_other_requests_get_no_kept_answer() -> None:
    answers = Answers([{"request": '{"mode": "fresh", "model": "a.onnx"}', "answer": {"load_ms": 1.0}}])
    assert answers.take({"mode": "fresh", "model": "/elsewhere/b.onnx"}) is None
    assert answers.take({"model": "/elsewhere/a.onnx", "mode": "fresh"}) == {"load_ms": 1.0}
    assert answers.take({"model": "/elsewhere/a.onnx", "mode": "fresh"}) is None  # each answer once


def test_the_targets_session_settings_reach_the_session() -> None:
    """In a process of its own: binding to a CPU stays for as long as a process lives."""
    program = """
import json, os, sys
from edgecompress.measure import measure_worker as worker
settings = json.load(sys.stdin)
options = worker.session_options(settings)
made = {}
class Session:
    def __init__(self, path, options, *, providers, provider_options):
        made.update(providers=providers, provider_options=provider_options)
    def get_providers(self):
        return made["providers"]
worker.ort.InferenceSession = Session
worker._session("net.onnx", settings)
print(json.dumps({
    **made,
    "cpus": sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else settings["cpu_affinity"],
    "threads": [options.intra_op_num_threads, options.inter_op_num_threads],
    "parallel": options.execution_mode == worker.ort.ExecutionMode.ORT_PARALLEL,
    "basic": options.graph_optimization_level == worker.ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "memory": [options.enable_cpu_mem_arena, options.enable_mem_pattern],
    "spinning": options.get_session_config_entry("session.intra_op.allow_spinning"),
    "stop": options.get_session_config_entry("session.force_spinning_stop"),
}))
"""
    cpu = min(usable_cpus() or {0})
    document = {
        "name": "t",
        "architecture": "x86_64",
        "cpu_affinity": [cpu],
        "provider_options": {"CPUExecutionProvider": {"use_arena": 0}},
        "session": {
            **{"optimization": "basic", "execution": "parallel", "inter_op_threads": 3, "arena": False},
            **{"memory_pattern": False, "config": {"session.intra_op.allow_spinning": 0}},
        },
    }
    target = Target.model_validate(document)
    settings = {"threads": target.threads, "providers": list(target.providers), **target.session_settings()}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        check=True,
        env=measuring._environment(),
    )
    assert json.loads(done.stdout) == {
        "providers": ["CPUExecutionProvider"],
        "provider_options": [{"use_arena": "0"}],
        "cpus": [cpu],
        "threads": [1, 3],
        "parallel": True,
        "basic": True,
        "memory": [False, False],
        "spinning": "0",
        "stop": "1",
    }


def test_a_cpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    session = {"cpu_affinity": [100_000]}
    with pytest.raises(ProfileError, match=r"(?s)code 1.*cannot be bound to CPUs \[100000\]"):
        measure_fresh(
            residual_net(tmp_path / "net.onnx"), threads=1, providers=CPU, input_npy=None, processes=1, session=session
        )


def test_cold_start_is_load_and_first_inference_of_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = iter([(10.0, 1.0), (1.0, 20.0), (5.0, 5.0)])

    def answer(request, **_):  # type: ignore[no-untyped-def]
        load, first = next(replies)
        memory = {"peak_rss_bytes": 1, "rss_before_load_bytes": 1}
        return {"load_ms": load, "first_inference_ms": first, **memory}

    monkeypatch.setattr(measuring, "_ask_worker", answer)
    fresh = measure_fresh(residual_net(tmp_path / "net.onnx"), threads=1, providers=CPU, input_npy=None)
    assert (fresh.load_ms, fresh.first_inference_ms) == (5.0, 5.0)
    assert (fresh.cold_start_ms, fresh.cold_start_ms_range) == (11.0, (10.0, 21.0))


def test_one_file_is_measured_in_several_ways_side_by_side(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "net.onnx", 32, 32)
    settings = {"one": {"batch": 1}, "eight": {"batch": 8}}
    how: dict[str, Any] = {"threads": 1, "providers": CPU, "input_npy": None, "seconds": 0.3}
    measured = measure_latency(dict.fromkeys(settings, path), **how, settings=settings, processes=2)
    assert measured.ratio("eight", "one").ratio > 3  # eight images, less what one inference costs by itself
    given = tmp_path / "three.npy"
    np.save(given, np.zeros((3, 3, 32, 32), np.float32))  # fewer than a batch: they are used again
    with_images = {**how, "input_npy": given, "settings": settings, "processes": 1}
    again = measure_latency(dict.fromkeys(settings, path), **with_images)
    assert again.ratio("eight", "one").ratio > 3


def test_several_inputs_of_several_types_are_made_up(tmp_path: Path) -> None:
    kinds = {"a": TensorProto.FLOAT, "b": TensorProto.INT64, "c": TensorProto.UINT8, "d": TensorProto.BOOL}
    nodes = [
        *(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT) for name in kinds),
        helper.make_node("Sum", [f"{name}_float" for name in kinds], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "several",
        [helper.make_tensor_value_info(name, kind, ["N", 4]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    path = tmp_path / "several.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    how: dict[str, Any] = {"threads": 1, "providers": CPU, "input_npy": None}
    assert measure_fresh(path, **how, processes=1).load_ms > 0
    with pytest.raises(ProfileError, match=r"input 'a'.*does not fit"):
        measure_fresh(path, **how, processes=1, shapes={"a": [2, 5]})


def test_free_axes_need_a_size(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["input"], ["logits"])]
    path = save(tmp_path / "free.onnx", nodes, [], ["N", 3, "H", "W"])
    how: dict[str, Any] = {"threads": 1, "providers": CPU, "input_npy": None, "processes": 1}
    with pytest.raises(ProfileError, match="free axes"):
        measure_fresh(path, **how)
    assert measure_fresh(path, **how, shapes={"input": [1, 3, 8, 8]}).load_ms > 0


def test_a_provider_that_is_dropped_in_silence_is_an_error(tmp_path: Path) -> None:
    how: dict[str, Any] = {"threads": 1, "providers": ("XnnpackExecutionProvider", *CPU), "input_npy": None}
    if "XnnpackExecutionProvider" in ort.get_available_providers():
        pytest.skip("this build has it")
    with pytest.raises(ProfileError, match="could not load XnnpackExecutionProvider"):
        measure_fresh(residual_net(tmp_path / "net.onnx"), **how)


def test_the_arena_grows_with_what_the_network_writes(tmp_path: Path) -> None:
    how: dict[str, Any] = {"threads": 1, "providers": CPU, "input_npy": None}
    small = measure_arena(residual_net(tmp_path / "small.onnx", 8, 32), **how)
    large = measure_arena(residual_net(tmp_path / "large.onnx", 256, 128), **how)
    assert small is not None
    assert large is not None
    written = 256 * 128 * 128 * 4  # one activation of the large net, in float
    assert small < written < large < 8 * written
    assert measure_arena(tmp_path / "large.onnx", **how, session={"arena": False}) is None


def test_many_models_take_turns_in_few_orders() -> None:
    orders = measuring._orders([str(number) for number in range(9)])
    assert len(orders) == 18
    assert {order[0] for order in orders} == {order[-1] for order in orders} == {str(n) for n in range(9)}


@pytest.mark.slow
def test_a_busy_cpu_does_not_turn_the_ratio(tmp_path: Path) -> None:
    """Real processes beside ours on the same CPU: inferences wait for it; their time on it does not grow so."""
    cpu = min(usable_cpus() or {0})
    if sys.platform != "linux":
        pytest.skip("a process is bound to a CPU on Linux only")
    # Longer than the few milliseconds for which the system lets each process have the CPU.
    models = {"large": residual_net(tmp_path / "a.onnx", 64, 256), "small": residual_net(tmp_path / "b.onnx", 32, 256)}
    how: dict[str, Any] = {"threads": 1, "providers": CPU, "input_npy": None, "session": {"cpu_affinity": [cpu]}}
    spin = f"import os\nos.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    alone = measure_latency(models, seconds=0.5, **how)
    hog = subprocess.Popen([sys.executable, "-c", spin])
    try:
        crowded = measure_latency(models, seconds=0.5, **how)
    finally:
        hog.kill()
        hog.wait()
    assert crowded.on_cpu_ms is not None
    assert crowded.on_cpu_shares is not None
    assert all(float(np.median(shares)) < 0.9 for shares in crowded.on_cpu_shares.values())
    for name in models:
        waiting = np.concatenate(crowded.window_medians_ms[name])
        assert np.mean(waiting) > np.mean(np.concatenate(crowded.on_cpu_ms[name]))
    # Caches that are shared with the other process cost each net another share of its time.
    assert 0.5 < crowded.ratio("large", "small").ratio / alone.ratio("large", "small").ratio < 2
    again = LatencyMeasurement.from_dict(json.loads(json.dumps(crowded.to_dict())))
    assert again.ratio("large", "small") == crowded.ratio("large", "small")


def test_several_threads_are_compared_by_the_clock(tmp_path: Path) -> None:
    model = residual_net(tmp_path / "net.onnx")
    measured = measure_latency({"a": model}, threads=2, providers=CPU, input_npy=None, seconds=0.2)
    assert measured.on_cpu_ms is None
    assert measured.on_cpu_shares is None
