"""Fields that a search chooses: `{search: ...}` in place of a recipe's value.

What enters: a parsed recipe. What leaves: its dimensions, each with its place in the recipe, or one message with every
fault. Written as `{search: [0.2, 0.7]}`, as `{search: {low: 1e-3, high: 1e-1, log: true}}` (two whole numbers give
whole numbers; `step` a raster), or as `{search: {choices: [global, layer]}}`, whose choices may be whole mappings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from edgecompress.errors import ConfigurationError
from edgecompress.settings.spelling import did_you_mean

KEY = "search"
_RANGE_KEYS = ("low", "high", "log", "step")
# What trials are compared on, or are known by; and chance, which is not to be chosen.
_FIXED = {
    "name": "is what the search is called by",
    "description": "is text",
    "seed": "is chance, and choosing the luckiest one says nothing",
    "data": "is what trials are compared on",
    "gates": "is what trials are compared by",
}


@dataclass(frozen=True)
class Dimension:
    """One field to choose: a range of numbers (`low` and `high`, both included) or `choices`.

    `path` is the field's dotted place, with the ids of stages. `start` is the value to try first, where there is one.
    """

    path: str
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    step: float | int | None = None
    choices: tuple[Any, ...] = ()
    start: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether the numbers are integers."""
        return isinstance(self.low, int)

    @property
    def first(self) -> Any:
        """The value to try first: `start`, or the middle of the range, or the first choice."""
        if self.start is not None:
            return self.start
        return self.choices[0] if self.choices else self.at(0.5)

    def at(self, share: float) -> Any:
        """The value at a share of the way from low to high (on the log scale where it is one), or of the choices."""
        if self.choices:
            return (
                self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)] if share else self.choices[0]
            )
        assert self.low is not None
        assert self.high is not None
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        if self.step is not None:
            value = self.low + round((value - self.low) / self.step) * self.step
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_whole else float(f"{value:.6g}")

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that the recipe must be valid with: both ends, or every choice."""
        return self.choices or (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether the search could choose `value`."""
        if self.choices:
            return label(value) in [label(choice) for choice in self.choices]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low is not None and self.high is not None and self.low <= value <= self.high

    def describe(self) -> str:
        """One line for people."""
        if self.choices:
            return f"{self.path}: one of {', '.join(label(choice) for choice in self.choices)}"
        how = " on a log scale" if self.log else ""
        return f"{self.path}: {self.low:g} to {self.high:g}{how}{f' in steps of {self.step:g}' if self.step else ''}"

    def to_json(self) -> dict[str, Any]:
        """The dimension as search.json keeps it."""
        if self.choices:
            return {"path": self.path, "choices": list(self.choices)}
        return {"path": self.path, "low": self.low, "high": self.high, "log": self.log, "step": self.step}


def label(value: Any) -> str:
    """A choice as text, by which it is stored: plain words stay plain."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def declared_dimensions(document: Mapping[str, Any], *, source: str) -> list[Dimension]:
    """Every `{search: ...}` of a parsed recipe, in its order. Raises ConfigurationError with every fault."""
    found: list[Dimension] = []
    faults: list[str] = []
    for path, declaration in _declarations(document, ()):
        place = ".".join(path)
        fixed = _FIXED.get(path[0]) or ("is what the stage is called by" if path[-1] in ("id", "kind") else None)
        if fixed is not None:
            faults.append(f"{place}: {fixed}, so it cannot be searched; give it one value")
            continue
        try:
            found.append(_parse(place, declaration))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if faults:
        raise ConfigurationError("\n".join(f"{source}: {fault}" for fault in faults))
    return found


def refuse_search(document: Mapping[str, Any], *, source: str) -> None:
    """Raises ConfigurationError where a recipe that is to be run holds fields that only a search can choose."""
    places = [".".join(path) for path, _ in _declarations(document, ())]
    if places:
        raise ConfigurationError(
            "\n".join(
                f"{source}: {place}: holds a range to search, not a value; use edgecompress search, "
                f"or give it one: --set {place}=VALUE"
                for place in places
            )
        )


def _declarations(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Place and content of every mapping whose only key is `search`."""
    if isinstance(value, Mapping):
        if set(value) == {KEY} and path:
            yield path, value[KEY]
            return
        for key, item in value.items():
            yield from _declarations(item, (*path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            identifier = item.get("id") if isinstance(item, Mapping) else None
            yield from _declarations(item, (*path, identifier if isinstance(identifier, str) else str(index)))


def _parse(path: str, declaration: Any) -> Dimension:
    """Raises ValueError, saying what is wrong and how to write it."""
    if isinstance(declaration, list):
        if len(declaration) != 2 or not all(_is_number(value) for value in declaration):
            raise ValueError(
                "a list is a range, [low, high], of two numbers; for a choice write {search: {choices: [...]}}"
            )
        declaration = {"low": declaration[0], "high": declaration[1]}
    if not isinstance(declaration, Mapping):
        raise ValueError("write {search: [low, high]} or {search: {choices: [...]}}")
    allowed = ("choices",) if "choices" in declaration else _RANGE_KEYS
    for key in declaration:
        if key not in allowed:
            raise ValueError(f"unknown key '{key}' beside {allowed[0]}{did_you_mean(str(key), allowed)}")
    return _parse_choices(path, declaration["choices"]) if "choices" in declaration else _parse_range(path, declaration)


def _parse_choices(path: str, choices: Any) -> Dimension:
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("choices is a list of at least two values")
    labels = [label(choice) for choice in choices]
    if len(set(labels)) < len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise ValueError(f"{twice} stands twice among the choices; keep one")
    return Dimension(path, choices=tuple(choices))


def _parse_range(path: str, given: Mapping[str, Any]) -> Dimension:
    low, high, log, step = given.get("low"), given.get("high"), given.get("log", False), given.get("step")
    if not _is_number(low) or not _is_number(high):
        raise ValueError("a range needs low and high, two numbers")
    if not isinstance(log, bool):
        raise ValueError(f"log is true or false, not {log!r}")
    if low >= high:
        raise ValueError(f"low ({low:g}) must be below high ({high:g}); for one value write it plainly")
    if log and low <= 0:
        raise ValueError(f"a log scale needs a low above 0, not {low:g}")
    if step is not None:
        if not _is_number(step) or not 0 < step <= high - low:
            raise ValueError(f"step must be a number above 0 and no more than high - low ({high - low:g})")
        if log:
            raise ValueError("log and step exclude each other; leave one out")
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high, step = float(low), float(high), None if step is None else float(step)
    elif step is not None and not isinstance(step, int):
        raise ValueError(f"step {step:g} between whole numbers; write low and high with a point, or a whole step")
    return Dimension(path, low=low, high=high, log=log, step=step)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
