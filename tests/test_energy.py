"""Energy: which sensors a platform has, and the arithmetic of counters that start again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgecompress.measure import energy
from edgecompress.measure.energy import EnergySources, find_sources, measure_energy
from onnx_models import residual_net

HOW: dict[str, Any] = {"threads": 1, "providers": ("CPUExecutionProvider",), "input_npy": None}


def _file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
    return path


def test_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    package = tmp_path / "sys/class/powercap/intel-rapl:0"
    _file(package / "energy_uj", "1000")
    _file(package / "max_energy_range_uj", "5000")
    _file(tmp_path / "sys/class/powercap/intel-rapl:0:0/energy_uj", "400")
    found = find_sources(tmp_path)
    assert found.counters == {str(package / "energy_uj"): 5000.0}
    assert found.absent_because is None


def test_the_whole_platform_is_not_added_to_the_package_in_it(tmp_path: Path) -> None:
    zones = tmp_path / "sys/class/powercap"
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):
        _file(zones / zone / "name", name)
        _file(zones / zone / "energy_uj", "1000")
    assert list(find_sources(tmp_path).counters) == [str(zones / f"intel-rapl:{k}/energy_uj") for k in (0, 1)]


def test_sockets_count_and_the_cores_in_them_do_not(tmp_path: Path) -> None:
    """As amd_energy names them."""
    chip = tmp_path / "sys/class/hwmon/hwmon0"
    for number, name in enumerate(("Ecore000", "Ecore001", "Esocket0"), 1):
        _file(chip / f"energy{number}_label", name)
        _file(chip / f"energy{number}_input", "1000")
    assert list(find_sources(tmp_path).counters) == [str(chip / "energy3_input")]


def test_a_sensor_counts_once(tmp_path: Path) -> None:
    """Five watts and one, however many files show them."""
    chip = tmp_path / "sys/class/hwmon/hwmon0"
    for name, microwatts in (("power1_input", 5e6), ("power1_average", 5e6), ("power2_average", 1e6)):
        _file(chip / name, f"{microwatts:.0f}")
    found = find_sources(tmp_path)
    assert found.sensors == (str(chip / "power1_input"), str(chip / "power2_average"))
    (chip / "power1_input").write_text("")  # some chips have the file and no value
    assert find_sources(tmp_path).sensors == (str(chip / "power1_average"), str(chip / "power2_average"))


def test_boards_show_power(tmp_path: Path) -> None:
    sensor = _file(tmp_path / "sys/class/hwmon/hwmon2/power1_input", "3500000")
    assert find_sources(tmp_path).sensors == (str(sensor),)


def test_absence_is_stated(tmp_path: Path) -> None:
    nothing = find_sources(tmp_path)
    assert "no energy" in (nothing.absent_because or "")
    answer = measure_energy(Path("net.onnx"), **HOW, sources=nothing)
    assert answer["joules_per_inference"] is None
    assert answer["absent_because"] == nothing.absent_because


def test_joules_of_an_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two watts at rest, six at work, a counter that started again at 10 J meanwhile; four inferences a second."""
    busy = {"before": [9e6], "after": [5e6], "samples": [], "seconds": 1.0, "runs": 4}
    idle = {"before": [0.0], "after": [4e6], "samples": [], "seconds": 2.0, "runs": 9}
    monkeypatch.setattr(energy, "ask_worker", lambda *_, **__: {"busy": busy, "idle": idle})
    answer = measure_energy(Path("net.onnx"), **HOW, sources=EnergySources({"counter": 10e6}, (), None))
    assert answer["joules_per_inference"] == pytest.approx(6.0 / 4)
    assert answer["joules_per_inference_above_idle"] == pytest.approx(4.0 / 4)
    assert (answer["idle_watts"], answer["busy_watts"]) == pytest.approx((2.0, 6.0))


def test_a_real_process_reads_the_files(tmp_path: Path) -> None:
    sensor = _file(tmp_path / "power1_input", "3500000")
    answer = measure_energy(
        residual_net(tmp_path / "net.onnx"), **HOW, sources=EnergySources({}, (str(sensor),), None), seconds=0.2
    )
    assert answer["busy_watts"] == pytest.approx(3.5)
    assert answer["joules_per_inference_above_idle"] == pytest.approx(0.0, abs=1e-6)
