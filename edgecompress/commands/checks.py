"""What is refused before torch is loaded, which takes seconds: bad recipes, missing runs, excluding flags.

What enters: names, paths and flags as typed. What leaves: nothing, or one ConfigurationError with every fault.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from edgecompress.errors import ConfigurationError


def thoroughness_of(quick: bool, thorough: bool) -> str:
    """How long to measure, from the two flags. Raises ConfigurationError where both are given."""
    if quick and thorough:
        raise ConfigurationError("--quick and --thorough: give one of them, or neither")
    return "quick" if quick else "thorough" if thorough else "standard"


def page_formats(formats: Sequence[str] | None, *, opened: bool) -> tuple[str, ...]:
    """What to write, from --format. Raises ConfigurationError for an unknown form, and for --open without the page."""
    known = ("html", "md", "json")
    wanted = tuple(dict.fromkeys(formats or known))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigurationError(f"--format {unknown[0]}: give one of {', '.join(known)}")
    if opened and "html" not in wanted:
        raise ConfigurationError("--open shows the HTML page; add --format html, or leave --format out")
    return wanted


def require_recipe_and_targets(recipe: str, overrides: Sequence[str], targets: Sequence[str]) -> None:
    """Name the faults of all files at once, and before torch, which takes seconds to load."""
    from edgecompress.settings.recipe import load_recipe
    from edgecompress.settings.target import load_target

    checks: list[Callable[[], object]] = [lambda: load_recipe(recipe, overrides)]
    checks += [functools.partial(load_target, target) for target in targets]
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            faults.append(str(error))
    if faults:
        raise ConfigurationError("\n".join(faults))


def require_run_and_target(run: Path | None, target: str | None) -> None:
    """Refuse a run or a target that is not there before torch is loaded."""
    from edgecompress.run_directory import open_run
    from edgecompress.settings.target import load_target

    open_run(run)
    if target is not None:
        load_target(target)
