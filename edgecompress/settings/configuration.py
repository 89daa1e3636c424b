"""Parsed YAML and command-line overrides in, frozen pydantic models out, with every fault named at once.

What enters: a parsed file and dotted `--set` overrides. What leaves: one validated model. Recipes and
targets share this module, so that both report faults in the same way: the place in the file, what is
wrong, and the nearest valid spelling.
"""

from __future__ import annotations

import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from edgecompress.errors import ConfigurationError
from edgecompress.settings.spelling import did_you_mean
from edgecompress.settings.yaml_files import parse_yaml

Settings = TypeVar("Settings", bound="FrozenSettings")


class FrozenSettings(BaseModel):
    """Base of all settings: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _open_fraction(value: float) -> float:
    if not 0.0 < value < 1.0:
        hint = f"; did you mean {value / 100:g}?" if 1.0 < value < 100.0 else ""
        raise ValueError(f"{value:g} is not a fraction between 0 and 1{hint}")
    return value


def _closed_fraction(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        hint = f"; did you mean {value / 100:g}?" if 1.0 < value <= 100.0 else ""
        raise ValueError(f"{value:g} is not a fraction from 0 to 1{hint}")
    return value


Fraction = Annotated[float, AfterValidator(_open_fraction)]
"""A ratio in the open interval (0, 1)."""

ClosedFraction = Annotated[float, AfterValidator(_closed_fraction)]
"""A ratio in the closed interval [0, 1]."""


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` overrides to a parsed document and return the changed copy.

    Lists are entered by index or by the `id` of an element; values parse as YAML. Raises
    ConfigurationError, listing every override that has no place to go.
    """
    result: dict[str, Any] = deep_copy(document)
    faults: list[str] = []
    for override in overrides:
        path, separator, raw = override.partition("=")
        if not separator or not path.strip():
            faults.append(f"--set {override}: expected path=value, for instance seed=1")
            continue
        keys = path.strip().split(".")
        if not all(keys):
            faults.append(f"--set {path}: a name between the dots is empty; write for instance stages.pruned.epochs=5")
            continue
        try:
            assign(result, keys, parse_yaml(raw, source=f"--set {path}"))
        except ConfigurationError as error:
            faults.append(str(error))
        except KeyError as error:
            faults.append(f"--set {path}: {error.args[0]}")
    if faults:
        raise ConfigurationError("\n".join(faults))
    return result


def deep_copy(value: Any) -> Any:
    """The same document in mappings and lists of its own."""
    if isinstance(value, dict):
        return {key: deep_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [deep_copy(item) for item in value]
    return value


def _list_index(items: list[Any], key: str) -> int:
    ids = [item.get("id") for item in items if isinstance(item, Mapping)]
    if key in ids:
        return next(i for i, item in enumerate(items) if isinstance(item, Mapping) and item.get("id") == key)
    if re.fullmatch(r"-?[0-9]{1,9}", key) and -len(items) <= int(key) < len(items):
        return int(key)
    raise KeyError(f"the list has no element '{key}'{did_you_mean(key, [str(i) for i in ids if i])}")


def assign(container: Any, keys: Sequence[str], value: Any) -> None:
    """Put `value` at a place of a parsed document, in place; lists are entered by index or by `id`. Raises KeyError."""
    key, rest = keys[0], keys[1:]
    if isinstance(container, list):
        index = _list_index(container, key)
        if rest:
            assign(container[index], rest, value)
        else:
            container[index] = value
        return
    if not isinstance(container, dict):
        raise KeyError(f"'{key}' is inside a plain value ({reprlib.repr(container)}), which has no keys; leave it out")
    if not rest:
        container[key] = value
        return
    if container.get(key) is None:
        container[key] = {}
    assign(container[key], rest, value)


def validate(model: type[Settings], document: Mapping[str, Any], *, source: str) -> Settings:
    """Validate a document against a settings class.

    Raises ConfigurationError with one line per fault: `source: place: what is wrong; how to fix`.
    """
    try:
        settings: Settings = model.model_validate(document)
        return settings
    except ValidationError as error:
        faults = [fault for fault in error.errors() if not _follows(fault, error)]
        # A check over several fields may name several faults, one a line.
        described = [line for fault in faults for line in _describe(fault, model, document).split("\n")]
        raise ConfigurationError("\n".join(f"{source}: {line}" for line in dict.fromkeys(described))) from error


def _follows(fault: Any, error: ValidationError) -> bool:
    """Whether a list is said to be too short only because elements of it are faulty, which is said as well."""
    place = fault["loc"]
    inside = (other["loc"] for other in error.errors() if len(other["loc"]) > len(place))
    return fault["type"] == "too_short" and any(other[: len(place)] == place for other in inside)


def _describe(fault: Any, model: type[BaseModel], document: Mapping[str, Any]) -> str:
    location = _named_location(fault["loc"], document)
    place = ".".join(location) or "(top level)"
    kind, message = fault["type"], fault["msg"]
    if kind == "extra_forbidden":
        key = location[-1]
        return f"{place}: unknown key{did_you_mean(key, _field_names(model, fault['loc'][:-1]))}"
    if kind == "missing":
        return f"{place}: required, but not given"
    if kind == "union_tag_invalid":
        given = str(fault["ctx"]["tag"])
        tags = [tag.strip(" '") for tag in str(fault["ctx"]["expected_tags"]).split(",")]
        return f"{place}.kind: unknown kind '{given}'{did_you_mean(given, tags)}"
    if kind == "union_tag_not_found":
        return f"{place}.kind: required, but not given (train, distill, prune, quantize or qat)"
    if kind == "literal_error":
        expected = str(fault["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        given = reprlib.repr(fault["input"])
        return f"{place}: {given} is not allowed{did_you_mean(str(fault['input']), expected.split(', '))}"
    message = message.removeprefix("Value error, ")
    if kind == "value_error" and not location:
        return str(message)  # a check over the whole document, which names the places itself
    if kind == "value_error" or isinstance(fault["input"], (dict, list)):
        return f"{place}: {message}"
    return f"{place}: {message} (given: {reprlib.repr(fault['input'])})"


def _named_location(location: Sequence[int | str], document: Any) -> list[str]:
    """pydantic's location with list positions replaced by ids and union tags left out."""
    named: list[str] = []
    here: Any = document
    for part in location:
        if isinstance(part, int):
            here = here[part] if isinstance(here, list) and part < len(here) else None
            identifier = here.get("id") if isinstance(here, Mapping) else None
            usable = isinstance(identifier, str) and identifier != "" and identifier.isprintable()
            named.append(str(identifier) if usable else str(part))
        elif isinstance(here, Mapping) and part not in here and here.get("kind") == part:
            continue  # the tag of a discriminated union, which is no key of the file
        else:
            named.append(str(part))
            here = here.get(part) if isinstance(here, Mapping) else None
    return named


def _field_names(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys allowed at a location: follow it through nested models, lists and tagged unions."""
    here: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            continue
        tagged = [m for m in here if _tag_of(m) == part]
        if tagged:
            here = tagged
            continue
        inner: list[type[BaseModel]] = []
        for candidate in here:
            field = candidate.model_fields.get(part)
            if field is not None:
                inner.extend(models_in(field.annotation))
        here = inner
    return [name for candidate in here for name in candidate.model_fields]


def _tag_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = typing.get_args(field.annotation) if field is not None else ()
    return str(arguments[0]) if arguments else None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a field's type is made of, however deep in unions and lists."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in models_in(argument)]
