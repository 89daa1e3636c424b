"""A run directory in, typed results out: what the Python API returns.

What enters: the JSON files of a run. What leaves: frozen dataclasses, whose accuracies and latencies carry their 95 %
intervals. They are read from the run's own files, so a run made on the command line and one made here give the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgecompress.errors import RunError
from edgecompress.run_directory import Json, RunDirectory, read_json
from edgecompress.settings.gates import begun_exports, missed_gates

_FILES = {"baseline": "baseline.onnx", "fp32": "model.onnx", "int8": "model.int8.onnx"}


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval, from `low` to `high`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class StageResult:
    """One stage of a run. `accuracy` is a fraction of the images of `accuracy_split`; None until it is complete."""

    id: str
    kind: str
    status: str
    path: Path
    accuracy: Estimate | None
    accuracy_split: str | None
    params: int | None
    macs: int | None
    sparsity: float | None
    size_bytes: int | None
    seconds: float | None
    summary: str | None


@dataclass(frozen=True)
class Parity:
    """How far the exported files of a target answer as PyTorch does; fractions of `samples` images of `split`.

    What is about int8 is None where no int8 file was exported. `path` is the parity.json with everything else.
    """

    target: str
    path: Path
    split: str
    samples: int
    passed: bool
    fp32_max_abs_diff: float
    fp32_top1_agreement: float
    int8_top1_agreement: float | None
    int8_sqnr_db: float | None
    accuracy_fp32: float | None
    accuracy_int8: float | None


@dataclass(frozen=True)
class MeasuredModel:
    """One file on a target. Times and memory are None where the target was not at hand: none is ever made up."""

    name: str
    path: Path
    size_bytes: int
    latency_ms: Estimate | None
    """The median of single inferences."""
    latency_ms_p90: Estimate | None
    latency_ms_p99: Estimate | None
    throughput_per_s: float | None
    load_ms: float | None
    first_inference_ms: float | None
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class Profile:
    """What was measured on a target, and the verdict. `models` has `baseline`, `fp32` and `int8`, those there are.

    `int8_speedup` is the latency of fp32 over that of int8, `end_to_end_speedup` that of the baseline over that of the
    last model. `document` is all of profile/<target>.json, at `path`.
    """

    target: str
    path: Path
    measured: bool
    verdict: Literal["ship", "hold", "inconclusive"]
    reasons: tuple[str, ...]
    missed: tuple[str, ...]
    models: dict[str, MeasuredModel]
    int8_speedup: Estimate | None
    end_to_end_speedup: Estimate | None
    int8_mac_coverage: float | None
    document: Json = field(repr=False)


@dataclass(frozen=True)
class ReportFiles:
    """A target's report: the page, the same for a pull request, and the same for machines."""

    html: Path
    markdown: Path
    json: Path


@dataclass(frozen=True)
class RunResult:
    """A run directory as it stands: its stages, and by target its parity, profile and report.

    `missed` says in sentences which gates and budgets the run misses; it is empty where nothing speaks against
    shipping. `manifest` is all of run.json.
    """

    path: Path
    status: str
    stages: tuple[StageResult, ...]
    baseline_accuracy: Estimate | None
    parity: dict[str, Parity]
    profiles: dict[str, Profile]
    reports: dict[str, ReportFiles]
    missed: tuple[str, ...]
    manifest: Json = field(repr=False)
    is_first_process: bool = True
    """False in a process that was launched beside the first one: it trained along, and its files are gone."""

    def stage(self, stage_id: str) -> StageResult:
        """The stage of that id. Raises KeyError."""
        found = {stage.id: stage for stage in self.stages}
        if stage_id not in found:
            raise KeyError(f"{self.path} has no stage '{stage_id}'; its stages: {', '.join(found)}")
        return found[stage_id]


@dataclass(frozen=True)
class BundleResult:
    """A bundle: its folder, and the same as one archive.

    `caution` says in a line why it may not be shipped as it is, and `missed` lists every reason; None and empty where
    nothing speaks against it.
    """

    folder: Path
    archive: Path
    caution: str | None
    missed: tuple[str, ...]
    manifest: Json = field(repr=False)


@dataclass(frozen=True)
class Candidate:
    """One of the models compared: a run on a target."""

    name: str
    run: Path
    target: str
    verdict: str | None


@dataclass(frozen=True)
class Comparison:
    """Several models side by side. `sentence` says which is better for which budget, `notes` what makes that mean less.

    Differences are against `reference`, the first candidate; each with its interval in `document`, all of the JSON.
    """

    sentence: str
    reference: str
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    files: ReportFiles
    document: Json = field(repr=False)


