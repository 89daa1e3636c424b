"""The profile document: complete where the target is at hand, silent about time where it is not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompress import machine
from edgecompress.errors import ProfileError
from edgecompress.measure import profiling
from edgecompress.measure.latencies import FreshMeasurement, LatencyMeasurement
from edgecompress.measure.profiling import profile_models
from edgecompress.settings.target import Target
from onnx_models import quantized, residual_net, residual_net_macs

TIMING = ("latency_ms", "throughput_per_s", "load_ms", "first_inference_ms", "peak_rss_bytes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    fp32 = residual_net(folder / "model.onnx", 16, 32)
    return {"fp32": fp32, "int8": quantized(fp32, folder / "model.int8.onnx", size=32)}


def here(**changes: Any) -> Target:
    return Target.model_validate({"name": "here", "architecture": machine.architecture(), **changes})


@pytest.mark.skipif(machine.architecture() not in ("x86_64", "aarch64"), reason="no target has this architecture")
def test_profile_of_the_machine_at_hand_is_complete(models: dict[str, Path]) -> None:
    document = profile_models(models, target=here(), input_npy=None, seconds=0.2)
    assert json.loads(json.dumps(document)) == document
    assert document["measured"] is True
    assert document["not_measured_because"] == []
    assert document["device"]["machine"]["architecture"] == machine.architecture()
    for name, path in models.items():
        model = document["models"][name]
        latency = model["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert latency["p50_ci95"][0] <= latency["p50"] <= latency["p50_ci95"][1]
        assert model["throughput_per_s"] == pytest.approx(1000 / latency["mean"])
        assert model["size_bytes"] == path.stat().st_size
        assert model["size_bytes_compressed"] == pytest.approx(len(gzip.compress(path.read_bytes(), 6)), abs=64)
        assert model["macs"] == sum(residual_net_macs(16, 32).values())
        assert model["load_ms"] > 0
        assert model["first_inference_ms"] > 0
    low, high = document["int8_speedup"]["ci95"]
    assert low <= document["int8_speedup"]["ratio"] <= high
    ratio = document["models"]["fp32"]["latency_ms"]["p50"] / document["models"]["int8"]["latency_ms"]["p50"]
    assert document["int8_speedup"]["ratio"] == pytest.approx(ratio, rel=0.5)
    assert document["end_to_end_speedup"] == {"ratio": None, "ci95": None}  # there is no baseline
    assert document["int8_mac_coverage"] == 1.0
    assert document["method"]["processes"] >= 5
    assert document["noise"]["reference_ms"] > 0
    assert "verdict" not in document


@pytest.mark.skipif(machine.architecture() not in ("x86_64", "aarch64"), reason="no target has this architecture")
def test_the_baseline_runs_beside_the_others(models: dict[str, Path], tmp_path: Path) -> None:
    baseline = residual_net(tmp_path / "baseline.onnx", 128, 48)
    document = profile_models({**models, "baseline": baseline}, target=here(), input_npy=None, seconds=0.2)
    assert list(document["models"]) == ["baseline", "fp32", "int8"]
    assert set(document["models"]["baseline"]) == set(document["models"]["fp32"])
    assert document["models"]["baseline"]["macs"] == sum(residual_net_macs(128, 48).values())
    assert document["models"]["baseline"]["load_ms"] > 0
    low, high = document["end_to_end_speedup"]["ci95"]
    assert low <= document["end_to_end_speedup"]["ratio"] <= high
    assert document["end_to_end_speedup"]["ratio"] > 1.5  # it has 18 times the MACs
    assert document["end_to_end_speedup"]["ratio"] > document["int8_speedup"]["ratio"]


@pytest.mark.skipif(machine.architecture() not in ("x86_64", "aarch64"), reason="no target has this architecture")
@pytest.mark.parametrize(("shipped", "end_to_end", "int8"), [("int8", 6.0, 2.0), ("fp32", 3.0, None)])
def test_the_baseline_is_compared_with_what_ships(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shipped: str, end_to_end: float, int8: float | None
) -> None:
    """Invented latencies of 6, 2 and 1 ms, so that each ratio is known."""

    def latency(paths: dict[str, Path], **_: object) -> LatencyMeasurement:
        of = {"baseline": 6.0, "fp32": 2.0, "int8": 1.0}
        windows = {name: [[np.full(3, of[name])] * 4] * 5 for name in paths}
        return LatencyMeasurement(windows, [np.ones(4)] * 5, 5, 1.0, "narrow enough")

    fresh = FreshMeasurement(9.0, (8.0, 10.0), 1.0, (1.0, 1.0), None, None, None, 3, 10.0, (9.0, 11.0))
    monkeypatch.setattr(profiling, "measure_latency", latency)
    monkeypatch.setattr(profiling, "measure_fresh", lambda *_, **__: fresh)
    given = {name: path for name, path in models.items() if shipped == "int8" or name == "fp32"}
    document = profile_models({**given, "baseline": models["fp32"]}, target=here(), input_npy=None)
    assert document["end_to_end_speedup"]["ratio"] == pytest.approx(end_to_end)
    assert document["end_to_end_speedup"]["ci95"] == pytest.approx([end_to_end, end_to_end])
    assert document["int8_speedup"]["ratio"] == (None if int8 is None else pytest.approx(int8))


def test_target_that_is_not_at_hand_gets_no_invented_numbers(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr(profiling, "measure_latency", never)
    monkeypatch.setattr(profiling, "measure_fresh", never)
    board = here(device_model="A board that nobody has")
    document = profile_models({**models, "baseline": models["fp32"]}, target=board, input_npy=None)
    assert document["measured"] is False
    assert list(document["models"]) == ["baseline", "fp32", "int8"]
    assert document["end_to_end_speedup"] == {"ratio": None, "ci95": None}
    assert "A board that nobody has" in document["not_measured_because"][0]
    assert document["device"]["machine"] is None
    for model in document["models"].values():
        for key in TIMING:
            values = model[key].values() if key == "latency_ms" else [model[key]]
            assert set(values) == {None}
        assert model["size_bytes"] > 0
        assert model["macs"] == sum(residual_net_macs(16, 32).values())
    assert document["int8_speedup"] == {"ratio": None, "ci95": None}
    assert document["int8_mac_coverage"] == 1.0


def test_float_model_alone_is_enough(models: dict[str, Path]) -> None:
    board = here(device_model="A board that nobody has")
    document = profile_models({"fp32": models["fp32"]}, target=board, input_npy=None)
    assert list(document["models"]) == ["fp32"]
    assert document["int8_mac_coverage"] is None
    with pytest.raises(ProfileError, match="fp32"):
        profile_models({"int8": models["int8"]}, target=board, input_npy=None)


def test_faster_machine_than_the_target_is_said() -> None:
    facts = {"architecture": "x86_64", "isa": ["avx2", "avx512_vnni"], "cores": 8, "governor": "powersave"}
    target = Target.model_validate(
        {"name": "old", "architecture": "x86_64", "isa": ["avx2"], "cores": 2, "int8": {"weight_bits": 7}}
    )
    notes = " ".join(profiling._notes(target, measured=True, machine=facts, has_images=False))
    for expected in ("without VNNI", "8 cores", "powersave", "Random images"):
        assert expected in notes


def noise_of(reference: list[float], frequency: list[float] | None) -> tuple[dict[str, Any], list[str]]:
    """The noise that is stated where each process saw this reference loop and this frequency, one process a second."""
    processes = len(reference)
    measured = LatencyMeasurement(
        {"fp32": [[np.full(3, loop)] * 4 for loop in reference]},
        [np.full(4, loop) for loop in reference],
        processes,
        1.0,
        "",
        [np.full(4, float(process)) for process in range(processes)],
        None if frequency is None else [np.full(4, value) for value in frequency],
    )
    noise = profiling._noise(measured)
    return noise, profiling._noise_notes(noise)


def test_drift_and_frequency_are_stated() -> None:
    noise, notes = noise_of([1.0, 1.02, 1.05, 1.08, 1.1, 1.12, 1.16, 1.2], [2400.0] * 6 + [1800.0] * 2)
    assert noise["drift"]["reference"]["change"] == pytest.approx(0.2, abs=0.02)
    assert noise["drift"]["reference"]["ci95"][0] > 0
    assert noise["drift"]["fp32"]["change"] == pytest.approx(noise["drift"]["reference"]["change"])
    assert (noise["frequency_mhz"]["min"], noise["frequency_mhz"]["max"]) == (1800.0, 2400.0)
    text = " ".join(notes)
    assert "got slower by" in text
    assert "ran at 1800 to 2400 MHz" in text


def test_steady_machine_has_no_drift_and_an_absent_frequency_is_said() -> None:
    noise, notes = noise_of([1.0, 1.01, 1.0, 0.99, 1.0, 1.01, 1.0, 1.0], None)
    assert noise["frequency_mhz"] is None
    assert abs(noise["drift"]["reference"]["change"]) < 0.02
    assert not any("got" in note for note in notes)
    assert any("not exposed" in note for note in notes)


@pytest.mark.parametrize(("thoroughness", "narrow", "processes"), [("quick", 0.05, 5), ("thorough", 0.005, 12)])
def test_presets_reach_the_measuring_and_quick_says_so(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, thoroughness: str, narrow: float, processes: int
) -> None:
    asked: dict[str, object] = {}

    def latency(paths: dict[str, Path], **how: object) -> LatencyMeasurement:
        asked.update(how)
        return LatencyMeasurement({name: [[np.ones(3)] * 4] * 5 for name in paths}, [np.ones(4)] * 5, 5, 1.0, "")

    fresh = FreshMeasurement(9.0, (8.0, 10.0), 1.0, (1.0, 1.0), None, None, None, 3, 10.0, (9.0, 11.0))
    monkeypatch.setattr(profiling, "measure_latency", latency)
    monkeypatch.setattr(profiling, "measure_fresh", lambda *_, **__: fresh)
    document = profile_models(models, target=here(), input_npy=None, seconds=3.0, thoroughness=thoroughness)
    assert (asked["seconds"], asked["narrow_enough"], asked["processes"]) == (3.0, narrow, processes)
    assert document["method"]["preset"] == thoroughness
    assert any("--quick" in note for note in document["notes"]) == (thoroughness == "quick")
