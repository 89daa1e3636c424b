"""`bundle`: a run's models as one folder and one archive that a device can use with numpy and ONNX Runtime alone.

What enters: a run directory with its export done, and a target. What leaves: `<recipe>-<target>/` and the same as
.tar.gz, byte for byte the same whenever the same run is bundled by the same version on the same kind of CPU. An archive
of tar and gzip, not zip, because every Linux device unpacks it, with its permissions, and many have no unzip.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgecompress import __version__, console
from edgecompress.data.preprocessing import Preprocessing
from edgecompress.deploy.bundle_text import model_facts_header, readme_text
from edgecompress.deploy.expected_results import write_expected
from edgecompress.device.infer import KIND, MANIFEST, SCHEMA_VERSION, BundleError, self_test
from edgecompress.errors import ExportError, ModelError, RunError
from edgecompress.exporting.parity import without_parity
from edgecompress.exporting.preprocessing_graph import PIXEL_FORM, embed_preprocessing, input_form
from edgecompress.exporting.samples import read_prepared
from edgecompress.models.onnx_files import read_onnx
from edgecompress.run_directory import Json, RunDirectory, is_plain_name, read_json, sha256_of, to_json
from edgecompress.settings.gates import missed_gates
from edgecompress.settings.target import Target

PACKAGE = Path(__file__).resolve().parent.parent
# The package's own modules that infer.py and bench.py import on the device, copied as they are.
DEVICE_MODULES = (
    *("__init__", "console", "errors", "machine", "data/__init__", "data/preprocessing", "measure/__init__"),
    *("measure/answers", "measure/latencies", "measure/measure_worker", "measure/measuring", "measure/statistics"),
)
PYTHON_MIN = "3.9"
_MODELS = {"baseline": "baseline.onnx", "fp32": "model.onnx", "int8": "model.int8.onnx"}
_EPOCH = 315_532_800  # 1980-01-01: the earliest time that no archive tool calls implausible


@dataclass(frozen=True)
class Bundle:
    """What `bundle` wrote. `caution` says in one line why the bundle may not be shipped as it is; None where it may."""

    folder: Path
    archive: Path
    manifest: Json
    caution: str | None
    self_test: list[Json]


def write_bundle(
    run: RunDirectory, target: Target, *, exported: Path, output: Path, preprocessing_inside: bool = True
) -> Bundle:
    """Write `<recipe>-<target>/` and its archive into `output`; `exported` is the folder of this target's ONNX files.

    A bundle of the same run that is already there is replaced. Raises RunError when nothing was exported, or when
    something else has the name.
    """
    manifest = run.read_manifest()
    if not is_plain_name(manifest.get("recipe_name")):
        raise RunError(f"{run.manifest_path}: has no recipe_name that a folder could have; it is damaged")
    name = f"{manifest['recipe_name']}-{target.name}"
    folder, archive = output / name, output / f"{name}.tar.gz"
    _require_room(folder, archive, manifest)
    try:
        output.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=output)
    except OSError as error:
        raise RunError(f"{output}: cannot be written: {error.strerror}; choose another --output") from error
    with scratch:
        made = Path(scratch.name) / name
        made.mkdir()
        document = fill_folder(
            made, run, target, exported=exported, name=name, preprocessing_inside=preprocessing_inside
        )
        pack(made, made.with_suffix(".tar.gz"))
        # The old ones go whole, the archive first: whatever a crash leaves here, the next command may replace.
        old = Path(scratch.name) / "old"
        old.mkdir()
        with run.replacing(output):
            for path in (archive, folder):
                if path.exists():
                    path.rename(old / path.name)
            made.rename(folder)
            made.with_suffix(".tar.gz").rename(archive)
    with console.busy("running the bundle's self-test"):
        rows = self_test(folder)
    return Bundle(folder, archive, document, caution(document), rows)


def fill_folder(
    folder: Path,
    run: RunDirectory,
    target: Target,
    *,
    exported: Path,
    name: str,
    preprocessing_inside: bool,
    with_baseline: bool = False,
) -> Json:
    """Write a bundle's files into an empty folder; returns the manifest. Raises RunError when nothing was exported."""
    manifest = run.read_manifest()
    sources = {key: exported / file for key, file in _MODELS.items() if key != "baseline" or with_baseline}
    present = {key: path for key, path in sources.items() if path.is_file()}
    stored = exported / "samples.npy"
    if "fp32" not in present or not stored.is_file():
        raise RunError(
            f"{run.path}: nothing exported for target {target.name}; "
            f"first: edgecompress export {run.path} --int8 --target {target.name}"
        )
    metadata = _metadata(present["fp32"])
    preprocessing = Preprocessing.from_dict(metadata["preprocessing"])
    models = {
        key: _write_model(path, folder / path.name, preprocessing, inside=preprocessing_inside)
        for key, path in present.items()
    }
    _copy_scripts(folder)
    (folder / "labels.txt").write_text("".join(f"{_one_line(label)}\n" for label in metadata["labels"]), "utf-8")
    document: Json = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "target": target.name,
        "target_description": target.description,
        "recipe": {"name": manifest["recipe_name"], "sha256": metadata["recipe_sha256"]},
        "run": {"started_at": manifest.get("started_at"), "seed": manifest.get("seed")},
        "made_with": {"edgecompress": __version__, "export": metadata["versions"]},
        "onnxruntime_min": target.onnxruntime_min,
        "python_min": PYTHON_MIN,
        "verdict": _verdict(run, target, manifest, exported),
        "default_model": "int8" if "int8" in models else "fp32",
        "labels": "labels.txt",
        "classes": len(metadata["labels"]),
        "preprocessing": metadata["preprocessing"],
        "models": models,
        "measuring": {
            "threads": target.threads,
            "providers": list(target.providers),
            "session": target.session_settings(),
        },
    }
    write_manifest(folder, document)
    try:
        document["self_test"] = write_expected(folder, document, read_prepared(exported))
    except BundleError as error:
        raise RunError(
            f"{run.path}: its exported files give no answers to prove: {error}; export them again"
        ) from error
    (folder / "cpp" / "model_facts.h").write_text(model_facts_header(document), "utf-8")
    (folder / "README.md").write_text(readme_text(document, caution(document)), "utf-8")
    document["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_manifest(folder, document)
    return document


def write_manifest(folder: Path, document: Json) -> None:
    """Write manifest.json."""
    (folder / MANIFEST).write_text(to_json(document), "utf-8")


def caution(document: Json) -> str | None:
    """Why a bundle may not be shipped as it is, in one line; None where nothing speaks against it."""
    verdict = document["verdict"]
    if verdict["gates_missed"]:
        return f"DO NOT SHIP: a gate was missed: {' '.join(verdict['gates_missed'])}"
    if verdict["verdict"] == "hold":
        return f"DO NOT SHIP: the verdict for {document['target']} is hold: {' '.join(verdict['missed'])}"
    if verdict["verdict"] is None:
        return " ".join([f"Not profiled for {document['target']}, so there is no verdict yet.", *verdict["reasons"]])
    if not verdict["measured"]:
        return f"Nothing was measured on {document['target']} itself; its verdict is {verdict['verdict']}."
    return None if verdict["verdict"] == "ship" else f"The verdict for {document['target']} is {verdict['verdict']}."


def pack(folder: Path, archive: Path) -> None:
    """Write `folder` as .tar.gz whose bytes depend on nothing but names, contents and executable bits."""
    with archive.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for path in [folder, *sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix())]:
                entry = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
                entry.mtime = _EPOCH
                if path.is_dir():
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
                    continue
                entry.mode, entry.size = path.stat().st_mode & 0o755 | 0o644, path.stat().st_size
                with path.open("rb") as stream:
                    tar.addfile(entry, stream)


