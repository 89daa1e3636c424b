"""Scaling tables: the arithmetic of efficiency, and what is left out and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompress.errors import ConfigurationError
from edgecompress.measure import sweeps
from edgecompress.measure.latencies import LatencyMeasurement
from edgecompress.measure.sweeps import parse_sweeps, sweep, thread_counts
from edgecompress.reporting.profile_text import scaling_rows


def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency falls with the root of the threads and grows by 1 ms an image, with 1 ms of its own."""

    def latency(paths: dict[str, Path], *, settings: dict[str, Any], **_: object) -> LatencyMeasurement:
        of = {key: (1 + own["batch"]) / np.sqrt(own["threads"]) for key, own in settings.items()}
        windows = {name: [[np.full(3, of[name])] * 4] * 3 for name in paths}
        return LatencyMeasurement(windows, [np.ones(4)] * 3, 3, 1.0, "")

    monkeypatch.setattr(sweeps, "measure_latency", latency)


def table(**changes: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"kinds": ("threads", "batch"), "threads": 1, "cores": 4, "batch": None, "expected_ms": 2.0}
    how |= {"providers": ("CPUExecutionProvider",), "input_npy": None, "seconds": 10.0}
    return sweep(Path("net.onnx"), **{**how, **changes})


def test_efficiency_is_the_gain_for_each_thread_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    invented(monkeypatch)
    found = table()
    assert [row["threads"] for row in found["threads"]] == [1, 2, 4]
    assert [row["speedup"] for row in found["threads"]] == pytest.approx([1, np.sqrt(2), 2])
    assert [row["efficiency"] for row in found["threads"]] == pytest.approx([1, np.sqrt(2) / 2, 0.5])
    assert [row["throughput_per_s"] for row in found["batch"]] == pytest.approx([500, 2000 / 3, 800, 8000 / 9])
    assert [row["gain"] for row in found["batch"]] == pytest.approx([1, 4 / 3, 1.6, 16 / 9])
    assert found["left_out"] == []
    texts = scaling_rows(found)
    assert texts[2]["what"] == "4 threads"
    assert texts[2]["efficiency"] == "50.0 %"
    assert texts[-1]["what"] == "8 images at a time"


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    invented(monkeypatch)
    slow = table(expected_ms=30.0, seconds=5.0)
    assert [row["batch"] for row in slow["batch"]] == [1, 2]
    assert "batch 4, 8" in slow["left_out"][0]
    fixed = table(batch=4, kinds=("batch",))
    assert fixed["batch"] == []
    assert "fixed" in fixed["left_out"][0]
    assert table(cores=1, kinds=("threads",))["left_out"] == ["more threads than 1: the machine offers one core"]


def test_threads_and_words() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]
    assert parse_sweeps(None) is None
    assert parse_sweeps("none") == ()
    assert parse_sweeps("batch, options") == ("batch", "options")
    with pytest.raises(ConfigurationError, match="--sweep speed"):
        parse_sweeps("speed")
