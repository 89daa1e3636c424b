"""Run directories as the export leaves them, made of hand-made ONNX models: what bundles are made from, in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgecompress.machine import architecture
from edgecompress.run_directory import RunDirectory, write_json
from edgecompress.settings.target import Target
from onnx_models import CLASSES, SIZE, quantized, residual_net

LABELS = ["cat", "dog", "a\nb", "hämster", "owl", "fox"]
PREPROCESSING = {
    "input_size": SIZE,
    "channels": 3,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bilinear",
    "crop_fraction": 0.875,
}


def here(**changes: Any) -> Target:
    """A target that the machine at hand is."""
    return Target.model_validate({"name": "here", "architecture": architecture(), **changes})


def small_run(folder: Path, *, gates: list[dict[str, Any]] | None = None, int8: bool = True) -> RunDirectory:
    """A complete run of the target `here` with an fp32 and an int8 file, and images to try them on."""
    run = RunDirectory(folder)
    run.export.mkdir(parents=True)
    residual_net(run.export / "model.onnx")
    if int8:
        quantized(run.export / "model.onnx", run.export / "model.int8.onnx")
    for path in run.export.glob("*.onnx"):
        model = onnx.load(path)
        properties = {"preprocessing": json.dumps(PREPROCESSING), "labels": json.dumps(LABELS), "versions": "{}"}
        properties |= {"recipe": "tiny", "recipe_sha256": "0" * 64}
        onnx.helper.set_model_props(model, {f"edgecompress.{key}": value for key, value in properties.items()})
        onnx.save(model, path)
    parts: dict[str, Any] = {"onnx_fp32": {"passed": True}} | ({"onnx_int8": {"passed": True}} if int8 else {})
    write_json(run.export / "parity.json", {"target": "here", "failures": [], **parts})
    images = np.random.default_rng(0).integers(0, 256, (16, 3, SIZE, SIZE)).astype(np.uint8)
    np.save(run.export / "samples.npy", images)
    assert len(LABELS) == CLASSES
    manifest: dict[str, Any] = {
        "schema_version": 1,
        "status": "complete",
        "recipe": {
            "name": "tiny",
            "model": {"name": "resnet8"},
            "data": {"name": "digits"},
            "stages": [{"id": "int8", "kind": "quantize"}],
        },
        "recipe_name": "tiny",
        "stages": [],
        "targets": ["here"],
        "started_at": "2026-01-01T00:00:00+00:00",
        "seed": 0,
        "gates": gates or [],
    }
    write_json(run.manifest_path, manifest | {"artifacts": run.artifacts()})
    return run
