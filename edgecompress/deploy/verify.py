"""`verify`: a bundle, its archive or a run directory against its manifest.

What enters: a path from anywhere. What leaves: every file that is missing, changed, unexpected or refused, and for a
bundle what its self-test gives. Nothing that comes with the bundle is run but its models, in ONNX Runtime: the
self-test is this package's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from edgecompress.deploy.archive import READ_ERRORS, refusals, unpack
from edgecompress.device.infer import MANIFEST, BundleError, read_manifest, self_test, self_test_lines
from edgecompress.errors import ModelError, RunError
from edgecompress.run_directory import Json, open_run, sha256_of
from edgecompress.settings.gates import begun_exports

_RUN_FILES_WITHOUT_HASH = {"run.json", "metrics.jsonl"}


@dataclass(frozen=True)
class Verification:
    """What was found; paths are relative to the bundle or run. `self_test` is None where none was made."""

    path: str
    kind: Literal["bundle", "archive", "run"]
    files: int
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    self_test: list[Json] | None = None
    self_test_error: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is as the manifest says, and the self-test passed."""
        faults = self.missing or self.changed or self.unexpected or self.refused or self.self_test_error
        return not faults and all(row["passed"] for row in self.self_test or [])

    def to_dict(self) -> Json:
        """Ready for JSON, `ok` first."""
        return {"ok": self.ok, **asdict(self)}

    def lines(self) -> list[str]:
        """The result for people."""
        lines = [f"{fault}: {name}" for fault in ("missing", "changed", "unexpected") for name in getattr(self, fault)]
        lines += [f"refused: {reason}" for reason in self.refused]
        lines += [f"note: {note}" for note in self.notes]
        if self.self_test is not None:
            lines += [f"self-test {line}" for line in self_test_lines(self.self_test)]
        elif self.self_test_error is not None:
            lines.append(f"self-test FAILED: {self.self_test_error}")
        elif self.kind != "run":
            lines.append("self-test not made: the files are not those of the manifest")
        verdict = "verified" if self.ok else "NOT VERIFIED"
        return [*lines, f"{verdict}: {self.kind} {self.path}, {self.files} files in its manifest"]


def verify(path: Path) -> Verification:
    """Check a bundle's folder, its archive or a run directory. Raises RunError when `path` is none of these."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        holds_run, holds_bundle = (path / "run.json").is_file(), (path / MANIFEST).is_file()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    if is_file:
        return _verify_archive(path)
    if not is_folder:
        raise RunError(f"{path}: no such file or folder; give a bundle, its archive or a run directory")
    if holds_run:
        return _verify_run(path)
    if holds_bundle:
        return _verify_bundle(path, str(path), "bundle")
    raise RunError(f"{path}: neither a bundle (no {MANIFEST}) nor a run directory (no run.json)")


def _verify_archive(path: Path) -> Verification:
    try:
        refused = refusals(path)
    except READ_ERRORS as error:
        raise RunError(f"{path}: is no .tar.gz that can be read to its end: {error}") from error
    if refused:
        return Verification(str(path), "archive", 0, refused=refused)
    with tempfile.TemporaryDirectory(prefix="edgecompress-verify-") as folder:
        try:
            top = unpack(path, Path(folder))
        except READ_ERRORS as error:
            raise RunError(f"{path}: cannot be unpacked: {error}") from error
        return _verify_bundle(top, str(path), "archive")


def _verify_bundle(folder: Path, shown: str, kind: Literal["bundle", "archive"]) -> Verification:
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        raise RunError(f"{shown}: is no bundle: {error}") from error
    fault = _damage(manifest)
    if fault is not None:
        raise RunError(f"{shown}: {MANIFEST} is damaged: {fault}")
    recorded = {name: str(facts["sha256"]) for name, facts in manifest["files"].items()}
    found = _compare(folder, recorded, without_hash={MANIFEST})
    rows, problem = None, None
    if found.ok:
        try:
            _require_whole_models(folder, manifest)
            rows = self_test(folder)
        except (BundleError, KeyError, TypeError, ValueError, IndexError, OSError) as error:
            problem = str(error) if isinstance(error, BundleError) else f"{MANIFEST} does not fit: {error!r}"
    return replace(found, path=shown, kind=kind, self_test=rows, self_test_error=problem)


def _verify_run(path: Path) -> Verification:
    manifest = open_run(path).read_manifest()
    recorded = manifest.get("artifacts")
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise RunError(f"{path}: run.json names no artifacts; it is damaged")
    outside = [name for name in recorded if not _stays_inside(name)]
    if outside:
        raise RunError(f"{path}: run.json names '{outside[0]}', which is not inside of the run; it is damaged")
    found = _compare(path, recorded, without_hash=_RUN_FILES_WITHOUT_HASH, with_hidden=False)
    status = manifest["status"]
    notes = [] if status == "complete" else [f"the run's status is '{status}': its manifest may be behind its files"]
    notes += begun_exports(manifest).values()
    return replace(found, notes=notes)


def _compare(
    folder: Path, recorded: Mapping[str, str], *, without_hash: set[str], with_hidden: bool = True
) -> Verification:
    """Files of a folder against their hashes. A link counts as unexpected, wherever it leads.

    A run's hidden files are what interrupted commands left to go on with; they are no results, and have no hash.
    """
    present: dict[str, Path] = {}
    odd: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not with_hidden and any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            odd.append(name)
        elif path.is_file():
            present[name] = path
    return Verification(
        path=str(folder),
        kind="run",
        files=len(recorded),
        missing=[name for name in recorded if name not in present],
        changed=[name for name, digest in recorded.items() if name in present and sha256_of(present[name]) != digest],
        unexpected=odd + [name for name in present if name not in recorded and name not in without_hash],
    )


def _damage(manifest: Json) -> str | None:
    """What makes a manifest unusable; None where it can be worked with."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return "it names no files"
    for name, facts in files.items():
        if not _stays_inside(name):
            return f"'{name}' is no path inside of the bundle"
        if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            return f"'{name}' has no sha256"
    used = _used_files(manifest)
    unlisted = [name for name in used if not isinstance(name, str) or name not in files]
    return f"it uses '{unlisted[0]}', which is none of its files" if unlisted else None


def _used_files(manifest: Json) -> list[Any]:
    """The files that the self-test opens, as far as the manifest is well-formed."""
    try:
        test = manifest["self_test"]
        return [
            manifest["labels"],
            *(model["file"] for model in manifest["models"].values()),
            *(model["logits"] for model in test["models"].values()),
            *(sample["image"] for sample in test["samples"]),
        ]
    except (KeyError, TypeError, AttributeError):
        return ["self_test"]


def _stays_inside(name: Any) -> bool:
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in str(path)


def _require_whole_models(folder: Path, manifest: Json) -> None:
    """A model must bring its own weights: a file that it names could be any file of this machine."""
    from edgecompress.models.onnx_files import read_onnx

    for facts in manifest["models"].values():
        try:
            read_onnx(folder / facts["file"])
        except ModelError as error:
            raise BundleError(str(error)) from error