def _require_room(folder: Path, archive: Path, manifest: Json) -> None:
    """Refuse to replace anything but a bundle of the same run."""
    try:
        if folder.is_symlink() or archive.is_symlink() or (archive.exists() and not archive.is_file()):
            raise RunError(f"{archive}: is in the way and no bundle of this run; choose another --output")
        if not folder.exists():
            if archive.exists():
                raise RunError(f"{archive}: is in the way, without its folder; remove it or choose another --output")
            return
        there = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {error.strerror}; choose another --output") from error
    if there.get("kind") != KIND or there.get("run", {}).get("started_at") != manifest.get("started_at"):
        raise RunError(f"{folder}: is no bundle of this run, and is not overwritten; choose another --output")
    known = {*there.get("files", {}), MANIFEST}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    foreign = [name for name in found if name not in known and "__pycache__" not in name]
    if foreign:
        raise RunError(f"{folder / foreign[0]}: is no file of the bundle; move it away, or choose another --output")


def _metadata(path: Path) -> Json:
    """What the export wrote into the file: preprocessing, labels, recipe and versions. Raises RunError."""
    entries = {entry.key.removeprefix("edgecompress."): entry.value for entry in read_onnx(path).metadata_props}
    missing = [key for key in ("preprocessing", "labels", "recipe_sha256", "versions") if key not in entries]
    if missing:
        raise RunError(f"{path}: says nothing about {', '.join(missing)}; export it again")
    try:
        facts: Json = {key: json.loads(entries[key]) for key in ("preprocessing", "labels", "versions")}
        Preprocessing.from_dict(facts["preprocessing"])
    except (ValueError, RecursionError, ModelError) as error:
        raise RunError(f"{path}: what it says of itself cannot be read: {error}; export it again") from error
    labels = facts["labels"]
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise RunError(f"{path}: its labels are no list of names; export it again")
    return {**facts, "recipe_sha256": entries["recipe_sha256"]}


