"""Run directories as a command would leave them: one that is well, a hostile one, one with everything in it."""

from __future__ import annotations

import copy
import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgecompress.run_directory import RunDirectory, write_json

EXPORTED = {"export/model.onnx": b"fp32", "export/model.int8.onnx": b"int8"}  # the report looks at their hashes alone
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "a|b`c` **d** [e](http://example.com)\n# f",
    "\u202eright to left\u202c",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f680 astronaut",
    "x" * 5000,
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x00\ud800",
)

STAGES: list[dict[str, Any]] = [
    {
        "id": "dense",
        "kind": "train",
        "status": "complete",
        "accuracy": 0.9778,
        "accuracy_split": "test",
        "accuracy_ci95": [0.9568, 0.9887],
        "samples": 360,
        "params": 272_474,
        "macs": 2_560_000,
        "sparsity": 0.0,
        "size_bytes": 1_102_340,
        "size_bytes_compressed": 1_012_000,
        "seconds": 21.4,
        "epochs": 30,
        "summary": "trained on labels for 30 epochs",
    },
    {
        "id": "pruned",
        "kind": "prune",
        "status": "complete",
        "accuracy": 0.9722,
        "accuracy_split": "test",
        "accuracy_ci95": [0.9496, 0.9848],
        "samples": 360,
        "params": 81_402,
        "macs": 812_000,
        "sparsity": 0.0,
        "size_bytes": 338_120,
        "size_bytes_compressed": 309_400,
        "seconds": 34.0,
        "epochs": 34,
        "summary": "removed 68.3% of the MACs and 70.1% of the parameters in 4 step(s), channels rounded to 8; "
        "finetuned 34 epochs with teacher stage dense (temperature 4, alpha 0.7)",
    },
    {
        "id": "int8",
        "kind": "quantize",
        "status": "complete",
        "accuracy": 0.975,
        "accuracy_split": "test",
        "accuracy_ci95": [0.9532, 0.9868],
        "samples": 360,
        "params": 81_402,
        "macs": 812_000,
        "sparsity": 0.012,
        "size_bytes": 112_480,
        "size_bytes_compressed": 84_210,
        "seconds": 6.2,
        "calibration_samples": 256,
        "summary": "int8, uint8 activations and 8-bit weights, calibrated on 256 training images",
    },
]
GATES: list[dict[str, Any]] = [
    {"gate": "max_accuracy_drop", "value": 0.0028, "limit": 0.02, "passed": True, "target": None},
    {"gate": "fp32_max_relative_diff", "value": 3.1e-6, "limit": 1e-3, "passed": True, "target": "x86"},
    {"gate": "fp32_min_top1_agreement", "value": 1.0, "limit": 0.995, "passed": True, "target": "x86"},
    {"gate": "int8_min_top1_agreement", "value": 0.9944, "limit": 0.95, "passed": True, "target": "x86"},
    {"gate": "int8_min_top1_agreement", "value": 0.4, "limit": 0.95, "passed": False, "target": "rpi4"},
]
RECIPE: dict[str, Any] = {
    "name": "prune_kd",
    "description": "Train a small residual network, cut its channels with the dense one as teacher, make it int8.",
    "seed": 0,
    "data": {"name": "digits", "val_fraction": 0.15},
    "model": {"name": "resnet20", "arguments": {}},
    "stages": [{"kind": "train", "id": "dense", "epochs": 30}, {"kind": "prune", "id": "pruned", "channel_ratio": 0.5}],
    "gates": {"max_accuracy_drop": 0.02},
}
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "edgecompress_version": "0.1.0",
    "recipe_name": "prune_kd",
    "recipe": RECIPE,
    "recipe_source": "recipes/prune_kd.yaml",
    "overrides": ["stages.pruned.channel_ratio=0.5"],
    "targets": ["x86"],
    "command": "edgecompress run recipes/prune_kd.yaml --target x86 --set stages.pruned.channel_ratio=0.5",
    "seed": 0,
    "started_at": "2026-03-02T10:11:12Z",
    "finished_at": "2026-03-02T10:12:48Z",
    "status": "complete",
    "versions": {"torch": "2.14.1", "onnxruntime": "1.32.0", "torchao": "0.18.0"},
    "machine": {
        "cpu": "Example CPU @ 2.10GHz",
        "architecture": "x86_64",
        "isa": ["avx2", "avx512f", "avx512_vnni"],
        "cores": 2,
        "memory_bytes": 8_000_000_000,
        "governor": None,
        "frequency_mhz": {"current": 2100.0, "max": None},
    },
    "data": {
        "name": "digits",
        "splits": {"train": 1222, "val": 215, "test": 360},
        "num_classes": 10,
        "fingerprint": "9f2c41d7",
        "notes": ["The test split is small: one image is 0.28 points."],
    },
    "model": {
        "name": "resnet20",
        "weights": "trained",
        "preprocessing": {"input_size": 8, "mean": [0.31], "std": [0.37]},
    },
    "notes": [],
    "baseline": {"id": "dense", "accuracy": 0.9778, "accuracy_split": "test", "params": 272_474, "macs": 2_560_000},
    "stages": STAGES,
    "decisions": [
        {"what": "weight_bits", "value": 8, "why": "the machine has AVX-512 VNNI"},
        {"what": "placement", "value": {"float": []}, "why": "full int8 was fastest of 3: 0.079 ms"},
    ],
    "gates": GATES,
    "artifacts": {name: hashlib.sha256(content).hexdigest() for name, content in EXPORTED.items()},
}
MANIFEST["baseline"]["size_bytes"] = STAGES[0]["size_bytes"]
PARITY: dict[str, Any] = {
    "target": "x86",
    "samples": 360,
    "split": "test",
    "constant_predictions": False,
    "onnx_fp32": {"max_abs_diff": 2.4e-5, "max_relative_diff": 3.1e-6, "top1_agreement": 1.0, "passed": True},
    "onnx_int8": {
        "top1_agreement": 0.9944,
        "sqnr_db": 31.2,
        "accuracy_fp32": 0.9722,
        "accuracy_int8": 0.975,
        "torch_int8_top1_agreement": 1.0,
        "torch_int8_max_abs_diff": 0.09,
        "passed": True,
        "scheme": {"activations": "uint8", "weights": "int8", "weight_bits": 8},
    },
    "classes": [
        {"name": str(digit), "samples": 36, "accuracy_fp32": 0.9722, "accuracy_int8": 0.9722, "flips": 0}
        for digit in range(8)
    ]
    + [
        {"name": "8", "samples": 36, "accuracy_fp32": 0.9444, "accuracy_int8": 0.9166, "flips": 1},
        {"name": "9", "samples": 36, "accuracy_fp32": 0.9166, "accuracy_int8": 0.9722, "flips": 2},
    ],
    "failures": [],
}


