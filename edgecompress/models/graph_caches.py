"""Graphs that only caches of the libraries still hold, let go of, so that a process of many commands does not grow.

torch.ao and torchao each remember the device of every module that was prepared or converted, and with it the module and
its weights, for as long as the process lives. torch's shape environments are remembered by their own methods' caches,
and hold the fake tensors of the graph, which hold them: a circle through C++ that no garbage collector sees. torch.fx
keeps the source of every forward function that it ever wrote, for tracebacks: dozens for each capture.
"""

from __future__ import annotations

import gc
import linecache

import torchao.utils
from torch.ao.quantization.fx import utils as fx_utils
from torch.fx import graph_module
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
    _forget_sources()


def _forget_sources() -> None:
    """The sources of functions that torch.fx wrote. A graph keeps its own code; a traceback shows these lines empty."""
    getattr(getattr(graph_module, "_loader", None), "eval_cache", {}).clear()
    for name in [name for name in linecache.cache if name.startswith("<eval_with_key>")]:
        del linecache.cache[name]