def _write_model(source: Path, path: Path, preprocessing: Preprocessing, *, inside: bool) -> Json:
    """The model as it ships, and how it is called."""
    model = read_onnx(source)
    try:
        if inside and input_form(model) != PIXEL_FORM:
            model = embed_preprocessing(model, preprocessing)
            onnx.save(model, str(path))
        else:
            shutil.copyfile(source, path)
        return {
            "file": path.name,
            "input": _signature(model.graph.input[0]),
            "output": _signature(model.graph.output[0]),
        }
    except (ExportError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{source}: is not as the export writes it ({error}); export it again") from error


def _signature(value: onnx.ValueInfoProto) -> Json:
    tensor = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "shape": shape,
    }


def _copy_scripts(folder: Path) -> None:
    for name in ("infer.py", "bench.py"):
        shutil.copyfile(PACKAGE / "device" / name, folder / name)
        (folder / name).chmod(0o755)
    for module in DEVICE_MODULES:
        copy = folder / "edgecompress" / f"{module}.py"
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(PACKAGE / f"{module}.py", copy)
    (folder / "cpp").mkdir()
    for name in ("CMakeLists.txt", "classify.cpp"):
        shutil.copyfile(PACKAGE / "device" / "cpp" / name, folder / "cpp" / name)


def _one_line(label: str) -> str:
    """A label as one line; a folder's name may hold any character."""
    return label.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if set(label) & set("\n\r") else label


def _verdict(run: RunDirectory, target: Target, manifest: Json, exported: Path) -> Json:
    profile, stale = run.read_profile(target.name) or {}, run.stale_profile(target.name)
    judged = [target.name] if profile.get("measured") else []
    missed = [*without_parity(exported), *missed_gates(manifest, target.name, without_speed_on=judged)]
    return {
        "verdict": profile.get("verdict"),
        "measured": bool(profile.get("measured")),
        "reasons": [stale] if stale else list(profile.get("reasons", [])),
        "missed": list(profile.get("missed", [])),
        "gates_missed": missed,
    }
