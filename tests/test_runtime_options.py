"""Providers and session options: which are compared, which win, and what a user copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompress.errors import ConfigurationError, ProfileError
from edgecompress.measure import runtime_options
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.runtime_options import (
    CPU,
    CPU_SIDE,
    compare_providers,
    option_variants,
    parse_providers,
    python_settings,
    sweep_options,
)
from edgecompress.reporting.profile_text import options_sentence
from edgecompress.settings.target import Target
from onnx_models import residual_net

SWEEP: dict[str, Any] = {"threads": 1, "cores": 2, "providers": (CPU,), "input_npy": None, "seconds": 1.0}


def invented(monkeypatch: pytest.MonkeyPatch, speed: dict[str, float]) -> list[dict[str, Any]]:
    """Latency of 10 ms divided by the speed of every setting that a variant changes, and noise of 1 %."""
    asked: list[dict[str, Any]] = []

    def latency(paths: dict[str, Path], *, settings: dict[str, Any], **_: object) -> LatencyMeasurement:
        asked.append(settings)
        generator = np.random.default_rng(0)
        of = {}
        for name in paths:
            own = settings.get(name, {})
            keys = [*(key for key in own if key != "session"), *own.get("session", {})]
            of[name] = 10 / np.prod([speed.get(key, 1.0) for key in keys])
        windows = {n: [[np.full(3, of[n] * (1 + 0.01 * generator.normal()))] * 4 for _ in range(5)] for n in paths}
        windows = {n: [[w[0]] * 4 for w in found] for n, found in windows.items()}
        return LatencyMeasurement(windows, [np.ones(4)] * 5, 5, 1.0, "")

    monkeypatch.setattr(runtime_options, "measure_latency", latency)
    return asked


def test_options_that_win_are_taken_together_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = invented(monkeypatch, {"arena": 1.3, "session.dynamic_block_base": 1.2, "memory_pattern": 0.7})
    session = {"session": {"session.x": "1"}}
    found = sweep_options(Path("net.onnx"), **SWEEP, session=session)
    assert found["best"]["options"] == ["no memory arena", "dynamic block 4"]
    assert found["rows"][-1]["option"] == "no memory pattern"
    assert found["checked"]["speedup"] == pytest.approx(1.3 * 1.2, rel=0.03)
    # The target's own entries stay beside those that are tried.
    assert asked[-1]["together"]["session"] == {"session.x": "1", "session.dynamic_block_base": "4"}
    assert "no memory arena, dynamic block 4" in options_sentence(found)
    text = found["best"]["python"]
    assert "options.enable_cpu_mem_arena = False" in text
    assert 'options.add_session_config_entry("session.dynamic_block_base", "4")' in text


def measured_anew(monkeypatch: pytest.MonkeyPatch, anew: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """A (1.2 times as fast) and B (1.1 times) win alone; `anew` holds what is found when they are measured again."""
    alone = {"A": (1.2, 1.15, 1.25), "B": (1.1, 1.05, 1.15)}
    monkeypatch.setattr(runtime_options, "measure_latency", lambda paths, **_: list(paths))

    def row(names: list[str], _: str, name: str) -> dict[str, Any]:
        value, low, high = (anew if "together" in names else alone)[name]
        return {"speedup": value, "speedup_ci95": [low, high], "latency_ms_p50": 1.0}

    monkeypatch.setattr(runtime_options, "_row", row)
    variants = {"A": {"arena": False}, "B": {"memory_pattern": False}}
    return sweep_options(Path("net.onnx"), **SWEEP, variants=variants)


@pytest.mark.parametrize(
    ("together", "alone", "kept"),
    [
        ((1.3, 1.25, 1.35), (1.2, 1.15, 1.25), ["A", "B"]),
        ((0.99, 0.97, 1.01), (1.2, 1.15, 1.25), ["A"]),
        ((1.05, 1.02, 1.08), (1.2, 1.15, 1.25), ["A"]),  # both help, and B costs A something
        ((1.3, 0.9, 1.7), (1.01, 1.005, 1.015), ["A"]),  # more, but not beyond doubt
        ((1.05, 1.02, 1.08), (1.2, 0.9, 1.5), ["A", "B"]),
        ((0.99, 0.97, 1.01), (1.01, 0.97, 1.05), []),
    ],
)
def test_the_best_that_holds_when_measured_anew_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    together: tuple[float, float, float],
    alone: tuple[float, float, float],
    kept: list[str],
) -> None:
    found = measured_anew(monkeypatch, {"together": together, "A": alone})
    assert found["best"]["options"] == kept
    assert len(found["best"]["settings"]) == len(kept)
    checked = together if len(kept) == 2 else alone
    assert (found["checked"]["speedup"], *found["checked"]["speedup_ci95"]) == checked
    said = options_sentence(found)
    assert ("together" in said) == (len(kept) == 2)
    assert ("measured again" in said) == (not kept)
    assert ("enable_cpu_mem_arena" in found["best"]["python"]) == bool(kept)


def test_of_two_that_set_the_same_the_better_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    invented(monkeypatch, {})
    variants: dict[str, Any] = {"two": {"threads": 2, "arena": False}, "three": {"threads": 3}}
    monkeypatch.setattr(runtime_options, "_GROUP", 1)
    speeds = iter([1.2, 1.5, 1.5])

    def row(*_: object) -> dict[str, Any]:
        speed = next(speeds)
        return {"speedup": speed, "speedup_ci95": [speed, speed], "latency_ms_p50": 1.0}

    monkeypatch.setattr(runtime_options, "_row", row)
    assert sweep_options(Path("net.onnx"), **SWEEP, variants=variants)["best"]["settings"] == {"threads": 3}


def test_noise_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    invented(monkeypatch, {"memory_pattern": 0.9})
    found = sweep_options(Path("net.onnx"), **SWEEP, variants={"no memory pattern": {"memory_pattern": False}})
    assert found["best"]["options"] == []
    assert found["checked"] is None
    assert "None of them" in options_sentence(found)


def test_the_python_that_is_written_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every variant's settings, in the folder of the model."""
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    residual_net(tmp_path / "model.onnx")
    for settings in option_variants(threads=1, cores=2).values():
        scope: dict[str, Any] = {"onnxruntime": onnxruntime}
        exec(python_settings(settings, 1, (CPU,)), scope)
        assert scope["session"].get_providers() == [CPU]
        assert scope["options"].intra_op_num_threads == settings.get("threads", 1)


