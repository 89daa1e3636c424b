"""The limits of a search: what may be lost, how much may be tried, and where the trials lie, refused where senseless.

What enters: what was asked for. What leaves: nothing, or one ConfigurationError. Loads nothing heavy, so that the
command line refuses before torch is loaded.
"""

from __future__ import annotations

from edgecompress.errors import ConfigurationError

DEFAULT_TRIALS = 20
MINIMIZED = ("latency", "size", "memory")


def require_limits(
    *, max_accuracy_drop: float, minimize: str, trials: int | None, seconds: float | None, storage: str | None
) -> None:
    """Refuse what means nothing. Raises ConfigurationError."""
    drop = max_accuracy_drop
    if not 0 <= drop <= 1:
        hint = f"; did you mean {drop / 100:g}?" if 1 < drop <= 100 else ""
        raise ConfigurationError(f"--max-accuracy-drop: {drop:g} is no fraction from 0 to 1{hint}")
    if minimize not in MINIMIZED:
        raise ConfigurationError(f"--minimize {minimize}: give {', '.join(MINIMIZED)}")
    if trials is not None and trials < 1:
        raise ConfigurationError(f"--trials {trials}: give 1 or more")
    if seconds is not None and not seconds > 0:
        raise ConfigurationError(f"--time: {seconds:g} s leaves no time for a trial; give for instance 30m")
    if storage is not None and not storage.startswith("postgresql"):
        raise ConfigurationError(
            "--storage takes postgresql://user@host/database; without it the trials lie in a file of the folder"
        )
