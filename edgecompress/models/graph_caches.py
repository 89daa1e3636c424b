"""Graphs that only caches of the libraries still hold, let go of, so that a process of many commands does not grow.

torch.ao and torchao each remember the device of every module that was prepared or converted, and with it the module and
its weights, for as long as the process lives. torch's shape environments are remembered by their own methods' caches,
and hold the fake tensors of the graph, which hold them: a circle through C++ that no garbage collector sees.
"""

from __future__ import annotations

import gc

import torchao.utils
from torch.ao.quantization.fx import utils as fx_utils
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def forget_graphs() -> None:
    """Empty the caches and open the circle. To be called where no graph is being captured."""
    caches = [getattr(fx_utils, "assert_and_get_unique_device", None)]
    caches += [getattr(torchao.utils, "_assert_and_get_unique_device", None), *vars(ShapeEnv).values()]
    for cache in caches:
        clear = getattr(cache, "cache_clear", None)
        if clear is not None:  # a version without such a cache keeps nothing
            clear()
    for found in gc.get_objects():
        if type(found) is ShapeEnv and found.tracked_fakes:
            found.tracked_fakes = []  # asked for while a graph is captured, to make its guards, and never after
