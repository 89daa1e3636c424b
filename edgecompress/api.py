"""The commands as functions for Python: settings in, typed results out, errors of one tree, quiet unless asked.

What enters: what the command line would take, as Python values. What leaves: typed results (results.py,
findings.py), or an `EdgeCompressError`. Nothing here ends the process or prints to stdout. Each function does what the
command of its name does, by the same code.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from edgecompress import console, pipeline
from edgecompress.deploy.connection import Host
from edgecompress.deploy.verify import Verification
from edgecompress.deploy.verify import verify as check
from edgecompress.errors import ConfigurationError, machine_faults
from edgecompress.findings import (
    Int8Diagnosis,
    SearchResult,
    Sensitivity,
    diagnosis_result,
    search_result,
    sensitivity_result,
)
from edgecompress.pipeline import Outcome
from edgecompress.results import BundleResult, Comparison, ReportFiles, RunResult, comparison_result, read_result
from edgecompress.run_directory import open_run as find_run
from edgecompress.searching.order import SearchOrder
from edgecompress.settings.target import load_target
from edgecompress.steps.debug_run import FILE as DEBUG_FILE
from edgecompress.steps.sensitivity_run import FILE as SENSITIVITY_FILE

Name = str | os.PathLike[str]
Run = RunResult | Name
Thoroughness = Literal["quick", "standard", "thorough"]


def run(
    recipe: Name,
    *,
    target: Name | Sequence[Name],
    settings: Mapping[str, object] | None = None,
    output: Name | None = None,
    resume: bool = False,
    cache: Name | None = None,
    with_preprocessing: bool = False,
    seconds: float | None = None,
    thoroughness: Thoroughness = "standard",
    progress: bool = False,
) -> RunResult:
    """Apply a recipe, export with int8, profile and report, for one target or several.

    `recipe` and `target` are files or shipped names. `settings` overrides the recipe's fields by dotted path, as
    `--set` does: `{"data.root": "my_images", "stages.pruned.channel_ratio": 0.3}`. `output` is the run directory to
    make, left out one under `runs/`; with `resume` an unfinished run there goes on. `cache` is a folder from which
    finished stages are taken, and in which they are kept. `with_preprocessing` makes files that take uint8 images of
    any size. `seconds` bounds the time for which latency is measured. `progress` shows on stderr what the command line
    shows.
    """
    targets = [target] if isinstance(target, str | os.PathLike) else list(target)
    if not targets:
        raise ConfigurationError("target: none given; give a name such as 'x86', or a list of them")
    names, overrides = [os.fspath(name) for name in targets], _overrides(settings)
    words = [word for name in names for word in ("--target", name)] + ["--with-preprocessing"] * with_preprocessing
    with _call(progress):
        return _result(
            pipeline.run(
                os.fspath(recipe),
                targets=names,
                overrides=overrides,
                output=_path(output),
                resume=resume,
                cache=_path(cache),
                with_preprocessing=with_preprocessing,
                seconds=seconds,
                thoroughness=_known(thoroughness),
                command=_command("run", recipe, words, overrides, output),
            )
        )


def apply(
    recipe: Name,
    *,
    target: Name | None = None,
    settings: Mapping[str, object] | None = None,
    output: Name | None = None,
    resume: bool = False,
    cache: Name | None = None,
    progress: bool = False,
) -> RunResult:
    """Apply a recipe's stages in PyTorch; its int8 is made for `target`, left out for this machine."""
    overrides = _overrides(settings)
    words = [] if target is None else ["--target", os.fspath(target)]
    with _call(progress):
        return _result(
            pipeline.apply(
                os.fspath(recipe),
                target=_name(target),
                overrides=overrides,
                output=_path(output),
                resume=resume,
                cache=_path(cache),
                command=_command("apply", recipe, words, overrides, output),
            )
        )


def export(
    run: Run | None = None,
    *,
    target: Name | None = None,
    int8: bool = False,
    with_preprocessing: bool = False,
    ort: bool = False,
    softmax: bool = False,
    top_k: int | None = None,
    settings: Mapping[str, object] | None = None,
    progress: bool = False,
) -> RunResult:
    """Write a run's ONNX files and check that they answer as PyTorch does, on real images.

    `run` is a result, a run directory, or left out the newest under `runs/`. `with_preprocessing` makes files that take
    uint8 images of any size; `ort` writes ONNX Runtime's own format beside them; `softmax` and `top_k` add outputs
    behind the logits.
    """
    with _call(progress):
        return _result(
            pipeline.export(
                _run_path(run),
                target=_name(target),
                int8=int8,
                with_preprocessing=with_preprocessing,
                ort=ort,
                softmax=softmax,
                top_k=top_k,
                overrides=_overrides(settings),
            )
        )


