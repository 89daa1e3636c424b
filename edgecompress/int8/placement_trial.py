"""One placement judged and measured: accuracy on held-out images with intervals, latency against fp32.

What enters: logits or a model, held-out images (val, never test), files and a target. What leaves: plain facts, which
placement.json and run.json keep. The model that leaves the quantize stage is judged here as the search's trials were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecompress.exporting.onnx_export import Provenance, export_onnx
from edgecompress.int8.conv_kernels import use_matrix_products
from edgecompress.int8.mixed import agreement, decibels, noise
from edgecompress.int8.quantized_model import QuantizedModel
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.profiling import not_at_hand
from edgecompress.models.checkpoint import Checkpoint, example_input
from edgecompress.run_directory import Json
from edgecompress.settings.target import Target
from edgecompress.training.evaluate import accuracy, paired_drop_interval, wilson_interval

BATCH = 32
# Five processes end within this time on a quiet machine; a busy one gets more of them.
_QUICK_SECONDS = 6.0
_QUICK_NARROW = 0.04


@dataclass(frozen=True)
class HeldOut:
    """Normalized images [N, C, H, W] with their labels [N], and whether the baseline is right on each, bool [N]."""

    images: Tensor
    labels: Tensor
    baseline_right: Tensor

    @property
    def baseline_accuracy(self) -> float:
        """The fraction of these images that the baseline gets right."""
        return float(self.baseline_right.double().mean())


def run_in_batches(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits [N, classes] of normalized images [N, C, H, W]."""
    with torch.inference_mode():
        return torch.cat([model(batch).float() for batch in torch.split(images, BATCH)])


def judged(reference: Tensor, logits: Tensor, held_out: HeldOut) -> Json:
    """How close logits are to the float model's, and how accurate against the baseline, with 95 % intervals."""
    found, agrees = accuracy(logits, held_out.labels), agreement(reference, logits)
    right = logits.argmax(dim=1) == held_out.labels
    return {
        "agreement": agrees,
        "agreement_ci95": list(wilson_interval(agrees, len(logits))),
        "sqnr_db": decibels(noise(reference, logits)),
        "accuracy": found,
        "accuracy_drop": held_out.baseline_accuracy - found,
        "accuracy_drop_ci95": list(paired_drop_interval(held_out.baseline_right, right)),
    }


def timed(fp32: Path, int8: Path, target: Target) -> Json:
    """Latency of both files side by side; every value None where the target is not at hand. Raises ProfileError."""
    if not_at_hand(target):
        return {"speedup": None, "speedup_ci95": None, "latency_ms": None}
    measured = measure_latency(
        {"fp32": fp32, "int8": int8},
        seconds=_QUICK_SECONDS,
        narrow_enough=_QUICK_NARROW,
        threads=target.threads,
        providers=target.providers,
        input_npy=None,
        session=target.session_settings(),
    )
    ratio = measured.ratio("fp32", "int8")
    return {
        "speedup": ratio.ratio,
        "speedup_ci95": [ratio.low, ratio.high],
        "latency_ms": measured.percentile("int8", 50).value,
        "fp32_latency_ms": measured.percentile("fp32", 50).value,
    }


def write_for_timing(module: nn.Module, source: Checkpoint, path: Path, target: Target) -> Path:
    """Export a model only to be timed; returns `path`. Raises ExportError."""
    architecture = source.architecture
    export_onnx(
        module,
        example_input(architecture),
        path,
        target=target,
        preprocessing=architecture.preprocessing,
        provenance=Provenance((), "", "", {}),
        extra_metadata={},
    )
    return path


def measured_again(
    model: QuantizedModel, source: Checkpoint, held_out: HeldOut, target: Target, matrix_products: Collection[str]
) -> Json:
    """The finished int8 model on the same images and the same clock as the search's trials, and with the same kernels:
    `matrix_products` names the convolutions that run as such (`edgecompress.int8.conv_kernels`).

    A trial's own numbers flatter it: the best of several was chosen by them, and it was quantized in haste. Raises
    ExportError or ProfileError.
    """
    reference = run_in_batches(source.module.eval(), held_out.images)
    facts = judged(reference, run_in_batches(model.simulation(), held_out.images), held_out)
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
        int8 = write_for_timing(model.graph, source, Path(scratch) / "int8.onnx", target)
        use_matrix_products(int8, matrix_products)
        fp32 = write_for_timing(source.module, source, Path(scratch) / "fp32.onnx", target)
        return facts | {"size_bytes": int8.stat().st_size} | timed(fp32, int8, target)
