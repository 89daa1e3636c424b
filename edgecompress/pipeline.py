"""The commands as functions: apply, export, profile, report, and `run`, which is all four.

What enters: what the command line parsed. What leaves: the run directory and an `Outcome`. Only this module and
the command line see the whole pipeline.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar

from edgecompress import console
from edgecompress.deploy.bundle import Bundle, write_bundle
from edgecompress.deploy.connection import Host
from edgecompress.errors import ConfigurationError, RunError
from edgecompress.exporting.answers import Answers
from edgecompress.measure.explanation import Depth
from edgecompress.measure.measuring import STANDARD, THOROUGHNESS
from edgecompress.measure.model_files import parse_shapes
from edgecompress.measure.runtime_options import parse_providers
from edgecompress.measure.sweeps import parse_sweeps
from edgecompress.reporting.comparison import comparison_document
from edgecompress.reporting.report_page import FORMATS, ReportPaths, write_pages, write_report
from edgecompress.run_directory import (
    Json,
    RunDirectory,
    alone_in,
    new_run_path,
    open_run,
    read_json,
    versioned,
    write_json,
)
from edgecompress.searching.order import SearchOrder
from edgecompress.searching.plan_search import search_plan
from edgecompress.settings.gates import missed_gates
from edgecompress.settings.recipe import QatStage, Recipe, load_recipe
from edgecompress.settings.target import Target, load_target, own_target
from edgecompress.shipped import shipped_path
from edgecompress.steps.apply_run import apply_recipe, start_manifest
from edgecompress.steps.channel_sensitivity_run import channel_sensitivity_run
from edgecompress.steps.debug_run import debug_run
from edgecompress.steps.export_run import export_folder, export_run
from edgecompress.steps.plan_run import plan_document
from edgecompress.steps.profile_files import profile_files as measure_files
from edgecompress.steps.profile_run import profile_run
from edgecompress.steps.run_start import place_run, recorded, start_run
from edgecompress.steps.run_state import recipe_document, recipe_of
from edgecompress.steps.sensitivity_run import FILE as SENSITIVITY_FILE
from edgecompress.steps.sensitivity_run import sensitivity_run
from edgecompress.steps.stage_cache import StageCache
from edgecompress.training import workers
from edgecompress.training.tracking import require_trackers, tracked

Words = ParamSpec("Words")
Result = TypeVar("Result")
INT8_IMAGES, CHANNEL_IMAGES = 32, 256  # held-out images of sensitivity; accuracy needs more of them than decibels


@dataclass(frozen=True)
class Outcome:
    """What a command did: where, for which targets, what it left, and which gates or budgets were missed, in words.

    `targets` are those that the command worked on, empty where it worked on none of the run's in particular.
    """

    run: RunDirectory
    manifest: Json
    missed: list[str] = field(default_factory=list)
    profiles: dict[str, Json] = field(default_factory=dict)
    reports: dict[str, ReportPaths] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @property
    def int8_stage(self) -> str:
        """The id of the run's quantize stage, in whose folder lies what was found about its layers."""
        return str(recipe_of(self.manifest).quantize_stage.id)

    @property
    def is_first_process(self) -> bool:
        """Whether this process made the run. One that was launched beside it only trained along, and has none."""
        return workers.rank() == 0


def _alone(
    command: Callable[Concatenate[Path | None, Words], Result],
) -> Callable[Concatenate[Path | None, Words], Result]:
    """A command that changes a run, while no other command does. Raises RunError where one is at it."""

    @functools.wraps(command)
    def work(path: Path | None, /, *args: Words.args, **words: Words.kwargs) -> Result:
        run = open_run(path)
        with alone_in(run.path):
            return command(run.path, *args, **words)

    return work


def apply(
    recipe_source: str,
    *,
    target: str | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: bool = False,
    cache: Path | None = None,
    track: Sequence[str] = (),
    command: str = "",
) -> Outcome:
    """Apply a recipe's stages in PyTorch. Stages that `cache` holds are taken from there, others are kept there."""
    recipe = load_recipe(recipe_source, overrides)
    stages = _open_cache(cache)
    require_trackers(track)
    resolved = load_target(target) if target is not None else None
    names = [resolved.name] if resolved else []
    if workers.rank() != 0:
        return _train_along(recipe, resolved, output, resume)
    with start_run(recipe, recipe_source, overrides, names, output, resume, command) as started:
        workers.wait_for_everyone()
        run = started.directory
        if run.read_manifest()["status"] == "complete":
            return _already_complete(run)
        with recorded(started), tracked(track, run.path, recipe_document(recipe)) as tracking:
            manifest = apply_recipe(recipe, run, resolved, cache=stages, watch=tracking.watch if tracking else None)
            if tracking is not None:
                tracking.results(manifest, {})
        manifest = run.read_manifest()
        return Outcome(run, manifest, missed_gates(manifest))


