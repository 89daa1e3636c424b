"""Turn a trained PyTorch image classifier into a small, fast artifact for an edge device, with proof."""

from __future__ import annotations

__all__ = ["__version__"]

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: importlib.metadata costs a quarter of what `--help` takes."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edgecompress")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"