def comparison_result(document: Json, files: ReportFiles) -> Comparison:
    """A comparison's document, typed."""
    return Comparison(
        sentence=str(document["sentence"]),
        reference=str(document["reference"]),
        candidates=tuple(
            Candidate(str(row["name"]), Path(row["run"]), str(row["target"]), row["verdict"])
            for row in document["candidates"]
        ),
        notes=tuple(document["notes"]),
        files=files,
        document=document,
    )


def read_result(run: RunDirectory, *, is_first_process: bool = True) -> RunResult:
    """A run's results from its files. Raises RunError where one of them is damaged."""
    try:
        return _read_result(run, is_first_process)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{run.path}: its JSON files are damaged ({reason}); make the run or its profile again"
        ) from error


def _read_result(run: RunDirectory, is_first_process: bool) -> RunResult:
    manifest = run.read_manifest()
    profiles = {path.stem: _profile(run, path) for path in sorted((run.path / "profile").glob("*.json"))}
    measured = [name for name, profile in profiles.items() if profile.measured]
    missed = missed_gates(manifest, without_speed_on=measured)
    missed += [sentence for profile in profiles.values() for sentence in profile.missed]
    parities = (_parity(path) for path in sorted(run.export.rglob("parity.json")))
    names = sorted(path.stem for path in (run.path / "report").glob("*.html"))
    files = {name: [run.report_path(name, form) for form in ("html", "md", "json")] for name in names}
    return RunResult(
        path=run.path,
        status=str(manifest["status"]),
        stages=tuple(_stage(run, entry) for entry in manifest["stages"]),
        baseline_accuracy=_estimate(manifest.get("baseline") or {}, "accuracy"),
        parity={parity.target: parity for parity in parities if parity.target not in begun_exports(manifest)},
        profiles=profiles,
        reports={name: ReportFiles(*paths) for name, paths in files.items()},
        missed=tuple(dict.fromkeys(missed)),
        manifest=manifest,
        is_first_process=is_first_process,
    )


def _estimate(facts: Json, name: str) -> Estimate | None:
    """`name` and its interval `<name>_ci95`; None where nothing was measured."""
    if facts.get(name) is None:
        return None
    low, high = facts[f"{name}_ci95"]
    return Estimate(float(facts[name]), float(low), float(high))


def _ratio(facts: Any) -> Estimate | None:
    if not facts or facts.get("ratio") is None:
        return None
    low, high = facts["ci95"]
    return Estimate(float(facts["ratio"]), float(low), float(high))


def _stage(run: RunDirectory, entry: Json) -> StageResult:
    facts = ("accuracy_split", "params", "macs", "sparsity", "size_bytes", "seconds", "summary")
    return StageResult(
        id=str(entry["id"]),
        kind=str(entry["kind"]),
        status=str(entry["status"]),
        path=run.stage(str(entry["id"])),
        accuracy=_estimate(entry, "accuracy"),
        **{name: entry.get(name) for name in facts},
    )


def _parity(path: Path) -> Parity:
    document = read_json(path)
    fp32, int8 = document["onnx_fp32"], document.get("onnx_int8") or {}
    return Parity(
        target=str(document["target"]),
        path=path,
        split=str(document["split"]),
        samples=int(document["samples"]),
        passed=not document["failures"],
        fp32_max_abs_diff=float(fp32["max_abs_diff"]),
        fp32_top1_agreement=float(fp32["top1_agreement"]),
        int8_top1_agreement=int8.get("top1_agreement"),
        int8_sqnr_db=int8.get("sqnr_db"),
        accuracy_fp32=int8.get("accuracy_fp32"),
        accuracy_int8=int8.get("accuracy_int8"),
    )


def _profile(run: RunDirectory, path: Path) -> Profile:
    document = read_json(path)
    folder = run.export_for(path.stem)
    return Profile(
        target=str(document["target"]),
        path=path,
        measured=bool(document["measured"]),
        verdict=document["verdict"],
        reasons=tuple(document["reasons"]),
        missed=tuple(document["missed"]),
        models={name: _model(name, folder, facts) for name, facts in document["models"].items()},
        int8_speedup=_ratio(document.get("int8_speedup")),
        end_to_end_speedup=_ratio(document.get("end_to_end_speedup")),
        int8_mac_coverage=document.get("int8_mac_coverage"),
        document=document,
    )


def _model(name: str, folder: Path, facts: Json) -> MeasuredModel:
    latency = facts["latency_ms"]
    plain = ("size_bytes", "throughput_per_s", "load_ms", "first_inference_ms", "peak_rss_bytes")
    return MeasuredModel(
        name=name,
        path=folder / _FILES[name],
        latency_ms=_estimate(latency, "p50"),
        latency_ms_p90=_estimate(latency, "p90"),
        latency_ms_p99=_estimate(latency, "p99"),
        **{key: facts[key] for key in plain},
    )
