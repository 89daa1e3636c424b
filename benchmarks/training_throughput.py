"""Training throughput: the package's loop with `precision: auto` against a plain fp32 loop, side by side.

    python benchmarks/training_throughput.py --set data.name=fashion_mnist --samples 20000 --epochs 3

The plain loop is what one writes first: fp32, the default memory layout, images as float tensors, shuffled, SGD with
the same schedule. Both train the same initial weights on the same images, one epoch in turn, so that drift of the
machine hits both. Printed: the images per second of each epoch, the median of their ratio, the val accuracy of both.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.data.run_data import PreparedSplit, open_data
from edgecompress.machine import describe_machine, summarize_machine, versions
from edgecompress.models.model_building import create_model
from edgecompress.settings.configuration import apply_overrides, validate
from edgecompress.settings.recipe import DataSettings, ModelSettings
from edgecompress.settings.training_settings import TrainingSettings
from edgecompress.training.distill import label_loss
from edgecompress.training.evaluate import accuracy, collect_logits
from edgecompress.training.optimization import cosine_with_warmup
from edgecompress.training.precision import resolve_precision
from edgecompress.training.training_loop import EpochRecord, fit


def plain_epochs(
    module: nn.Module, train: PreparedSplit, preprocessing: Preprocessing, settings: TrainingSettings
) -> Iterator[float]:
    """Train in fp32 and yield the seconds of each epoch."""
    steps = -(-len(train) // settings.batch_size)
    optimizer = torch.optim.SGD(
        module.parameters(),
        settings.learning_rate,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, cosine_with_warmup(steps, settings.epochs, settings.warmup_epochs)
    )
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        module.train()
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for images, labels in train.batches(settings.batch_size, indices=order):
            loss = functional.cross_entropy(module(preprocessing.normalize(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20"])
    parser.add_argument("--size", type=int, help="input side in pixels; left out, the data's own")
    parser.add_argument("--samples", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    document = apply_overrides({"data": {"name": "fashion_mnist"}}, arguments.overrides)["data"]
    data = open_data(validate(DataSettings, document | {"max_train_samples": arguments.samples}, source="--set"))
    settings = TrainingSettings(epochs=arguments.epochs, learning_rate=0.1, batch_size=128, warmup_epochs=0.5)
    console = Console(width=140)
    for name in arguments.models:
        torch.manual_seed(0)
        override = {"input_size": arguments.size} if arguments.size else {}
        created = create_model(ModelSettings.model_validate({"name": name, "preprocessing": override}), data)
        preprocessing = created.architecture.preprocessing
        train, val = (data.splits[split].prepare(preprocessing, cache=True) for split in ("train", "val"))
        plain = copy.deepcopy(created.module)
        turns = plain_epochs(plain, train, preprocessing, settings)
        seconds: list[float] = []
        records: list[EpochRecord] = []

        def in_turn(
            record: EpochRecord,
            records: list[EpochRecord] = records,
            seconds: list[float] = seconds,
            turns: Iterator[float] = turns,
        ) -> None:
            records.append(record)
            seconds.append(next(turns))

        precision = resolve_precision("auto", created.module)
        fit(
            created.module,
            settings=settings,
            epochs=settings.epochs,
            loss=label_loss(),
            train=train,
            val=val,
            preprocessing=preprocessing,
            precision="auto",
            seed=0,
            description=name,
            on_epoch=in_turn,
        )
        ours = np.array([record.images_per_second for record in records])
        theirs = len(train) / np.array(seconds)
        accuracies = [
            accuracy(collect_logits(m.eval(), val, preprocessing), val.labels) for m in (created.module, plain)
        ]
        console.print(
            f"{name}: precision auto is {'fp32' if precision == 'no' else precision}; img/s of each epoch: "
            f"{', '.join(f'{value:.0f}' for value in ours)} against {', '.join(f'{value:.0f}' for value in theirs)}; "
            f"ratio {np.median(ours / theirs):.2f}; val accuracy {accuracies[0]:.2%} against {accuracies[1]:.2%}"
        )
    console.print(f"machine: {summarize_machine(describe_machine())}; versions: {versions()}")


if __name__ == "__main__":
    main()
