"""What a search was asked for, what makes two searches the same one, and what is refused before anything is computed.

What enters: the command's words, and a folder. What leaves: the order, its key, and points of earlier searches. Nothing
is written here, so that a dry run refuses what a search would refuse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgecompress import console
from edgecompress.data.run_data import ImageData
from edgecompress.errors import ConfigurationError, RunError
from edgecompress.measure.profiling import not_at_hand
from edgecompress.run_directory import Json, RunDirectory, read_json
from edgecompress.searching.limits import DEFAULT_TRIALS, require_limits
from edgecompress.searching.space import SearchSpace, Settings
from edgecompress.searching.trial import Minimize
from edgecompress.settings.target import Target
from edgecompress.steps.run_state import recipe_document

DOCUMENT = "search.json"
SPREAD = 6  # points that are tried before the sampler chooses
_WARM = 5  # points taken from an earlier search


@dataclass(frozen=True)
class SearchOrder:
    """What was asked for. `trials` and `seconds` are limits, of which the first one reached ends the search.

    Without both there are DEFAULT_TRIALS.
    """

    source: str
    overrides: tuple[str, ...]
    target: Target
    max_accuracy_drop: float
    minimize: Minimize
    trials: int | None
    seconds: float | None
    storage: str | None
    cache: Path | None
    warm_starts: tuple[Path, ...]
    command: str

    def resolved(self) -> SearchOrder:
        """The same with what was left open: the number of trials, and what may be lost as the target's budget too.

        Said with the command, it wins over the target's file. Raises ConfigurationError for limits that mean nothing.
        """
        require_limits(
            max_accuracy_drop=self.max_accuracy_drop,
            minimize=self.minimize,
            trials=self.trials,
            seconds=self.seconds,
            storage=self.storage,
        )
        trials = DEFAULT_TRIALS if self.trials is None and self.seconds is None else self.trials
        budgets = self.target.budgets.model_copy(update={"max_accuracy_drop": self.max_accuracy_drop})
        return replace(self, trials=trials, target=self.target.model_copy(update={"budgets": budgets}))


def search_key(order: SearchOrder, space: SearchSpace, data: ImageData) -> str:
    """What makes two searches the same one: recipe and space, images, target, and what is asked for."""
    recipe = space.recipe_with(space.start())
    facts = [
        recipe_document(recipe),
        [dimension.to_json() for dimension in space.dimensions],
        data.fingerprint,
        order.target.model_dump(mode="json"),
        order.minimize,
        order.max_accuracy_drop,
        recipe.seed,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def require_measurable(order: SearchOrder) -> None:
    """Refuse to minimize what only measuring tells for a target that is not this machine. Raises ConfigurationError."""
    reasons = not_at_hand(order.target)
    if order.minimize == "memory" and reasons:
        raise ConfigurationError(
            f"--minimize memory is measured, and target {order.target.name} is not this machine "
            f"({'; '.join(reasons)}); use --minimize size, or search on the device"
        )


def earlier_search(directory: Path, key: str, *, resume: bool) -> Json | None:
    """The content of search.json where the same search is in `directory`; None where there is room for a new one.

    Raises RunError where another search or anything else is there: nothing is overwritten unasked.
    """
    path = directory / DOCUMENT
    try:
        if path.is_file():
            if not resume:
                raise RunError(f"{directory}: a search is there; go on with --resume, or choose another --output")
            document: Json = read_json(path)
            if document.get("key") != key:
                raise RunError(
                    f"{directory}: was searched with another recipe, data, target or limit; repeat the same "
                    "command, or choose another --output"
                )
            return document
        if directory.exists() and (not directory.is_dir() or _holds_files(directory)):
            raise RunError(f"{directory}: exists and holds no search; choose another --output")
    except OSError as error:
        raise RunError(f"{directory}: cannot be read: {error.strerror}; choose another --output") from error
    return None


def _holds_files(folder: Path) -> bool:
    """Whether a folder holds more than what a search that was stopped hard at its first file leaves."""
    return any(not path.name.startswith(f".{DOCUMENT}.") for path in folder.iterdir())


def warm_points(order: SearchOrder, space: SearchSpace) -> list[Settings]:
    """Settings of finished searches and runs that are points of this space, the best first. Raises RunError."""
    points: list[Settings] = []
    for path in order.warm_starts:
        found_here = _points_in(path, space)
        fitting = [point for point in found_here if space.holds(point)]
        console.note(f"--warm-start {path}: {len(fitting)} of {len(found_here)} points fit this space")
        points += [point for point in fitting if point not in points]
    return points[:_WARM]


def _points_in(path: Path, space: SearchSpace) -> list[Settings]:
    """Settings that an earlier search or run holds for the fields of `space`, those of its front first."""
    if (path / DOCUMENT).is_file():
        document = read_json(path / DOCUMENT)
        front = [row["trial"] for row in document.get("front", [])]
        trials = [trial for trial in document.get("trials", []) if trial.get("status") == "complete"]
        return [trial["settings"] for trial in sorted(trials, key=lambda trial: trial["id"] not in front)]
    if (path / "run.json").is_file():
        recipe = RunDirectory(path).read_manifest()["recipe"]
        values = {dimension.path: _value_at(recipe, dimension.path.split(".")) for dimension in space.dimensions}
        return [values]
    raise RunError(f"--warm-start {path}: holds neither {DOCUMENT} nor run.json; give a search's folder or a run's")


def _value_at(document: Any, keys: Sequence[str]) -> Any:
    """The value at a place of a resolved recipe, whose lists are entered by id; None where it is not there."""
    for key in keys:
        if isinstance(document, list):
            document = next((item for item in document if isinstance(item, dict) and item.get("id") == key), None)
        else:
            document = document.get(key) if isinstance(document, dict) else None
    return document