def profile(
    run: Run | None = None,
    *,
    target: Name,
    seconds: float | None = None,
    thoroughness: Thoroughness = "standard",
    sweep: str | None = None,
    providers: str | None = None,
    host: str | None = None,
    host_python: str | None = None,
    ssh: str = "ssh",
    results: Name | None = None,
    progress: bool = False,
) -> RunResult:
    """Measure a run's exported files on a target and judge them; the profile is `result.profiles[name of target]`.

    With `host`, or where the target names one, the device at the other end of SSH measures. `results` is what a
    bundle's bench.py wrote on a device. `sweep` and `providers` are as on the command line.
    """
    if host is not None and results is not None:
        raise ConfigurationError("host and results: give one of them; the first measures, the second has")
    with _call(progress):
        device = (
            None if results is not None else Host.of(load_target(os.fspath(target)), host, python=host_python, ssh=ssh)
        )
        return _result(
            pipeline.profile(
                _run_path(run),
                target=os.fspath(target),
                seconds=seconds,
                thoroughness=_known(thoroughness),
                sweep=sweep,
                providers=providers,
                host=device,
                results=_path(results),
            )
        )


def report(run: Run | None = None, *, target: Name | None = None, progress: bool = False) -> RunResult:
    """Write the report of one target, or of every target that was profiled: `result.reports[name of target]`."""
    with _call(progress):
        return _result(pipeline.report(_run_path(run), target=_name(target)))


def compare(*runs: Run, target: Name | None = None, output: Name | None = None, progress: bool = False) -> Comparison:
    """Compare runs, on one target or on all that they were profiled on, and write the page.

    `output` is the folder to write into, left out a new one under `runs/`.
    """
    paths = [run.path if isinstance(run, RunResult) else Path(run) for run in runs]
    with _call(progress):
        document, made = pipeline.compare(paths, target=_name(target), output=_path(output))
    assert made.html is not None
    assert made.markdown is not None
    assert made.json is not None
    return comparison_result(document, ReportFiles(made.html, made.markdown, made.json))


def bundle(
    run: Run | None = None,
    *,
    target: Name,
    output: Name | None = None,
    preprocessing: bool = True,
    progress: bool = False,
) -> BundleResult:
    """Write one folder and one archive that a device runs with numpy and ONNX Runtime alone.

    `output` is the folder to write into, left out the run's own `bundle/`. With `preprocessing` the models take uint8
    images of any size.
    """
    with _call(progress):
        outcome, made = pipeline.bundle(
            _run_path(run), target=os.fspath(target), output=_path(output), preprocessing_inside=preprocessing
        )
    return BundleResult(made.folder, made.archive, made.caution, tuple(outcome.missed), made.manifest)


def verify(path: Run | BundleResult, *, progress: bool = False) -> Verification:
    """Check a bundle, its archive or a run directory against its manifest, and a bundle's answers; see `.ok`."""
    place = path.folder if isinstance(path, BundleResult) else path.path if isinstance(path, RunResult) else path
    with _call(progress):
        return check(Path(place))


def search(
    recipe: Name,
    *,
    target: Name,
    max_accuracy_drop: float,
    minimize: Literal["latency", "size", "memory"] = "latency",
    trials: int | None = None,
    seconds: float | None = None,
    settings: Mapping[str, object] | None = None,
    output: Name | None = None,
    resume: bool = False,
    storage: str | None = None,
    cache: Name | None = None,
    warm_start: Sequence[Name] = (),
    progress: bool = False,
) -> SearchResult:
    """Try a recipe's settings on a target; `result.pick` is the run to ship, of those that lose no more than allowed.

    `max_accuracy_drop` is a fraction of val: 0.01 is one point. `trials` and `seconds` are limits, of which the first
    one reached ends the search; without both there are 20 trials. A field of `settings` may be
    `{"search": [0.2, 0.7]}`. `output` is the search's folder, left out a new one under `runs/`; with `resume` a search
    there goes on. The rest is as on the command line.
    """
    overrides = _overrides(settings)
    words = ["--target", os.fspath(target), "--max-accuracy-drop", f"{max_accuracy_drop:g}", "--minimize", minimize]
    words += [] if trials is None else ["--trials", str(trials)]
    words += [] if seconds is None else ["--time", f"{seconds:g}s"]
    with _call(progress):
        order = SearchOrder(
            source=os.fspath(recipe),
            overrides=tuple(overrides),
            target=load_target(os.fspath(target)),
            max_accuracy_drop=max_accuracy_drop,
            minimize=minimize,
            trials=trials,
            seconds=seconds,
            storage=storage,
            cache=_path(cache),
            warm_starts=tuple(Path(place) for place in warm_start),
            command=_command("search", recipe, words, overrides, output),
        )
        document = pipeline.search(order, output=_path(output), resume=resume)
    return search_result(Path(document["folder"]), document)