@_alone
def export(
    path: Path | None,
    *,
    target: str | None = None,
    int8: bool = False,
    with_preprocessing: bool = False,
    ort: bool = False,
    softmax: bool = False,
    top_k: int | None = None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Export a run's models and check parity. `softmax` and `top_k` add outputs behind the logits."""
    run = open_run(path)
    resolved = _target_of(run, target)
    form: Json = {"with_preprocessing": with_preprocessing, "ort": ort, "answers": Answers(softmax, top_k)}
    export_run(run, resolved, int8=int8, overrides=tuple(overrides), **form)
    manifest = run.read_manifest()
    return Outcome(run, manifest, missed_gates(manifest, resolved.name), targets=(resolved.name,))


@_alone
def profile(
    path: Path | None,
    *,
    target: str,
    seconds: float | None = None,
    thoroughness: str = STANDARD,
    sweep: str | None = None,
    providers: str | None = None,
    host: Host | None = None,
    results: Path | None = None,
) -> Outcome:
    """Measure a run's exported files on a target, here or on `host`, judge them and write the report.

    `results` is what a bundle's bench.py wrote on a device; then nothing is measured.
    """
    seconds = _seconds(seconds, thoroughness)
    depth = Depth(sweeps=parse_sweeps(sweep), providers=parse_providers(providers))
    run = open_run(path)
    resolved = load_target(target)
    if (host is not None or results is not None) and (sweep is not None or providers is not None):
        raise ConfigurationError("--sweep and --providers measure on this machine; leave them out with a device")
    folder = export_folder(run, resolved)
    how: Json = {"seconds": seconds, "thoroughness": thoroughness, "host": host, "results": results, "depth": depth}
    document = profile_run(run, resolved, folder=folder, **how)
    report = write_report(run, resolved.name)
    return Outcome(
        run,
        run.read_manifest(),
        document["missed"],
        {resolved.name: document},
        {resolved.name: report},
        targets=(resolved.name,),
    )


def profile_files(
    paths: Sequence[Path],
    *,
    target: str,
    seconds: float | None = None,
    thoroughness: str = STANDARD,
    sweep: str | None = None,
    providers: str | None = None,
    shapes: Sequence[str] = (),
    output: Path | None = None,
) -> Json:
    """Measure any ONNX files side by side on a target; returns the document, and keeps it at `output`."""
    seconds = _seconds(seconds, thoroughness)
    depth = Depth(sweeps=parse_sweeps(sweep), providers=parse_providers(providers))
    sizes, resolved = parse_shapes(shapes), load_target(target)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigurationError(f"--output {output}: give a file in a folder that is there")
    how: Json = {"seconds": seconds, "thoroughness": thoroughness, "depth": depth}
    document = versioned(measure_files(paths, target=resolved, shapes=sizes, **how))
    if output is not None:
        write_json(output, document)
    return document


@_alone
def report(path: Path | None, *, target: str | None = None, formats: Sequence[str] = FORMATS) -> Outcome:
    """Write the report of one target, or of every target that was profiled, in the given formats."""
    run = open_run(path)
    manifest = run.read_manifest()
    names = [load_target(target).name] if target else _profiled(run) or list(manifest.get("targets", []))
    if not names:
        raise RunError(f"{run.path}: no target yet; first: edgecompress profile {run.path} --target x86")
    reports = {name: write_report(run, name, formats) for name in names}
    return Outcome(run, run.read_manifest(), reports=reports, targets=tuple(names))


def compare(
    paths: Sequence[Path], *, target: str | None = None, output: Path | None = None, formats: Sequence[str] = FORMATS
) -> tuple[Json, ReportPaths]:
    """Compare runs, on one target or on all they were profiled on; returns the document, and where its pages are.

    They go into the folder `output`, by default a new one beside the runs.
    """
    name = load_target(target).name if target else None
    document = versioned(comparison_document([open_run(path) for path in paths], name))
    folder = output if output is not None else new_run_path("comparison")
    if output is not None and any((folder / f"comparison.{name}").exists() for name in formats):
        raise ConfigurationError(f"--output {folder}: holds a comparison already; name another folder, or remove it")
    return document, write_pages(document, folder / "comparison.html", "comparison", formats)


@_alone
def bundle(
    path: Path | None, *, target: str, output: Path | None, preprocessing_inside: bool
) -> tuple[Outcome, Bundle]:
    """Write a run's bundle for a target into `output`, by default the run's own `bundle/`."""
    run = open_run(path)
    resolved = load_target(target)
    made = write_bundle(
        run,
        resolved,
        exported=export_folder(run, resolved),
        output=output if output is not None else run.path / "bundle",
        preprocessing_inside=preprocessing_inside,
    )
    manifest = run.read_manifest()
    verdict = made.manifest["verdict"]
    missed = [*verdict["gates_missed"], *verdict["missed"]]
    missed += [
        f"The bundle's {row['model']} fails its self-test on this machine."
        for row in made.self_test
        if not row["passed"]
    ]
    return Outcome(run, manifest, list(dict.fromkeys(missed))), made


@_alone
def sensitivity(
    path: Path | None,
    *,
    what: Literal["int8", "channels", "both"] = "both",
    target: str | None = None,
    images: int | None = None,
    macs_ratio: float = 0.5,
    timed: bool = True,
) -> tuple[Outcome, Json]:
    """What int8 costs in each layer of a run's model, and what each group of channels is worth.

    Returns the content of sensitivity.json, in which what was not asked for stays as it was.
    """
    run = open_run(path)
    stage = recipe_of(run.read_manifest()).quantize_stage
    file = run.stage(stage.id) / SENSITIVITY_FILE
    document: Json = versioned(read_json(file) if file.is_file() else {})
    if what == "both" and isinstance(stage, QatStage):
        console.warn(f"stage {stage.id} is qat, whose integers come from training; only channels are measured")
        what = "channels"
    if what in ("int8", "both"):
        document |= sensitivity_run(run, images=images or INT8_IMAGES)
    if what in ("channels", "both"):
        resolved = _target_of(run, target)
        document["channels"] = channel_sensitivity_run(
            run, resolved, images=images or CHANNEL_IMAGES, macs_ratio=macs_ratio, timed=timed
        )
    run.write_document(file, document)
    return Outcome(run, run.read_manifest()), document


@_alone
def debug_int8(path: Path | None, *, target: str | None, images: int, worst: int) -> tuple[Outcome, Json]:
    """Why the worst layers of a run's int8 model lose; returns the content of debug.json beside the outcome."""
    run = open_run(path)
    document = debug_run(run, _target_of(run, target), images=images, worst=worst)
    return Outcome(run, run.read_manifest()), document


def run(
    recipe_source: str,
    *,
    targets: Sequence[str],
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: bool = False,
    with_preprocessing: bool = False,
    seconds: float | None = None,
    thoroughness: str = STANDARD,
    cache: Path | None = None,
    track: Sequence[str] = (),
    command: str = "",
) -> Outcome:
    """Apply, export with int8, profile and report, for one target or several. `cache` is as in `apply`."""
    seconds = _seconds(seconds, thoroughness)
    recipe = load_recipe(recipe_source, overrides)
    stages = _open_cache(cache)
    require_trackers(track)
    resolved = _load_targets(targets)
    names = [target.name for target in resolved]
    if workers.rank() != 0:
        return _train_along(recipe, resolved[0], output, resume)
    with start_run(recipe, recipe_source, overrides, names, output, resume, command) as started:
        workers.wait_for_everyone()
        directory = started.directory
        profiled = all(
            directory.profile_path(name).is_file() for name in names
        )  # `apply` alone leaves a complete run too
        if directory.read_manifest()["status"] == "complete" and profiled:
            return _already_complete(directory)
        profiles: dict[str, Json] = {}
        reports: dict[str, ReportPaths] = {}
        how: Json = {"seconds": seconds, "thoroughness": thoroughness}
        with recorded(started), tracked(track, directory.path, recipe_document(recipe)) as tracking:
            apply_recipe(recipe, directory, resolved[0], cache=stages, watch=tracking.watch if tracking else None)
            for target in resolved:
                folder = export_folder(directory, target)
                export_run(directory, target, int8=True, with_preprocessing=with_preprocessing)
                profiles[target.name] = profile_run(directory, target, folder=folder, depth=Depth(), **how)
            if tracking is not None:
                tracking.results(directory.read_manifest(), profiles)
        # The report is written last, so that it says "complete".
        for target in resolved:
            reports[target.name] = write_report(directory, target.name)
        manifest = directory.read_manifest()
        judged = [name for name, profile in profiles.items() if profile["measured"]]
        missed = missed_gates(manifest, without_speed_on=judged)
        missed += [text for profile in profiles.values() for text in profile["missed"]]
        return Outcome(directory, manifest, list(dict.fromkeys(missed)), profiles, reports, targets=tuple(names))


def plan(
    recipe_source: str,
    *,
    targets: Sequence[str],
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: bool = False,
    profiled_for: float | None = None,
    command: str = "",
) -> Json:
    """What `apply` or, with `profiled_for` seconds of measuring, `run` would do; nothing is written."""
    recipe = load_recipe(recipe_source, overrides)
    names = [target.name for target in _load_targets(targets)]
    directory, has_run, _ = place_run(recipe, output, resume)
    stages = directory.read_manifest()["stages"] if has_run else []
    complete = [str(stage["id"]) for stage in stages if stage["status"] == "complete"]
    return plan_document(recipe, directory.path, names, complete=complete, profiled_for=profiled_for, command=command)


def search(order: SearchOrder, *, output: Path | None = None, resume: bool = False) -> Json:
    """Search a recipe's settings for what a target runs best; returns the content of search.json, and its folder."""
    from edgecompress.searching.search_run import search as run_search  # Optuna, which no other command has a use for

    if workers.world_size() > 1:
        raise ConfigurationError("search trains in one process; for more, give the same command again with --resume")
    directory = _search_folder(order, output, resume)
    return run_search(order, directory, resume=resume) | {"folder": str(directory)}


def plan_search(order: SearchOrder, *, output: Path | None = None, resume: bool = False) -> Json:
    """What `search` would do; nothing is written."""
    return search_plan(order, _search_folder(order, output, resume), resume=resume)


def _search_folder(order: SearchOrder, output: Path | None, resume: bool) -> Path:
    if resume and output is None:
        raise RunError("--resume needs --output DIR, the search to go on with")
    return output if output is not None else new_run_path(f"{Path(order.source).stem}-search")


def _open_cache(folder: Path | None) -> StageCache | None:
    """The cache of stages that was asked for. Raises ConfigurationError where several processes would fill it."""
    if folder is None:
        return None
    if workers.world_size() > 1:
        raise ConfigurationError("--cache works with one process; leave it out where several train together")
    return StageCache(folder)


def _seconds(seconds: float | None, thoroughness: str) -> float:
    """The time limit given, or the preset's own."""
    if seconds is None:
        return THOROUGHNESS[thoroughness].seconds
    if not math.isfinite(seconds):
        raise ConfigurationError(f"--seconds: {seconds} is no time to measure for; give a number such as 20")
    return seconds


def _load_targets(sources: Sequence[str]) -> list[Target]:
    """The targets in the order given, each once. Two that differ cannot share a name, which names their files."""
    targets: dict[str, Target] = {}
    for source in sources:
        target = load_target(source)
        if targets.setdefault(target.name, target) != target:
            raise ConfigurationError(
                f"--target {source}: another target is called '{target.name}' too; change its name"
            )
    return list(targets.values())


def _train_along(recipe: Recipe, target: Target | None, output: Path | None, resume: bool) -> Outcome:
    """What every launched process but the first does: train along, in a folder of its own that goes afterwards."""
    console.set_quiet(True)
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDirectory(Path(scratch) / "run")
        there = RunDirectory(output) if resume and output is not None else None
        if there is not None and there.manifest_path.is_file():
            shutil.copytree(there.path, run.path, ignore=shutil.ignore_patterns("export", "profile", "report"))
        else:
            run.write_manifest(start_manifest(recipe, source="", overrides=[], targets=[], command=""))
        workers.wait_for_everyone()
        return Outcome(run, apply_recipe(recipe, run, target))


def _already_complete(run: RunDirectory) -> Outcome:
    console.note(f"{run.path}: complete, nothing to do")
    return Outcome(run, run.read_manifest())


def _target_of(run: RunDirectory, target: str | None) -> Target:
    """The target named, the run's first, or x86 / arm64 by the machine at hand."""
    if target is not None:
        return load_target(target)
    names = run.read_manifest().get("targets") or []
    if names and shipped_path("targets", str(names[0])) is None:
        raise RunError(
            f"{run.path}: was made for '{names[0]}', which is no shipped target; give its file with --target"
        )
    if names:
        return load_target(str(names[0]))
    return own_target()


def _profiled(run: RunDirectory) -> list[str]:
    return sorted(path.stem for path in (run.path / "profile").glob("*.json"))
