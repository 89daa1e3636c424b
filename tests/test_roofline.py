"""Peaks and shares: the arithmetic against numbers made up, the files against ONNX Runtime itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edgecompress.measure import roofline
from edgecompress.measure.roofline import CEILINGS, measure_peaks, model_share

PEAKS = {
    "threads": {
        "1": {
            "float_gmacs_per_s": 100.0,
            "int8_gmacs_per_s": 400.0,
            "float_gmacs_per_s_by_kernel": {"matrix_product": 100.0, "convolution": 50.0},
            "int8_gmacs_per_s_by_kernel": {"matrix_product": 400.0, "convolution": 200.0},
            "memory_gb_per_s": 10.0,
        }
    }
}


def _model(coverage: float, latency_ms: float) -> dict[str, object]:
    facts = {"macs": 1_000_000_000, "int8_mac_coverage": coverage, "weights_bytes": 50_000_000}
    return {**facts, "latency_ms": {"p50": latency_ms}}


def test_integer_and_float_work_count_against_their_own_peaks() -> None:
    # A billion MACs: 10 ms at the float peak, 2.5 ms at the integer peak.
    assert model_share(_model(0.0, 20.0), PEAKS, threads=1)["share_of_peak"] == pytest.approx(0.5)
    assert model_share(_model(1.0, 5.0), PEAKS, threads=1)["share_of_peak"] == pytest.approx(0.5)
    half = model_share(_model(0.5, 12.5), PEAKS, threads=1)
    assert half["least_ms"] == pytest.approx(5.0 + 1.25)
    assert half["share_of_peak"] == pytest.approx(0.5)
    assert half["share_of_convolution_peak"] == pytest.approx(1.0)
    assert half["gmacs_per_s"] == pytest.approx(80.0)
    assert half["weights_ms"] == pytest.approx(5.0)  # 50 MB at 10 GB/s


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_the_kernels_are_what_they_claim(tmp_path: Path, activations: str) -> None:
    files = roofline._write(tmp_path, np.dtype(activations))
    assert set(files) == set(CEILINGS)
    for name, path in files.items():
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        values = np.ones(entry.shape, dtype=np.float32 if CEILINGS[name].kind == "float" else activations)
        (output,) = session.run(None, {"x": values})
        sums = roofline.SIDE if CEILINGS[name].what == "matrix_product" else roofline.CHANNELS * 9
        assert output.size * sums == CEILINGS[name].macs


@pytest.mark.slow
def test_peaks_are_measured_for_one_thread_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIDE", 64)
    monkeypatch.setattr(roofline, "EXTENT", 7)
    monkeypatch.setattr(roofline, "SECONDS", 0.2)
    peaks = measure_peaks(threads=2, memory_bytes=64_000_000)
    assert set(peaks["threads"]) == {"1", "2"}
    assert peaks["copied_bytes"] == 8_000_000
    for peak in peaks["threads"].values():
        for kind in ("float", "int8"):
            assert peak[f"{kind}_gmacs_per_s"] == max(peak[f"{kind}_gmacs_per_s_by_kernel"].values()) > 0
        assert peak["memory_gb_per_s"] > 0
