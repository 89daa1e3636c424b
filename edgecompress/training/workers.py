"""Training processes that share the work: which images are mine, and what did all of us find.

What enters: an Accelerator, which knows how many processes there are. What leaves: shares of a batch and gathered
results. With one process everything is the identity. Started by `accelerate launch`; the first process alone writes
the run, the others work in a folder of their own that goes when they end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Which of the launched processes this is; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect() -> None:
    """Join the other processes, once. Without a GPU they talk by gloo; one may be long alone with evaluating."""
    if world_size() > 1 and not PartialState._shared_state:
        PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def wait_for_everyone() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        connect()
        PartialState().wait_for_everyone()


def agreed(make: Callable[[], T]) -> T:
    """What the first process makes, in every process: what is measured differs from one to the next."""
    if world_size() == 1:
        return make()
    connect()
    made: list[Any] = [make() if rank() == 0 else None]
    broadcast_object_list(made, from_process=0)
    value: T = made[0]
    return value


class Workers:
    """The processes of one fit. `shared` False makes a process work by itself, whoever was launched beside it."""

    def __init__(self, accelerator: Accelerator, *, shared: bool = True) -> None:
        self.accelerator = accelerator
        self.count = int(accelerator.num_processes) if shared else 1
        self.index = int(accelerator.process_index) if shared else 0

    def share(self, positions: Tensor) -> Tensor:
        """This process's part of `positions` [n]; where there are fewer than processes, some get the first one."""
        if self.count == 1:
            return positions
        own = positions[self.index :: self.count]
        return own if len(own) else positions[:1]

    def weight(self, positions: Tensor) -> float:
        """What this process's mean loss counts for, so that the mean over processes is the mean over all images."""
        if self.count == 1:
            return 1.0
        own = len(positions[self.index :: self.count])
        return own * self.count / len(positions)

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """Rows [total, K] in their order, from each process's share of them."""
        if self.count == 1:
            return rows
        most = -(-total // self.count)
        padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype)
        padded[: len(rows)] = rows
        gathered: Tensor = self.accelerator.gather(padded.to(self.accelerator.device)).cpu()
        # Process r holds rows r, r + count, ...: interleave them, and drop what was padded.
        return gathered.view(self.count, most, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)[:total]

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes."""
        if self.count == 1:
            return float(value)
        return float(self.accelerator.reduce(value.detach().clone(), reduction="mean"))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), reduction="sum")
        return float(total) > 0