def _model(p50: float, size: int, operators: dict[str, int]) -> dict[str, Any]:
    return {
        "latency_ms": {
            "p50": p50,
            "p90": p50 * 1.08,
            "p99": p50 * 1.3,
            "mean": p50 * 1.02,
            "p50_ci95": [p50 * 0.99, p50 * 1.01],
            "p90_ci95": [p50 * 1.06, p50 * 1.12],
        },
        "throughput_per_s": 1000 / p50,
        "size_bytes": size,
        "size_bytes_compressed": size * 3 // 4,
        "peak_rss_bytes": 61_300_000,
        "load_ms": 9.4,
        "first_inference_ms": 0.61,
        "macs": 812_000,
        "op_counts": operators,
        "float_islands_total": 1,
        "float_islands": [{"op_type": "Softmax", "names": ["/head/softmax"], "macs": 0}],
    }


PROFILE: dict[str, Any] = {
    "target": "x86",
    "measured": True,
    "not_measured_because": [],
    "device": {"summary": "Example CPU @ 2.10GHz, 2 cores, AVX-512 VNNI", "is_target": True},
    "models": {
        "fp32": _model(0.148, 338_120, {"Conv": 21, "Add": 9, "Gemm": 1}),
        "int8": _model(0.079, 112_480, {"QLinearConv": 21, "QLinearAdd": 9, "QGemm": 1, "QuantizeLinear": 1}),
    },
    "int8_speedup": {"ratio": 1.87, "ci95": [1.81, 1.93]},
    "int8_mac_coverage": 0.9987,
    "noise": {"reference_ms": 0.412, "reference_spread": 0.011, "steady_processes": 8, "processes": 8},
    "method": {"processes": 8, "windows_per_model": 96, "threads": 1, "batch": 1, "stopped_because": "narrow enough"},
    "notes": [],
    "budgets": [
        {"budget": "latency_ms_p90", "limit": 0.2, "value": 0.079 * 1.08, "status": "met"},
        {"budget": "size_bytes", "limit": 200_000, "value": 112_480, "status": "met"},
        {"budget": "min_int8_speedup", "limit": 1.0, "value": 1.87, "status": "met"},
    ],
    "verdict": "ship",
    "reasons": ["Latency (p90) of int8 is 0.0853 ms (95 % interval 0.0837 ms to 0.0885 ms); the target allows 0.2 ms."],
}


