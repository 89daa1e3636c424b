"""YAML files in, plain mappings out; and where the file of a recipe or target is.

What enters: a path, or the name of a shipped file. What leaves: a mapping, or one message that names file and line.
Nothing here needs pydantic, so that what only looks at files answers at once.
"""

from __future__ import annotations

import contextlib
import re
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from edgecompress.errors import ConfigurationError
from edgecompress.settings.spelling import did_you_mean
from edgecompress.shipped import shipped_files, shipped_name, shipped_path

# A recipe is a page of text. The limits stop a file that expands without end (YAML aliases) early.
MAX_YAML_BYTES = 1_000_000
MAX_YAML_NODES = 20_000

# PyYAML's constructors let many unrelated errors out: `!!bool x` a KeyError, `!!timestamp x` an AttributeError.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


# libyaml reads the text where PyYAML was built with it: 2 ms for all shipped recipes instead of 66. Nodes are composed
# by PyYAML's composer in either case, since the checks below hang on it.
_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(yaml.composer.Composer, _Loader):  # type: ignore[misc, valid-type]  # known at run time
    """Safe YAML that refuses duplicate keys (a second `stages:` would silently win) and floods."""

    node_count = 0

    def __init__(self, stream: str) -> None:
        _Loader.__init__(self, stream)
        yaml.composer.Composer.__init__(self)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.node_count += 1
        if self.node_count > MAX_YAML_NODES:
            raise yaml.YAMLError(f"the file holds over {MAX_YAML_NODES} nodes")
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: YAML aliases are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: expected a mapping")
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not text")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key '{key}' stands twice")
            seen.add(key)
        return typing.cast(dict[Any, Any], super().construct_mapping(node, deep=deep))


# YAML 1.1 reads 1e-3 as text, since it wants a dot; people write 1e-3.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse one YAML document safely; `source` names it in messages. Raises ConfigurationError."""
    if len(text) > MAX_YAML_BYTES:
        raise ConfigurationError(f"{source}: larger than {MAX_YAML_BYTES} bytes; this is not a recipe or a target")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except _YAML_ERRORS as error:
        raise ConfigurationError(f"{source}: not valid YAML: {_yaml_detail(error)}") from error


def _yaml_detail(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        context = f" ({error.context})" if error.context else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"
    return f"{' '.join(str(error).split())}" or type(error).__name__


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises ConfigurationError."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_YAML_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not text (UTF-8); expected a YAML file") from error
    document = parse_yaml(text, source=str(path))
    if not isinstance(document, dict):
        kind = "nothing" if document is None else f"a {type(document).__name__}"
        raise ConfigurationError(f"{path}: expected a mapping of settings (name: value) at the top level, found {kind}")
    return typing.cast(dict[str, Any], document)


def find_settings(source: str, *, kind: Literal["recipe", "target"]) -> Path:
    """The file of a recipe or target given by path or by shipped name. Raises ConfigurationError."""
    path = Path(source)
    with contextlib.suppress(OSError):  # a name too long for a file, or in a folder that may not be read
        if path.is_file():
            return path
    shipped = shipped_path(f"{kind}s", source)
    if shipped is not None:
        return shipped
    names = [shipped_name(f"{kind}s", file) for file in shipped_files(f"{kind}s")]
    looks_like_path = path.suffix in (".yaml", ".yml") or "/" in source
    problem = "no such file" if looks_like_path else f"no file and no shipped {kind} of that name"
    raise ConfigurationError(f"{kind} '{source}': {problem}{did_you_mean(source.removesuffix(path.suffix), names)}")
