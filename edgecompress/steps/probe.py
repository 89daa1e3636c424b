"""A short probe of a recipe's models on this machine: how long an image takes, and what it needs, before a run starts.

What enters: a recipe and its data. What leaves: seconds an image in training and in a forward pass, parameters and
memory. A few batches are decoded and trained on a copy that is thrown away; nothing is written or downloaded.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from edgecompress.data.run_data import ImageData
from edgecompress.models.checkpoint import example_input
from edgecompress.models.model_building import create_model, published_new_head
from edgecompress.settings.model_settings import ModelSettings
from edgecompress.settings.recipe import Recipe
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.steps.run_state import require_trained_head
from edgecompress.training.distill import label_loss
from edgecompress.training.evaluate import collect_logits
from edgecompress.training.training_loop import fit

_SECONDS = 4.0  # about what one model is probed for
_BATCHES = 3
_TRAINING_PASSES = 3.0  # forward, and backward at twice its cost: only to choose the probe's own batch


@dataclass(frozen=True)
class ModelProbe:
    """What one model costs here. `train_seconds` and `forward_seconds` are of one image, decoded already."""

    train_seconds: float
    forward_seconds: float
    decode_seconds: float
    params: int
    classes: int
    image_bytes: int
    memory_bytes: int
    batch_size: int

    def memory_of(self, batch_size: int) -> int:
        """Peak of the process for another batch size, were what the batch needs proportional to it."""
        return int(self.memory_bytes * max(1.0, batch_size / self.batch_size))


def probe_model(model: ModelSettings, recipe: Recipe, data: ImageData, settings: TrainingSettings | None) -> ModelProbe:
    """Decode a few images of train, pass them through the model and, with `settings`, train on them.

    A checkpoint is loaded as the run would load it, so that a plan refuses what the run would refuse; in place of
    published weights, random ones cost the same and need no network. Raises ModelError.
    """
    created = create_model(model.model_copy(update={"pretrained": False}), data)
    require_trained_head(recipe, published_new_head(model, data) if model.pretrained else created.new_head, data)
    architecture, module = created.architecture, created.module
    preprocessing = architecture.preprocessing
    params = sum(tensor.numel() for tensor in module.parameters())
    forward = _forward_seconds(module.eval(), example_input(architecture))
    wanted = settings.batch_size if settings is not None else recipe.quantize_stage.calibration.batch_size
    fitting = int(_SECONDS / (2 * _BATCHES * _TRAINING_PASSES * forward))
    batch = max(2, min(wanted, fitting))
    train = data.splits["train"]
    chosen = np.linspace(0, len(train) - 1, min(len(train), batch * _BATCHES)).round().astype(np.int64)
    started = time.perf_counter()
    images = train.subset(np.unique(chosen)).prepare(preprocessing, cache=True)
    decode = (time.perf_counter() - started) / len(images)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    collect_logits(module, images, preprocessing, description="probing")
    forward = (time.perf_counter() - started) / len(images)
    training = 0.0
    if settings is not None:
        short = settings.model_copy(update={"batch_size": batch, "warmup_epochs": 0.0, "early_stop_epochs": None})
        result = fit(
            module,
            settings=short,
            epochs=2,  # the first one warms up
            loss=label_loss(),
            train=images,
            val=images,
            preprocessing=preprocessing,
            precision=recipe.precision,
            seed=recipe.seed,
            description=f"probing {model.name}",
        )
        training = 1.0 / max(result.epochs[-1].images_per_second, 1e-9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ModelProbe(
        train_seconds=training,
        forward_seconds=forward,
        decode_seconds=decode,
        params=params,
        classes=architecture.num_classes,
        image_bytes=preprocessing.channels * preprocessing.input_size**2,
        memory_bytes=max(before, peak),
        batch_size=batch,
    )


def _forward_seconds(module: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds an image, the faster of two passes, so that the probe's batch fits its time."""
    found = []
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            module(images)
            found.append((time.perf_counter() - started) / len(images))
    return max(min(found), 1e-6)