def sensitivity(
    run: Run | None = None,
    *,
    what: Literal["int8", "channels", "both"] = "both",
    target: Name | None = None,
    images: int | None = None,
    macs_ratio: float = 0.5,
    latency: bool = True,
    progress: bool = False,
) -> Sensitivity:
    """Measure what int8 costs in each layer of a run, and what each group of channels is worth.

    `images` are of val, left out 32 for int8 and 256 for channels. `macs_ratio` is the share of the MACs that the
    proposed `layer_ratios` remove. `latency` also times each group cut by half, where the target is at hand.
    """
    if what not in ("int8", "channels", "both"):
        raise ConfigurationError(f"what: {what!r} is unknown; give 'int8', 'channels' or 'both'")
    _require_positive("images", images)
    if not 0 < macs_ratio < 1:
        raise ConfigurationError(f"macs_ratio: {macs_ratio:g} is no fraction between 0 and 1")
    with _call(progress):
        outcome, _ = pipeline.sensitivity(
            _run_path(run), what=what, target=_name(target), images=images, macs_ratio=macs_ratio, timed=latency
        )
    return sensitivity_result(outcome.run.stage(outcome.int8_stage) / SENSITIVITY_FILE)


def debug_int8(
    run: Run | None = None,
    *,
    target: Name | None = None,
    images: int = 32,
    worst: int = 5,
    progress: bool = False,
) -> Int8Diagnosis:
    """Name the `worst` layers that lose most by int8, why, and the setting that mends each; on `images` of val."""
    _require_positive("images", images)
    _require_positive("worst", worst)
    with _call(progress):
        outcome, _ = pipeline.debug_int8(_run_path(run), target=_name(target), images=images, worst=worst)
    return diagnosis_result(outcome.run.stage(outcome.int8_stage) / DEBUG_FILE)


def open_run(run: Name | None = None) -> RunResult:
    """The results of a run that is there; left out, the newest under `runs/`. Nothing is done."""
    return read_result(find_run(_path(run)))


@contextmanager
def _call(progress: bool) -> Iterator[None]:
    """What holds while a function of this module works, and is put back afterwards."""
    with machine_faults(), console.quiet(not progress), console.library_logs_silenced():
        yield


def _result(outcome: Outcome) -> RunResult:
    return read_result(outcome.run, is_first_process=outcome.is_first_process)


def _overrides(settings: Mapping[str, object] | None) -> list[str]:
    """`--set`'s words. JSON is YAML, so every value that JSON has keeps its type. Raises ConfigurationError."""
    words = []
    for path, value in (settings or {}).items():
        try:
            words.append(f"{path}={json.dumps(value, ensure_ascii=False, allow_nan=False, default=os.fspath)}")
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"settings: {path}: {value!r} is no value for a recipe; give numbers, text, paths, lists or mappings"
            ) from error
    return words


def _command(name: str, recipe: Name, words: list[str], overrides: list[str], output: Name | None) -> str:
    """The command that does the same, for run.json and the report."""
    rest = [word for override in overrides for word in ("--set", override)]
    place = [] if output is None else ["--output", os.fspath(output)]
    return shlex.join(["edgecompress", name, os.fspath(recipe), *words, *rest, *place])


def _known(thoroughness: str) -> str:
    if thoroughness not in ("quick", "standard", "thorough"):
        raise ConfigurationError(f"thoroughness: {thoroughness!r} is unknown; give 'quick', 'standard' or 'thorough'")
    return thoroughness


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigurationError(f"{name}: {value} is too few; give 1 or more")


def _run_path(run: Run | None) -> Path | None:
    return run.path if isinstance(run, RunResult) else _path(run)


def _path(name: Name | None) -> Path | None:
    return None if name is None else Path(name)


def _name(name: Name | None) -> str | None:
    return None if name is None else os.fspath(name)