BASELINE_PROFILE: dict[str, Any] = {
    **PROFILE,
    "models": {"baseline": _model(0.461, 1_102_340, {"Conv": 21, "Add": 9, "Gemm": 1}), **PROFILE["models"]},
    "end_to_end_speedup": {"ratio": 5.83, "ci95": [5.71, 5.96]},
}


def make_run(
    path: Path,
    *,
    manifest: dict[str, Any] | None = None,
    parity: dict[str, Any] | None = PARITY,
    profile: dict[str, Any] | None = PROFILE,
) -> RunDirectory:
    """A run directory with these files; None leaves a file out."""
    run = RunDirectory(path)
    write_json(run.manifest_path, MANIFEST | (manifest or {}))
    for name, content in EXPORTED.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    if parity is not None:
        write_json(run.export / "parity.json", parity)
    if profile is not None:
        write_json(run.profile_path("x86"), profile)
    if "artifacts" not in (manifest or {}):
        run.update_manifest(lambda m: m.update(artifacts=run.artifacts()))
    return run


def hostile_run(path: Path) -> RunDirectory:
    parity, profile, manifest = copy.deepcopy(PARITY), copy.deepcopy(PROFILE), copy.deepcopy(MANIFEST)
    parity["classes"] = [
        {"name": name, "samples": 50, "accuracy_fp32": 0.9, "accuracy_int8": 0.5 + i / 100, "flips": 20}
        for i, name in enumerate(HOSTILE)
    ]
    evil = HOSTILE[0]
    manifest["recipe"]["description"] = evil
    manifest |= {"notes": list(HOSTILE), "command": evil, "overrides": [f"data.root={evil}"], "artifacts": {evil: evil}}
    manifest["decisions"] = [{"what": evil, "value": evil, "why": evil}]
    manifest["versions"] = {evil: evil}
    manifest["data"]["name"] = evil
    manifest["gates"].append({"gate": evil, "value": evil, "limit": evil, "passed": None})
    manifest["stages"][0] |= {"id": evil, "kind": evil, "summary": evil}
    profile["reasons"] = list(HOSTILE)
    profile["models"]["int8"]["op_counts"] = {evil: 1}
    profile["models"]["int8"]["float_islands"] = [{"op_type": evil, "names": [evil], evil: evil}]
    module = {"module": evil, "ms": 1.0, "share": 0.5, "operators": {evil: 1}, "modules": 1}
    profile["models"]["int8"]["modules"] = [module]
    profile["models"]["int8"]["float_islands"].append({"op_types": {evil: 1}, "nodes": [evil], "reason": evil})
    profile["budgets"] = [{"budget": evil, "limit": evil, "value": evil, "status": evil}]
    run = make_run(path)
    write_json(run.manifest_path, manifest)
    write_json(run.export / "parity.json", parity)
    write_json(run.profile_path("x86"), profile)
    return run


