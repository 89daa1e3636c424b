"""Turn a trained PyTorch image classifier into a small, fast artifact for an edge device, with proof."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("edgecompress")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
