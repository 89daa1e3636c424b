"""A model, images to calibrate it with, and images of that source and of another to judge int8 by.

What enters: the command line's model, checkpoint and folders. What leaves: calibration batches, and for any other model
how it agrees with the float one on both sources.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgecompress.data.run_data import PreparedSplit, calibration_indices, open_data
from edgecompress.exporting.parity import sqnr_db, top1_agreement
from edgecompress.int8.post_training import quantize
from edgecompress.int8.scheme import resolve_scheme
from edgecompress.models.checkpoint import example_input
from edgecompress.models.model_building import create_model
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import DataSettings, QuantizeStage
from edgecompress.settings.target import load_target

BATCH = 16


def add_arguments(parser: argparse.ArgumentParser, *, samples: int) -> None:
    """What TwoSources reads; `samples` calibration images unless told."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="image folders of calibration and evaluation")
    parser.add_argument("--class-index", type=Path)
    parser.add_argument("--other-data", type=Path, required=True, help="image folders of another source")
    parser.add_argument("--samples", type=int, default=samples, help="calibration images")
    parser.add_argument("--images", type=int, default=500, help="of each source, to judge by")
    parser.add_argument("--target", default="x86", help="decides the int8 scheme; x86-avx2: 7-bit weights")


class TwoSources:
    """The float model `module` (in eval mode), and how others compare with it on its own source and on another."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        data = open_data(DataSettings(name="image_folder", root=arguments.data, class_index=arguments.class_index))
        other_data = open_data(DataSettings(name="image_folder", root=arguments.other_data))
        torch.manual_seed(0)
        created = create_model(ModelSettings(name=arguments.model, checkpoint=arguments.checkpoint), data)
        self.module: nn.Module = created.module.eval()
        self.preprocessing = created.architecture.preprocessing
        self.example = example_input(created.architecture)
        self._train = data.splits["train"].prepare(self.preprocessing, cache=False)
        self._samples = arguments.samples
        self._target = load_target(arguments.target)
        self._sources = [
            _drawn(found.splits[found.report_split].prepare(self.preprocessing, cache=False), arguments.images)
            for found in (data, other_data)
        ]
        self._wanted = [self._logits(self.module, images) for images in self._sources]

    def calibration(self, seed: int = 0) -> Tensor:
        """Normalized calibration images [N, C, H, W]."""
        chosen = calibration_indices(self._train.labels.numpy(), self._samples, seed)
        return self.preprocessing.normalize(_pixels(self._train, np.asarray(chosen)))

    def int8(self, module: nn.Module, effort: str, calibration: Tensor) -> GraphModule:
        """`module` in full int8 as the target has it."""
        stage = QuantizeStage.model_validate({"kind": "quantize", "id": "int8", "effort": effort, "placement": "full"})
        scheme, _ = resolve_scheme(stage, self._target)
        return quantize(
            module,
            stage=stage,
            scheme=scheme,
            calibration=lambda: iter(torch.split(calibration, BATCH)),
            batches=-(-len(calibration) // BATCH),
            example=self.example,
        ).simulation()

    def compare(self, model: Callable[[Tensor], Tensor]) -> list[tuple[float, float]]:
        """Agreement with the float model and SQNR of its logits in dB, on the own source and on the other."""
        found = [
            (wanted, self._logits(model, images)) for images, wanted in zip(self._sources, self._wanted, strict=True)
        ]
        return [(top1_agreement(wanted, got), sqnr_db(wanted, got)) for wanted, got in found]

    @torch.inference_mode()
    def _logits(self, model: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
        batches = torch.split(images, BATCH)
        return np.concatenate([model(self.preprocessing.normalize(batch)).numpy() for batch in batches])


def _pixels(split: PreparedSplit, indices: np.ndarray) -> Tensor:
    return torch.cat([batch for batch, _ in split.batches(BATCH, indices=torch.from_numpy(np.sort(indices)))])


def _drawn(split: PreparedSplit, count: int) -> Tensor:
    return _pixels(split, np.random.default_rng(0).permutation(len(split))[:count])