def full_run(path: Path, *, classes: int = 12, names: tuple[str, ...] = ()) -> RunDirectory:
    """A run in which everything was measured that a report can show, with `names` among its classes."""
    every = [*names, *(f"class {k}" for k in range(classes - len(names)))]
    parity, profile, manifest = copy.deepcopy(PARITY), copy.deepcopy(BASELINE_PROFILE), copy.deepcopy(MANIFEST)
    parity["classes"] = [
        {
            "name": name,
            "samples": 50,
            "accuracy_fp32": 0.9,
            "accuracy_int8": 0.9 - (len(every) - k) / 6000,
            "flips": k % 7,
        }
        for k, name in enumerate(every)
    ]
    bins = [{"confidence": k / 10 - 0.03, "accuracy": k / 10, "samples": 10 * k} for k in range(1, 11)]
    parity["calibration"] = {name: {"ece": 0.03, "mean_confidence": 0.9, "bins": bins} for name in ("fp32", "int8")}
    pairs = itertools.pairwise(every)
    parity["confusions"] = {
        "changed": len(every),
        "rows": [{"class": one, "answer": other, "fp32": 1, "int8": 4} for one, other in pairs][:20],
    }
    export, generator = path / "export", np.random.default_rng(0)
    (export / "flipped").mkdir(parents=True)
    parity["flipped"] = []
    for k in range(32):
        pixels = generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).quantize(64).save(export / "flipped" / f"{k}.png")
        flip = {
            "class": every[k // 4],
            "image": k,
            "file": None,
            "picture": f"flipped/{k}.png",
            "lost": True,
            "won": False,
        }
        answers = {"fp32": every[k // 4], "fp32_confidence": 0.9, "int8": every[k // 4 + 1], "int8_confidence": 0.5}
        parity["flipped"].append(flip | answers)
    for k, name in enumerate(("baseline", "fp32", "int8")):
        model = profile["models"][name]
        middle = model["latency_ms"]["p50"]
        model["latency_ms_quantiles"] = {str(q): middle * (1 + q / 4) for q in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)}
        model |= {"weights_bytes": 90_000, "model_rss_bytes": 17_000_000 + k, "peak_rss_bytes_range": [6e7, 6.2e7]}
    profile["models"]["int8"]["operators"] = [
        {"operator": f"QLinear{k}", "count": k + 1, "ms": 0.05 / (k + 1), "share": 0.4 / (k + 1)} for k in range(12)
    ]
    rows = {"latency_ms_p50": 0.08, "throughput_per_s": 12_000.0}
    profile["scaling"] = {
        name: {
            "threads": [
                rows | {"threads": t, "speedup": t**0.8, "speedup_ci95": [t**0.75, t**0.85], "efficiency": t**-0.2}
                for t in (1, 2, 4)
            ],
            "batch": [rows | {"batch": b, "gain": b**0.2, "gain_ci95": [b**0.15, b**0.25]} for b in (1, 2, 4, 8)],
        }
        for name in ("fp32", "int8")
    }
    peak = {"float_gmacs_per_s": 95.0, "int8_gmacs_per_s": 1240.0, "memory_gb_per_s": 24.6}
    share = {"gmacs_per_s": 10.3, "share_of_peak": 0.0083, "share_of_convolution_peak": 0.027, "threads": 1}
    profile["roofline"] = {"threads": {"1": peak}, "models": {"fp32": share, "int8": share | {"gmacs_per_s": 40.0}}}
    for stage in manifest["stages"]:
        stage["ece"] = 0.02
    run = make_run(path, manifest=manifest, parity=parity, profile=profile)
    layers = [{"layer": f"layer{k}.conv", "alone_sqnr_db": 30.0 + k, "gain_db": 0.1 * k} for k in range(30)]
    write_json(run.stage("int8") / "sensitivity.json", {"layers": layers, "full": {"sqnr_db": 28.0}})
    trials = [
        {"id": name, "latency_ms": 1.0 + k, "agreement": 0.95 + k / 100, "float_layers": ["a"] * k}
        for k, name in enumerate(("full", "first layer in float", "two layers in float"))
    ]
    write_json(run.stage("int8") / "placement.json", {"trials": trials, "choice": "full"})
    for stage in ("dense", "pruned"):
        for epoch in range(1, 31):
            run.append_metrics({"stage": stage, "epoch": epoch, "loss": 1 / epoch, "val_accuracy": 1 - 0.5 / epoch})
    return run
