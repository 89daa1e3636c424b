"""Graphs that only caches of the libraries still hold, let go of, so that a process of many commands grows less.

torch.ao and torchao each remember the device of every module that was prepared or converted, and with it the module and
its weights, for as long as the process lives.
"""

from __future__ import annotations

import torchao.utils
from torch.ao.quantization.fx import utils as fx_utils


def forget_graphs() -> None:
    """Empty the two caches; what is asked of them again is computed again."""
    for module, name in ((fx_utils, "assert_and_get_unique_device"), (torchao.utils, "_assert_and_get_unique_device")):
        clear = getattr(getattr(module, name, None), "cache_clear", None)
        if clear is not None:  # a version without such a cache keeps nothing
            clear()
