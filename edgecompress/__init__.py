"""Turn a trained PyTorch image classifier into a small, fast artifact for an edge device, with proof.

The functions of the Python API stand in edgecompress/api.py, their results in edgecompress/results.py and findings.py;
docs/python.md shows them. They are looked up when they are asked for, so that `import edgecompress` costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what typing's is, without the import
if TYPE_CHECKING:
    from edgecompress.api import (
        apply,
        bundle,
        compare,
        debug_int8,
        export,
        open_run,
        profile,
        report,
        run,
        search,
        sensitivity,
        verify,
    )
    from edgecompress.deploy.verify import Verification
    from edgecompress.errors import EdgeCompressError
    from edgecompress.findings import Int8Diagnosis, SearchResult, Sensitivity
    from edgecompress.results import (
        BundleResult,
        Comparison,
        Estimate,
        MeasuredModel,
        Parity,
        Profile,
        RunResult,
        StageResult,
    )

    __version__: str

__all__ = [
    "BundleResult",
    "Comparison",
    "EdgeCompressError",
    "Estimate",
    "Int8Diagnosis",
    "MeasuredModel",
    "Parity",
    "Profile",
    "RunResult",
    "SearchResult",
    "Sensitivity",
    "StageResult",
    "Verification",
    "__version__",
    "apply",
    "bundle",
    "compare",
    "debug_int8",
    "export",
    "open_run",
    "profile",
    "report",
    "run",
    "search",
    "sensitivity",
    "verify",
]

_HOMES = {"EdgeCompressError": "errors", "Verification": "deploy.verify"}
_RESULTS = {"BundleResult", "Comparison", "Estimate", "MeasuredModel", "Parity", "Profile", "RunResult", "StageResult"}
_FINDINGS = {"Int8Diagnosis", "SearchResult", "Sensitivity"}

if not TYPE_CHECKING:  # type checkers see the names above, and refuse others

    def __getattr__(name):
        """A name of `__all__`, from the module that it stands in."""
        if name == "__version__":
            return _version()
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        from edgecompress.console import library_logs_silenced

        home = "results" if name in _RESULTS else "findings" if name in _FINDINGS else _HOMES.get(name, "api")
        with library_logs_silenced():
            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Looked up when asked for: importlib.metadata costs a quarter of what `--help` takes."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("edgecompress")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"
