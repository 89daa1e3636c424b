"""The space of a search: the recipe's own declarations, or a sensible one for a recipe that declares none.

What enters: a recipe's document. What leaves: its dimensions, and a validated `Recipe` for any choice of settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgecompress.errors import ConfigurationError
from edgecompress.settings.configuration import assign, deep_copy, validate
from edgecompress.settings.factorize_settings import FactorizeStage
from edgecompress.settings.prune_settings import PruneStage
from edgecompress.settings.recipe import DistillStage, QuantizeStage, Recipe, load_recipe, read_recipe
from edgecompress.settings.search_space import Dimension, declared_dimensions
from edgecompress.settings.teacher_settings import TeacherSettings

Settings = dict[str, Any]
# Fields that decide what a model costs, by the end of their names: the first trials are spread over them.
_COST_FIELDS = ("ratio", "energy", "sparsity", "width", "input_size")


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen in `document`, which is valid with any single choice at either of its ends."""

    source: str
    document: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    is_default: bool

    def recipe_with(self, settings: Mapping[str, Any], *, max_accuracy_drop: float | None = None) -> Recipe:
        """The recipe at a point of the space, with the search's own limit as its gate. Raises ConfigurationError."""
        document = deep_copy(self.document)
        for dimension in self.dimensions:
            assign(document, dimension.path.split("."), deep_copy(settings[dimension.path]))
        if max_accuracy_drop is not None:
            document["gates"] = {**(document.get("gates") or {}), "max_accuracy_drop": max_accuracy_drop}
        return validate(Recipe, document, source=self.source)

    def start(self) -> Settings:
        """The first point: the recipe's own values where it has them, else the middle of each range."""
        return {dimension.path: dimension.first for dimension in self.dimensions}

    def spread(self, count: int) -> list[Settings]:
        """Up to `count` points to begin with: the start, then what costs at even distances over its range.

        All other fields stay at the start's values, as in the grid that a person would try: it takes more trials than
        a search has to find settings as good as those that somebody chose.
        """
        points = [self.start()]
        costly = [d for d in self.dimensions if not d.choices and d.path.endswith(_COST_FIELDS)]
        more = count - 1
        for number in range(more if costly else 0):
            share = (number + 0.5) / more
            point = points[0] | {dimension.path: dimension.at(share) for dimension in costly}
            if point != points[0]:  # it is where nothing else is searched
                points.append(point)
        return points

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether another search's settings are a point of this space."""
        return settings.keys() == {d.path for d in self.dimensions} and all(
            d.holds(settings[d.path]) for d in self.dimensions
        )


def load_space(source: str, overrides: Sequence[str] = ()) -> SearchSpace:
    """The space of a recipe file or shipped recipe. Raises ConfigurationError with every fault."""
    document = read_recipe(source, overrides)
    declared = declared_space(document, source=source)
    if declared is not None:
        return declared
    dimensions = tuple(default_dimensions(validate(Recipe, document, source=source)))
    if not dimensions:
        raise ConfigurationError(
            f"{source}: nothing to search: declare a field, for instance stages.pruned.channel_ratio: "
            "{search: [0.2, 0.7]}"
        )
    return SearchSpace(source, document, dimensions, is_default=True)


def declared_space(document: dict[str, Any], *, source: str) -> SearchSpace | None:
    """The space that a recipe's document declares, or None. Raises ConfigurationError with every fault."""
    declared = declared_dimensions(document, source=source)
    if not declared:
        return None
    space = SearchSpace(source, document, tuple(declared), is_default=False)
    faults = list(dict.fromkeys(_faults(space)))
    if faults:
        raise ConfigurationError("\n".join(faults))
    return space


def validated_recipe(source: str) -> tuple[dict[str, Any], list[str]]:
    """A valid recipe as a document, at the start of what it lets a search choose, and the places of those fields.

    Raises ConfigurationError with every fault.
    """
    space = declared_space(read_recipe(source), source=source)
    if space is None:
        return load_recipe(source).model_dump(mode="json"), []
    return space.recipe_with(space.start()).model_dump(mode="json"), [d.path for d in space.dimensions]


def _faults(space: SearchSpace) -> Iterator[str]:
    """What is wrong with the recipe at the start, or with one field at one of its ends."""
    start = space.start()
    try:
        space.recipe_with(start)
    except ConfigurationError as error:
        known = str(error).split("\n")
        yield from known
    else:
        known = []
    for dimension in space.dimensions:
        for value in dimension.extremes:
            try:
                space.recipe_with(start | {dimension.path: value})
            except ConfigurationError as error:
                yield from (
                    f"{line} ({dimension.path}: {value})" for line in str(error).split("\n") if line not in known
                )


def default_dimensions(recipe: Recipe) -> Iterator[Dimension]:
    """What is worth choosing in a recipe that says nothing: how much goes and how it is ranked, what a teacher counts
    for, the finetuning's learning rate, and int8's placement and effort."""
    for stage in recipe.stages:
        place = f"stages.{stage.id}"
        if isinstance(stage, PruneStage) and stage.method == "structured":
            yield from _prune_dimensions(place, stage)
        if isinstance(stage, FactorizeStage):
            yield (
                Dimension(f"{place}.macs_ratio", 0.1, 0.7, start=stage.macs_ratio)
                if stage.energy is None
                else Dimension(f"{place}.energy", 0.6, 0.98, start=stage.energy)
            )
        teacher = getattr(stage, "teacher", None)
        if isinstance(teacher, TeacherSettings) and not isinstance(stage, QuantizeStage):
            yield _around(f"{place}.teacher.temperature", 1.0, 8.0, teacher.temperature, log=True)
            yield _around(f"{place}.teacher.alpha", 0.2, 0.95, teacher.alpha)
        if isinstance(stage, PruneStage | FactorizeStage | DistillStage):
            rate = stage.learning_rate
            yield _around(f"{place}.learning_rate", rate / 4, rate * 4, rate, log=True)
        if isinstance(stage, QuantizeStage):
            yield Dimension(f"{place}.placement", choices=("auto", "full"), start=stage.placement)
            if stage.effort != "best":
                yield Dimension(f"{place}.effort", choices=("fast", "balanced"), start=stage.effort)


def _prune_dimensions(place: str, stage: PruneStage) -> Iterator[Dimension]:
    what, share = stage.target
    if share:
        yield _around(f"{place}.{what}_ratio", 0.1, 0.85, share)
    yield Dimension(f"{place}.scope", choices=("global", "isomorphic", "layer"), start=stage.scope)
    importances = ("magnitude", "taylor")
    if stage.importance in importances:
        yield Dimension(f"{place}.importance", choices=importances, start=stage.importance)


def _around(path: str, low: float, high: float, value: float, *, log: bool = False) -> Dimension:
    """A range that holds the recipe's own value."""
    return Dimension(path, float(f"{min(low, value):.4g}"), float(f"{max(high, value):.4g}"), log=log, start=value)
