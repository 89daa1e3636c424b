"""The one training loop: train, distill and finetune all run through it.

What enters: a module, a loss, prepared splits and settings. What leaves: the module with trained weights and a
`FitResult`. Images stay uint8 until they are on the device and are augmented as whole batches, so that two
cores spend their time on the model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from edgecompress import console
from edgecompress.data import PreparedSplit
from edgecompress.distill import LossFunction
from edgecompress.errors import TrainingError
from edgecompress.evaluate import accuracy, collect_logits
from edgecompress.machine import isa_features
from edgecompress.preprocessing import Preprocessing
from edgecompress.recipe import AugmentSettings, TrainingSettings

MixedPrecision = Literal["no", "bf16", "fp16"]
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class EpochRecord:
    """One line of metrics.jsonl. `epoch` counts from 1; loss is the mean over the epoch's batches."""

    epoch: int
    loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class FitResult:
    """How a fit went; `kept_epoch` is the epoch whose weights the module holds now."""

    epochs: tuple[EpochRecord, ...]
    kept_epoch: int
    mixed_precision: MixedPrecision

    @property
    def val_accuracy(self) -> float:
        return self.epochs[self.kept_epoch - 1].val_accuracy


def resolve_precision(precision: str) -> MixedPrecision:
    """`auto` is bf16 where the hardware computes in it, fp16 on older GPUs, and plain fp32 elsewhere."""
    if precision != "auto":
        names: dict[str, MixedPrecision] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
        return names[precision]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if _BF16_FEATURES & set(isa_features() or ()) else "no"


def make_accelerator(precision: str) -> Accelerator:
    """An Accelerator for this precision. Its state is shared by the process, so a change of precision resets it."""
    mixed = resolve_precision(precision)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed)


def fit(
    module: nn.Module,
    *,
    settings: TrainingSettings,
    epochs: int,
    loss: LossFunction,
    train: PreparedSplit,
    val: PreparedSplit,
    preprocessing: Preprocessing,
    precision: str,
    seed: int,
    description: str,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    after_step: Callable[[], None] = lambda: None,
    layout_of: nn.Module | None = None,
) -> FitResult:
    """Train `module` in place for `epochs` epochs and leave it on the CPU in eval mode.

    `after_step` runs after every optimizer step (a pruning mask is put back there). `layout_of` is the module that
    decides the memory layout, where `module` is a graph that has lost its layers. Raises TrainingError when the loss
    is not finite.
    """
    accelerator = make_accelerator(precision)
    steps_per_epoch = max(1, math.ceil(len(train) / settings.batch_size))
    optimizer = _optimizer(module, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _cosine_with_warmup(steps_per_epoch, epochs, settings.warmup_epochs)
    )
    memory_format = _memory_format(layout_of or module, accelerator.mixed_precision)
    model, prepared_optimizer = accelerator.prepare(module.to(memory_format=memory_format), optimizer)
    records: list[EpochRecord] = []
    best: dict[str, Tensor] | None = None
    best_epoch = epochs
    with console.progress(description, epochs * steps_per_epoch) as advance:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            model.train()
            total = torch.zeros((), device=accelerator.device)
            for images, labels in _shuffled(train, settings.batch_size, seed=seed, epoch=epoch):
                generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
                augmented = augment(images, settings.augment, generator)
                batch = preprocessing.normalize(augmented.to(accelerator.device))
                batch = batch.contiguous(memory_format=memory_format)
                with accelerator.autocast():
                    logits = model(batch)
                    value = loss(batch, logits, labels.to(accelerator.device))
                prepared_optimizer.zero_grad()
                accelerator.backward(value)
                if settings.gradient_clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), settings.gradient_clip_norm)
                prepared_optimizer.step()
                scheduler.step()
                after_step()
                total += value.detach()
                advance()
            mean_loss = float(total) / steps_per_epoch
            if not math.isfinite(mean_loss):
                raise TrainingError(
                    f"{description}: the loss is not finite in epoch {epoch}; lower learning_rate "
                    f"({settings.learning_rate:g}), or set gradient_clip_norm: 1.0"
                )
            seconds = time.perf_counter() - started
            with accelerator.autocast():
                val_logits = collect_logits(model, val, preprocessing)
            record = EpochRecord(
                epoch=epoch,
                loss=mean_loss,
                val_accuracy=accuracy(val_logits, val.labels),
                learning_rate=float(scheduler.get_last_lr()[0]),
                seconds=seconds,
                images_per_second=len(train) / seconds,
            )
            records.append(record)
            on_epoch(record)
            status = f"val {record.val_accuracy:.1%}, loss {record.loss:.3f}, {record.images_per_second:.0f} img/s"
            advance(0, status=status)
            if settings.keep == "best_val" and record.val_accuracy >= max(r.val_accuracy for r in records):
                best, best_epoch = copy.deepcopy(accelerator.unwrap_model(model).state_dict()), epoch
    if best is not None:
        module.load_state_dict(best)
    module.to("cpu").eval()
    return FitResult(tuple(records), best_epoch, resolve_precision(precision))


def _memory_format(module: nn.Module, mixed_precision: str) -> torch.memory_format:
    """channels_last where it makes training faster: under mixed precision (twofold), and for depthwise convolutions.

    In fp32 a network without depthwise convolutions gains nothing from it on CPUs, and torch 2.14's backward pass of a
    strided 1x1 convolution with 2 to 7 input channels corrupts memory in it (seen with AVX2); MobileNetV3-small trains
    2.8 times as fast.
    """
    if mixed_precision != "no":
        return torch.channels_last
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    is_unsafe = any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 8 for c in convolutions)
    has_depthwise = any(c.groups == c.in_channels > 1 for c in convolutions)
    return torch.channels_last if has_depthwise and not is_unsafe else torch.contiguous_format


def _optimizer(module: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    # Weight decay on batch-norm scales and biases hurts small nets (He et al., 2019, "Bag of Tricks", section 3.1).
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def _cosine_with_warmup(steps_per_epoch: int, epochs: int, warmup_epochs: float) -> Callable[[int], float]:
    total = steps_per_epoch * epochs
    warmup = min(round(steps_per_epoch * warmup_epochs), total - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def _shuffled(split: PreparedSplit, batch_size: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in an order drawn from (seed, epoch) alone, so that any epoch can be repeated."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    torch.manual_seed(seed * 1_000_003 + epoch)
    yield from split.batches(batch_size, indices=torch.randperm(len(split), generator=generator))


def augment(images: Tensor, settings: AugmentSettings, generator: torch.Generator) -> Tensor:
    """Shift (zero padding) and flip each image of a uint8 batch [N, C, H, W] on its own."""
    count, _, height, width = images.shape
    if settings.shift_pixels:
        reach = settings.shift_pixels
        padded = nn.functional.pad(images, (reach, reach, reach, reach))
        top = torch.randint(0, 2 * reach + 1, (count,), generator=generator)
        left = torch.randint(0, 2 * reach + 1, (count,), generator=generator)
        rows = (top[:, None] + torch.arange(height))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, None, :]
        batch = torch.arange(count)[:, None, None, None]
        channels = torch.arange(images.shape[1])[None, :, None, None]
        images = padded[batch, channels, rows, columns]
    if settings.horizontal_flip:
        flip = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images
