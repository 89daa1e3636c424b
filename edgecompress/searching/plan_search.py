"""`search --dry-run`: how many trials would be run, and what time, disk and memory they would take; nothing is done.

What enters: an order, and the folder that the search would take. What leaves: the plan, in the form that `apply` and
`run` have for theirs. A trial's figures are the mean over the points that a search begins with, since the degree of
compression decides what a trial costs; a trial that is given up early takes less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from edgecompress.measure.measuring import STANDARD, THOROUGHNESS
from edgecompress.measure.profiling import not_at_hand
from edgecompress.reporting.plan_text import duration_text
from edgecompress.run_directory import Json
from edgecompress.searching.order import (
    SPREAD,
    SearchOrder,
    earlier_search,
    require_measurable,
    search_key,
    warm_points,
)
from edgecompress.searching.space import SearchSpace, load_space
from edgecompress.searching.trial import own_stages
from edgecompress.settings.recipe import Recipe
from edgecompress.steps.plan_run import (
    Images,
    beside_machine,
    data_at_hand,
    data_facts,
    how_probed,
    images_of,
    models_to_probe,
    planned_steps,
    probed,
    totals,
)
from edgecompress.steps.probe import ModelProbe

_LAYERS_SECONDS = 20.0  # three networks captured, rounded and profiled for the table of layer times
_AGAIN_SECONDS = 10.0  # beside what latency is measured for: memory, operators and the sweep of the pick


def search_plan(order: SearchOrder, directory: Path, *, resume: bool) -> Json:
    """The plan as JSON. Raises InputError for whatever the search would refuse."""
    started = time.perf_counter()
    order = order.resolved()
    space = load_space(order.source, order.overrides)
    require_measurable(order)
    recipes = [space.recipe_with(point, max_accuracy_drop=order.max_accuracy_drop) for point in space.spread(SPREAD)]
    data = data_at_hand(recipes[0])
    earlier = earlier_search(directory, search_key(order, space, data), resume=resume)
    warm_points(order, space)
    known: dict[str, dict[str, ModelProbe]] = {}
    for recipe in recipes:
        if (models := _models(recipe)) not in known:
            known[models] = probed(recipe, data)
    probes = [known[_models(recipe)] for recipe in recipes]
    images, reasons = images_of(recipes[0], data), not_at_hand(order.target)
    measured_for = 0.0 if reasons else THOROUGHNESS["quick"].seconds
    rows = _mean_rows(
        [
            [*planned_steps(r, [order.target.name], images, p, profile_seconds=measured_for), _accuracy(images, p)]
            for r, p in zip(recipes, probes, strict=True)
        ]
    )
    done = 0 if earlier is None else sum(trial["status"] != "running" for trial in earlier["trials"])
    before, each = _shared_and_own(rows, space, recipes[0], is_timed=not reasons, is_begun=done > 0, order=order)
    trials, limit = _trials(order, done, before=_seconds(before), each=_seconds(each))
    steps = [*before, *(_repeated(row, max(0, trials - done)) for row in each)]
    if not reasons and trials > done:
        again = THOROUGHNESS[STANDARD].seconds + _AGAIN_SECONDS
        steps.append(_once("pick", "measured again, at length", again, steps[0]["memory_bytes"]))
    return {
        "dry_run": True,
        "command": order.command,
        "output": str(directory),
        "recipe": recipes[0].name,
        "targets": [order.target.name],
        "data": data_facts(data),
        "search": {
            "trials": max(trials, done),
            "trials_done": done,
            "limited_by": limit,
            "seconds_a_trial": _seconds(each),
            "minimize": order.minimize,
            "max_accuracy_drop": order.max_accuracy_drop,
            "space": [dimension.to_json() for dimension in space.dimensions],
            "space_in_words": [dimension.describe() for dimension in space.dimensions],
            "space_is_default": space.is_default,
            "not_measured_because": reasons,
        },
        "steps": steps,
        **beside_machine(directory, totals(steps, probes[0])),
        "probe": {"seconds": time.perf_counter() - started, "how": how_probed(probes[0])},
    }


def _models(recipe: Recipe) -> str:
    """What a probe depends on, so that points that differ in something else share one."""
    models = models_to_probe(recipe).values()
    return repr([(model.model_dump(), None if own is None else own.batch_size) for model, own in models])


def _mean_rows(points: Sequence[Sequence[Json]]) -> list[Json]:
    """One row a step: the mean over points of its time and disk, and the most memory."""
    found = []
    for same in zip(*points, strict=True):
        row = {**same[0], "memory_bytes": max(row["memory_bytes"] for row in same)}
        row["seconds"] = sum(row["seconds"] for row in same) / len(same)
        row["disk_bytes"] = sum(row["disk_bytes"] for row in same) // len(same)
        found.append(row)
    return found


def _accuracy(images: Images, probes: dict[str, ModelProbe]) -> Json:
    seconds = 2 * images.val * probes[""].forward_seconds
    return _once("accuracy", "of the int8 file and the first model on val, which decides", seconds, 0)


def _shared_and_own(
    rows: Sequence[Json], space: SearchSpace, recipe: Recipe, *, is_timed: bool, is_begun: bool, order: SearchOrder
) -> tuple[list[Json], list[Json]]:
    """What is done once for all trials, and what each trial does."""
    own = {stage.id for stage in own_stages(space, recipe)} | {recipe.quantize_stage.id}
    shared = {stage.id for stage in recipe.stages} - own
    before = [
        {**row, "times": 1, "what": f"{row['what']}; once for all trials"} for row in rows if row["step"] in shared
    ]
    if is_timed and order.minimize == "latency":
        before.append(_once("layers", "the table of layer times", _LAYERS_SECONDS, rows[0]["memory_bytes"]))
    if is_begun:
        before = [{**row, "done": True, "what": "complete, kept", "seconds": 0.0, "disk_bytes": 0} for row in before]
    return before, [row for row in rows if row["step"] not in shared]


def _trials(order: SearchOrder, done: int, *, before: float, each: float) -> tuple[int, str]:
    """How many trials there would be in all, and which limit says so."""
    if order.seconds is not None:
        fitting = done + max(1, math.ceil((order.seconds - before) / max(each, 1e-9)))
        if order.trials is None or fitting < order.trials:
            return fitting, "time"
    assert order.trials is not None
    return order.trials, "trials"


def _repeated(row: Json, times: int) -> Json:
    """A trial's step as often as there are trials to come."""
    if times == 0:
        return {**row, "times": 0, "done": True, "what": "complete, kept", "seconds": 0.0, "disk_bytes": 0}
    what = f"{times} trials, {duration_text(row['seconds'])} each: {row['what']}"
    figures = {"seconds": times * row["seconds"], "disk_bytes": times * row["disk_bytes"]}
    return {**row, "times": times, "what": what, **figures}


def _once(step: str, what: str, seconds: float, memory: int) -> Json:
    figures = {"seconds": seconds, "disk_bytes": 0, "memory_bytes": memory, "times": 1}
    return {"step": step, "done": False, "what": what, **figures}


def _seconds(rows: Sequence[Json]) -> float:
    return float(sum(row["seconds"] for row in rows))
