"""The one training loop: train, distill and finetune all run through it.

What enters: a module, a loss, prepared splits and settings. What leaves: the module with trained weights and a
`FitResult`. Images stay uint8 until they are on the device and are augmented as whole batches, so that two
cores spend their time on the model. Order, augmentation and dropout of a step are drawn from (seed, epoch, step), so a
fit that was stopped goes on exactly; several processes share each batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edgecompress import console
from edgecompress.data.augmentation import augment, mix
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit
from edgecompress.errors import EvaluationError, TrainingError
from edgecompress.models.finiteness import non_finite_tensor
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.training.distill import LossFunction, TrainingBatch
from edgecompress.training.evaluate import accuracy, collect_logits
from edgecompress.training.interrupts import deferred_interrupt
from edgecompress.training.optimization import cosine_with_warmup, make_average, make_optimizer
from edgecompress.training.precision import MixedPrecision, fastest_layout, make_accelerator, resolve_precision
from edgecompress.training.training_state import PhaseState, State
from edgecompress.training.workers import Workers

_SECONDS_BETWEEN_SAVES = 30.0


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
    state: PhaseState | None = None,
    shared: bool = True,
) -> FitResult:
    """Train `module` in place for `epochs` epochs and leave it on the CPU in eval mode.

    `after_step` runs after every optimizer step (a pruning mask is put back there). `layout_of` is the module that
    decides the memory layout, where `module` is a graph that has lost its layers. With `state`, what was done is saved
    now and then and at Ctrl-C, and a fit that finds such a state goes on from it; `on_epoch` is called again for its
    epochs. `shared` False keeps other processes out of it. Raises TrainingError when the loss is not finite.
    """
    fitting = _Fit(
        module,
        settings=settings,
        epochs=epochs,
        loss=loss,
        train=train,
        val=val,
        preprocessing=preprocessing,
        precision=precision,
        seed=seed,
        description=description,
        layout_of=layout_of or module,
        state=state,
        shared=shared,
    )
    return fitting.run(on_epoch, after_step)


class _Step(nn.Module):
    """One forward pass to the loss, and in it whatever learns beside the module (a loss's adapters)."""

    def __init__(self, module: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.module = module
        self.loss = loss  # a part of this module where it is one itself

    def forward(self, batch: TrainingBatch) -> Tensor:
        return self.loss(batch, self.module(batch.images))


class _Fit:
    """A fit in progress: everything that changes from step to step, and how to save and load it."""

    def __init__(
        self,
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
        layout_of: nn.Module,
        state: PhaseState | None,
        shared: bool,
    ) -> None:
        self.module, self.settings, self.epochs = module, settings, epochs
        self.train, self.val, self.preprocessing = train, val, preprocessing
        self.seed, self.description, self.state = seed, description, state
        self.precision = resolve_precision(precision, layout_of)
        self.accelerator = make_accelerator(self.precision)
        self.workers = Workers(self.accelerator, shared=shared)
        self.steps_per_epoch = max(1, math.ceil(len(train) / settings.batch_size))
        self.memory_format = fastest_layout(layout_of, self.precision)
        module.to(self.accelerator.device).to(memory_format=self.memory_format)
        self.step_module = _Step(module, loss).to(self.accelerator.device)
        optimizer = make_optimizer(self.step_module.parameters(), settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, cosine_with_warmup(self.steps_per_epoch, epochs, settings.warmup_epochs)
        )
        # The step and not the module is prepared: accelerate's autocast stays in the forward of what it prepares.
        self.forward: nn.Module = self.accelerator.prepare_model(self.step_module, evaluation_mode=not shared)
        self.optimizer: Any = self.accelerator.prepare_optimizer(optimizer)
        self.average: AveragedModel | None = make_average(module, settings.ema_decay) if settings.ema_decay else None
        self.classes: int | None = None
        self.epoch, self.step = 1, 0  # the epoch in hand, and its steps that are done
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.seconds = 0.0  # spent on the epoch in hand
        self.records: list[EpochRecord] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.finished = False
        self.saved_at = time.monotonic()

    # ---- the loop

    def run(self, on_epoch: Callable[[EpochRecord], None], after_step: Callable[[], None]) -> FitResult:
        self._load()
        for record in self.records:
            on_epoch(record)
        total = self.epochs * self.steps_per_epoch
        with deferred_interrupt() as interrupt, console.progress(self.description, total) as advance:
            if self.records:
                advance((self.epoch - 1) * self.steps_per_epoch + self.step, self._status())
            while not self.finished:
                for batch, weight in self._batches():
                    started = time.perf_counter()
                    self._train_step(batch, weight)
                    after_step()
                    if self.average is not None:
                        self.average.update_parameters(self.module)
                    self.step += 1
                    self.seconds += time.perf_counter() - started
                    advance()
                    stop = self.workers.any(interrupt.requested)
                    if stop or time.monotonic() - self.saved_at > _SECONDS_BETWEEN_SAVES:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt
                record = self._end_epoch()
                self._save()
                on_epoch(record)
                advance(0, self._status())
            if self.workers.any(interrupt.requested):  # in the last moments: what follows must not begin
                raise KeyboardInterrupt
        # In the plain layout, as a stage read from disk is: the last bits of what follows depend on it.
        self.module.to("cpu").to(memory_format=torch.contiguous_format).eval()
        return FitResult(tuple(self.records), self.best_epoch or len(self.records), self.precision)

    def _batches(self) -> Iterator[tuple[TrainingBatch, float]]:
        """What is left of the epoch in hand, and what this process's part of each batch counts for."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.train), generator=generator)
        chosen = list(torch.split(order, self.settings.batch_size))[self.step :]
        shares = [self.workers.share(positions) for positions in chosen]
        self.forward.train()
        device = self.accelerator.device
        batches = self.train.batches_of(shares)
        for number, (whole, share) in enumerate(zip(chosen, shares, strict=True), start=self.step):
            started = time.perf_counter()
            images, labels = next(batches)
            # All that is random from here to the optimizer's step, dropout included, is this step's own.
            torch.manual_seed(self._step_seed(number))
            augmented = augment(images, self.settings.augment)
            normalized = self.preprocessing.normalize(augmented.to(device))
            mixed, targets = mix(
                normalized, labels.to(device), self.settings.augment, partial(self._classes, normalized)
            )
            batch = TrainingBatch(
                mixed.contiguous(memory_format=self.memory_format),
                targets,
                None if self.settings.augment.mixes else share,
            )
            self.seconds += time.perf_counter() - started
            yield batch, self.workers.weight(whole)

    def _step_seed(self, step: int) -> int:
        numbers = (self.seed, self.epoch, step, self.workers.index)
        return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1

    def _classes(self, images: Tensor) -> int:
        """How many classes the module tells apart: it may know more than the data holds."""
        if self.classes is None:
            with torch.no_grad():
                self.classes = int(self.module.eval()(images[:1]).shape[1])
            self.forward.train()
        return self.classes

    def _train_step(self, batch: TrainingBatch, weight: float) -> None:
        with self.accelerator.autocast():
            value = self.forward(batch) * weight
        self.optimizer.zero_grad()
        self.accelerator.backward(value)
        if self.settings.gradient_clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.step_module.parameters(), self.settings.gradient_clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.loss_sum += value.detach()

    def _end_epoch(self) -> EpochRecord:
        mean_loss = self.workers.mean(self.loss_sum) / self.steps_per_epoch
        if not math.isfinite(mean_loss):
            raise TrainingError(
                f"{self.description}: the loss is not finite in epoch {self.epoch}{self._where()}; lower learning_rate "
                f"({self.settings.learning_rate:g}), or set gradient_clip_norm: 1.0"
            )
        record = EpochRecord(
            epoch=self.epoch,
            loss=mean_loss,
            val_accuracy=self._val_accuracy(),
            learning_rate=float(self.scheduler.get_last_lr()[0]),
            seconds=self.seconds,
            images_per_second=len(self.train) / self.seconds,
        )
        self.records.append(record)
        if self.settings.keep == "best_val" and record.val_accuracy >= max(r.val_accuracy for r in self.records):
            self.best, self.best_epoch = copy.deepcopy(self._judged.state_dict()), self.epoch
        patience = self.settings.early_stop_epochs
        accuracies = [r.val_accuracy for r in self.records]
        since_better = self.epoch - (accuracies.index(max(accuracies)) + 1)
        is_stuck = patience is not None and since_better >= patience
        if self.epoch == self.epochs or is_stuck:
            self.module.load_state_dict(self._judged.state_dict() if self.best is None else self.best)
            self.finished = True
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.loss_sum.zero_()
        return record

    def _where(self) -> str:
        """The first weight that is not finite by now, in words."""
        wrong = non_finite_tensor(self.step_module.state_dict())
        return f", and '{wrong}' holds NaN or infinity" if wrong is not None else ""

    @property
    def _judged(self) -> nn.Module:
        """The module whose weights are evaluated and handed on: the average of them, where one is kept."""
        if self.average is None:
            return self.module
        averaged: nn.Module = self.average.module
        return averaged

    def _val_accuracy(self) -> float:
        positions = torch.arange(len(self.val))
        share = self.workers.share(positions)
        try:
            with self.accelerator.autocast():
                own = collect_logits(self._judged, self.val, self.preprocessing, indices=share)
        except EvaluationError as error:
            raise TrainingError(
                f"{self.description}: after epoch {self.epoch}{self._where()}: {error}; lower learning_rate "
                f"({self.settings.learning_rate:g}), or set gradient_clip_norm: 1.0"
            ) from error
        return accuracy(self.workers.gather_rows(own, len(self.val)), self.val.labels)

    def _status(self) -> str:
        record = self.records[-1]
        return f"val {record.val_accuracy:.1%}, loss {record.loss:.3f}, {record.images_per_second:.0f} img/s"

    # ---- on disk

    @property
    def _fingerprint(self) -> str:
        shapes = {name: list(tensor.shape) for name, tensor in self.step_module.state_dict().items()}
        settings = self.settings.model_dump(mode="json")
        facts = [settings, self.epochs, self.seed, self.precision, self.workers.count, len(self.train), shapes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.state is None or self.workers.index != 0:
            return
        scaler = self.accelerator.scaler
        document: State = {
            "step_module": self.step_module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "records": [asdict(record) for record in self.records],
            "finished": self.finished,
        }
        self.state.save(document, fingerprint=self._fingerprint)

    def _load(self) -> None:
        document = None if self.state is None else self.state.load(fingerprint=self._fingerprint)
        if document is None:
            return
        self.step_module.load_state_dict(document["step_module"])
        self.optimizer.load_state_dict(document["optimizer"])
        self.scheduler.load_state_dict(document["scheduler"])
        if self.accelerator.scaler is not None and document["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(document["scaler"])
        if self.average is not None:
            self.average.load_state_dict(document["average"])
        self.best, self.best_epoch = document["best"], document["best_epoch"]
        self.epoch, self.step, self.seconds = document["epoch"], document["step"], document["seconds"]
        self.loss_sum.copy_(document["loss_sum"])
        self.records = [EpochRecord(**record) for record in document["records"]]
        self.finished = document["finished"]
        done = "complete" if self.finished else f"going on in epoch {self.epoch} of {self.epochs}, step {self.step + 1}"
        console.note(f"{self.description}: {done} (as saved)")
