"""The lowest versions that pyproject.toml allows, for `pip -c`: `python tests/lowest_versions.py > lowest.txt`.

With them an environment of the lowest versions is made and tested:

    python -m venv lowest && lowest/bin/pip install -c lowest.txt '.[test]'
    lowest/bin/python -m pytest -m "not slow"
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)")


def lowest(extras: tuple[str, ...] = ("test", "postgresql")) -> list[str]:
    """`name==version` for each requirement of the package and of these extras, at its lower bound."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    found = []
    for line in wanted:
        matched = _REQUIREMENT.fullmatch(line)
        assert matched is not None, line
        name, bounds = matched.groups()
        if name == project["name"]:  # an extra that names another one
            continue
        lower = [bound.strip() for bound in bounds.split(",") if bound.strip().startswith((">=", "=="))]
        if len(lower) != 1:
            raise ValueError(f"{line}: has no lower bound")
        found.append(f"{name}=={lower[0][2:]}")
    return found


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in lowest()))
