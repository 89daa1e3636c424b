"""Models and data of one's own: `path/file.py:function` becomes a Python function.

What enters: a reference from the recipe. What leaves: the function, or what it returned. The recipe's author
asked for this code to run, so it runs with no sandbox; but whatever goes wrong in it is reported as a fault of
that file, with its line, and never as a traceback through this package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgecompress.errors import InputError, ModelError
from edgecompress.settings.named_code import is_user_code, remember
from edgecompress.settings.spelling import did_you_mean

__all__ = ["call_function", "default_of", "is_user_code", "load_function"]


def load_function(reference: str, *, fault: type[InputError] = ModelError) -> Callable[..., Any]:
    """The function that `path/file.py:function` names; a relative path starts at the working directory.

    The file is run afresh on every call, with its own folder importable while it runs. Raises `fault` when the
    reference is malformed, the file is missing or fails, or it holds no such function.
    """
    file_name, separator, function_name = reference.rpartition(":")
    if not separator or not file_name.endswith(".py") or not function_name.isidentifier():
        raise fault(f"'{reference}': expected path/file.py:function, for instance nets.py:build")
    path = Path(file_name)
    if not path.is_file():
        raise fault(f"'{reference}': there is no file {path} (relative paths start at {Path.cwd()})")
    module = _run_file(path, fault)
    function = getattr(module, function_name, None)
    if function is None:
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise fault(f"{path}: has no function '{function_name}'{did_you_mean(function_name, functions)}")
    if not callable(function):
        raise fault(f"{path}: '{function_name}' is a {type(function).__name__}; expected a function")
    # Whoever comes here was asked by the user: what a run directory names has been checked before (named_code).
    remember(reference)
    return function  # type: ignore[no-any-return]


def call_function(
    reference: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    offered: Mapping[str, Any] | None = None,
    fault: type[InputError] = ModelError,
) -> Any:
    """What the function of `reference` returns for `arguments` and those of `offered` that it has parameters for.

    Raises `fault`, with the line, when it raises.
    """
    function = load_function(reference, fault=fault)
    accepted = {name: value for name, value in (offered or {}).items() if _accepts(function, name)}
    try:
        return function(**{**accepted, **(arguments or {})})
    except (Exception, SystemExit) as error:
        raise fault(f"{reference}: {_describe(error, Path(reference.rpartition(':')[0]))}; mend it there") from error


def default_of(reference: str, parameter: str, *, fault: type[InputError] = ModelError) -> Any:
    """What the function of `reference` takes for a parameter that it is not given; None where it has none."""
    try:
        found = inspect.signature(load_function(reference, fault=fault)).parameters.get(parameter)
    except (TypeError, ValueError):
        return None
    return None if found is None or found.default is found.empty else found.default


def _accepts(function: Callable[..., Any], name: str) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _run_file(path: Path, fault: type[InputError]) -> ModuleType:
    resolved = path.resolve()
    name = f"edgecompress_user_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise fault(f"{path}: Python cannot load this file; give a .py file")
    module = importlib.util.module_from_spec(spec)
    folder = str(resolved.parent)
    # dataclasses and typing look modules up by name, and the file may import its neighbours.
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise fault(f"{path}: {_describe(error, path)}; mend it there") from error
    finally:
        # The file may have put its own entries first.
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def _describe(error: BaseException, path: Path) -> str:
    """`raised TypeError at line 12: ...`, with the innermost line inside the user's own file."""
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        own = str(path.resolve())
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == own), None)
    place = f" at line {line}" if line else ""
    return f"raised {type(error).__name__}{place}: {' '.join(str(error).split()) or '(no message)'}"
