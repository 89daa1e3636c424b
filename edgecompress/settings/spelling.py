"""The nearest valid spelling of a name that was mistyped, as the end of a message.

What enters: a name and those that exist. What leaves: `; did you mean 'this'?`, or the list of what exists.
"""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelled most like `name`, or None when none is close."""
    import difflib  # only a message about a mistake needs it

    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The suffix '; did you mean ...?' or, when nothing is close, the list of what exists."""
    names = sorted(set(candidates))
    match = nearest(name, names)
    if match is not None:
        return f"; did you mean '{match}'?"
    return f"; known: {', '.join(names)}" if names else ""