def test_what_the_target_sets_itself_is_copied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gain was measured with it."""
    import onnxruntime

    invented(monkeypatch, {"memory_pattern": 1.3})
    session = Target.model_validate(
        {
            "name": "t",
            "architecture": "x86_64",
            "session": {
                **{"optimization": "disabled", "execution": "parallel", "inter_op_threads": 2, "arena": False},
                "config": {"session.set_denormal_as_zero": "1"},
            },
        }
    ).session_settings()
    found = sweep_options(
        Path("net.onnx"), **SWEEP, session=session, variants={"no memory pattern": {"memory_pattern": False}}
    )
    monkeypatch.chdir(tmp_path)
    residual_net(tmp_path / "model.onnx")
    scope: dict[str, Any] = {"onnxruntime": onnxruntime}
    exec(found["best"]["python"], scope)
    options = scope["options"]
    assert (options.enable_mem_pattern, options.enable_cpu_mem_arena) == (False, False)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert (options.execution_mode, options.inter_op_num_threads) == (onnxruntime.ExecutionMode.ORT_PARALLEL, 2)
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_options_of_providers_are_copied() -> None:
    settings = {"provider_options": [{"intra_op_num_threads": "4"}, {}]}
    text = python_settings(settings, 1, ("XnnpackExecutionProvider", CPU))
    assert "providers=[('XnnpackExecutionProvider', {'intra_op_num_threads': '4'}), 'CPUExecutionProvider'])" in text


def test_names_of_providers() -> None:
    assert parse_providers(None) == ()
    assert parse_providers("all") == tuple(CPU_SIDE.values())
    names = parse_providers("cpu, XNNPACK, OpenVINOExecutionProvider, openvino")
    assert names == (CPU, "XnnpackExecutionProvider", "OpenVINOExecutionProvider")
    with pytest.raises(ConfigurationError, match="known CPU-side providers are cpu, xnnpack"):
        parse_providers("cpu,cuda")


def test_providers_are_listed_as_present_absent_or_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[dict[str, Any]] = []

    def latency(paths: dict[str, Path], *, providers: list[str], **how: Any) -> LatencyMeasurement:
        if providers[0] == "OpenVINOExecutionProvider":
            raise ProfileError("it does not know this operator")
        chains.append(how.get("settings", {}))
        of = {CPU: 4.0, "XnnpackExecutionProvider": 2.0}
        windows = {name: [[np.full(3, of[name])] * 4] * 5 for name in paths}
        return LatencyMeasurement(windows, [np.ones(4)] * 5, 5, 1.0, "")

    monkeypatch.setattr(runtime_options, "measure_latency", latency)
    monkeypatch.setattr(runtime_options, "_assignment", lambda *_: None)
    available = [CPU, "XnnpackExecutionProvider", "OpenVINOExecutionProvider", "AzureExecutionProvider"]
    found = compare_providers(
        Path("net.onnx"), parse_providers("all"), threads=1, input_npy=None, seconds=1.0, available=available
    )
    rows = {row["provider"]: row for row in found["rows"]}
    assert rows["XnnpackExecutionProvider"]["speedup"] == pytest.approx(2.0)
    assert rows["OpenVINOExecutionProvider"] == {
        "provider": "OpenVINOExecutionProvider",
        "error": "it does not know this operator",
    }
    assert found["absent"] == ["DnnlExecutionProvider", "ACLExecutionProvider", "ArmNNExecutionProvider"]
    # What a provider leaves goes to the CPU provider behind it.
    assert chains[-1]["XnnpackExecutionProvider"] == {"providers": ["XnnpackExecutionProvider", CPU]}
