"""Every kind of file that the tool reads, made bad by chance and given to the command that reads it.

    python tests/bad_files.py --inputs 5000      # a table by kind; ends with 1 where anything was found

What enters: how many inputs, and a seed. What leaves: for each kind how many were accepted, how many refused with one
message that names the file, and what may never be: a traceback, a dead or hanging process, a wrong "ok". The inputs are
worked off by a process of its own, so that a crash of a library or an endless loop is seen and counted.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import multiprocessing.connection
import random
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google.protobuf.message

import mutation

HANG_SECONDS = 10.0
_SLICE_SECONDS = 0.25
GOOD, REFUSED = "accepted", "refused"
FAULTS = ("traceback", "hang", "died", "wrong ok", "unnamed", "exit code")
Changed = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Finding:
    """What one bad input led to; `detail` is the message, or the traceback."""

    kind: str
    seed: int
    outcome: str
    detail: str = ""


@dataclass
class Kind:
    """A kind of input: good files, how they are made bad, and who reads them.

    `make` writes the good files; `targets` are those that are changed; `read` gives one of them to the tool.
    """

    make: Callable[[Path], None]
    targets: Callable[[Path], Sequence[Path]]
    changed: Changed
    read: Callable[[Path, Path, random.Random], tuple[str, str]]
    weight: int = 1
    good: dict[Path, bytes] = field(default_factory=dict)

    def attempt(self, name: str, folder: Path, seed: int) -> Finding:
        """Make one file bad, have it read, put it back."""
        if not self.good:
            folder.mkdir(parents=True)
            self.make(folder)
            good = {path: path.read_bytes() for path in self.targets(folder)}
            for path in good:  # what is good must be accepted, or refusing it proves nothing
                outcome, detail = self.read(folder, path, random.Random(0))
                assert outcome in (GOOD, "wrong ok"), f"{path.name}: {outcome}: {detail}"
            self.good = good
        chance = random.Random(f"{name}:{seed}")
        path = chance.choice(sorted(self.good))
        content = self.good[path]
        while content == self.good[path]:
            content = self.changed(self.good[path], chance)
        path.write_bytes(content)
        try:
            outcome, detail = self.read(folder, path, chance)
            return Finding(name, seed, outcome, detail)
        except Exception:
            return Finding(name, seed, "traceback", traceback.format_exc())
        finally:
            path.write_bytes(self.good[path])


# ---- readers: the command itself, or a function with the same end as a command


def command(path: Path, *arguments: str | Path, named: str | None = None) -> tuple[str, str]:
    """Give a command in this process. What is refused must be said in one message that names the file."""
    from typer.testing import CliRunner

    from edgecompress import cli

    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        words = "".join(traceback.format_exception(result.exception))
        return "traceback", f"{arguments}: {words}"
    if result.exit_code in (0, 3):
        return GOOD, result.stdout
    if result.exit_code not in (1, 2):
        return "exit code", f"{arguments}: {result.exit_code}\n{result.output}"
    if "error: " not in result.stderr:  # verify: what differs stands on stdout
        return REFUSED, result.stdout
    return refusal(result.stderr.partition("error: ")[2], named or path.name)


def refusal(message: str, *names: str) -> tuple[str, str]:
    return (REFUSED, message) if any(name in message for name in names) else ("unnamed", message)


def function(work: Callable[[], Any], *names: str) -> tuple[str, str]:
    """Do what a command would do, and end as it would: the tool's own errors are messages, all others are faults."""
    from edgecompress.errors import EdgeCompressError

    try:
        work()
    except EdgeCompressError as error:
        if error.exit_code not in (1, 2):
            return "exit code", str(error)
        return refusal(str(error), *names)
    return GOOD, ""


# ---- recipes and targets


RECIPE = """\
name: mine
seed: 3
data: {name: digits, val_fraction: 0.2}
model: {name: resnet8, arguments: {width: 8}}
stages:
  - {id: dense, kind: train, epochs: 2, learning_rate: 0.1, augment: {horizontal_flip: true}}
  - {id: pruned, kind: prune, channel_ratio: 0.4, epochs: 2, teacher: {stage: dense, temperature: 2}}
  - {id: int8, kind: quantize, calibration: {samples: 64, method: entropy}, effort: fast}
gates: {max_accuracy_drop: 0.1}
"""


def _recipe(folder: Path) -> None:
    from edgecompress.shipped import shipped_files

    for path in (file for file in shipped_files("recipes") if "search:" not in file.read_text()):
        shutil.copy(path, folder / path.name)
    (folder / "mine.yaml").write_text(RECIPE)


def _target(folder: Path) -> None:
    from edgecompress.shipped import shipped_files

    for path in shipped_files("targets"):
        shutil.copy(path, folder / path.name)


def _all(pattern: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [path for path in folder.rglob(pattern) if path.is_file()]


# ---- run directories


def _target_here(folder: Path) -> Path:
    from edgecompress.machine import architecture

    path = folder / "here.yaml"
    path.write_text(f"name: here\narchitecture: {architecture()}\n")
    return path


def _report_run(folder: Path) -> None:
    from report_runs import full_run

    run = full_run(folder / "runs" / "run")
    run.update_manifest(lambda m: m.update(artifacts=run.artifacts()))
    shutil.copytree(run.path, folder / "runs" / "other")


def _reported(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    run = folder / "runs" / "run"
    form = chance.choice(("html", "md", "json"))
    arguments: tuple[str | Path, ...] = chance.choice(
        (
            ("report", run, "--format", form),
            ("compare", run, folder / "runs" / "other", "--output", folder / "compared", "--format", form),
            ("verify", run),
            ("runs", "list", "--root", folder / "runs"),
        )
    )
    relative = path.relative_to(run).as_posix()
    try:
        outcome, detail = command(path, *arguments, named="run")
    finally:
        shutil.rmtree(folder / "compared", ignore_errors=True)
        shutil.rmtree(run / "report", ignore_errors=True)
        if "run.json" not in relative:  # report records hashes
            _restore_manifest(run)
    if arguments[0] == "verify" and outcome == GOOD and relative not in ("run.json", "metrics.jsonl"):
        return "wrong ok", f"{relative} was changed, and verify says: {detail}"
    return outcome, detail


_MANIFESTS: dict[Path, bytes] = {}


def _restore_manifest(run: Path) -> None:
    path = run / "run.json"
    good = _MANIFESTS.setdefault(path, path.read_bytes())
    path.write_bytes(good)


def _bundled_run(folder: Path) -> None:
    from bundle_runs import small_run

    small_run(folder / "run")
    _target_here(folder)


def _bundled(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    try:
        return command(path, "bundle", folder / "run", "--target", folder / "here.yaml", "--output", folder / "out")
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


# ---- models


def _stage(folder: Path) -> None:
    import torch

    from edgecompress.data.preprocessing import Preprocessing
    from edgecompress.models.checkpoint import Checkpoint, example_input, save_checkpoint
    from edgecompress.models.model_building import Architecture, build
    from edgecompress.pruning.prune import ChannelPruner
    from edgecompress.settings.prune_settings import PruneStage

    architecture = Architecture("resnet8", {"width": 8}, 10, Preprocessing(8, 1, (0.5,), (0.5,)))
    torch.manual_seed(0)
    module = build(architecture)
    stage = PruneStage.model_validate({"kind": "prune", "id": "p", "channel_ratio": 0.5})
    example = example_input(architecture)
    pruner = ChannelPruner(module, stage=stage, channel_multiple=4, example=example, scoring_batches=[])
    scored = pruner.score()
    pruner.cut_to(pruner.plan(0.5, scored, progress=1.0), scored)
    save_checkpoint(Checkpoint(module.eval(), architecture, pruner.history), folder / "stage")


def _read_stage(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    from edgecompress.models.checkpoint import load_checkpoint

    return function(lambda: load_checkpoint(folder / "stage"), "stage")


def _weights(folder: Path) -> None:
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    state = _net().state_dict()
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "weights.pt")


def _net() -> Any:
    from edgecompress.models.nets import resnet8

    return resnet8(10, 1, width=4, input_size=8)


def _read_weights(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    from edgecompress.models.weights import load_checkpoint

    return function(lambda: load_checkpoint(_net(), path, allow_new_head=True), path.name)


def _onnx_files(folder: Path) -> None:
    from onnx_models import quantized, residual_net

    residual_net(folder / "model.onnx")
    quantized(folder / "model.onnx", folder / "model.int8.onnx")


def _read_onnx(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    from edgecompress.measure.model_files import open_files

    return function(lambda: open_files({"model": path}, {}), path.name)


# ---- bundles


def _bundle(folder: Path) -> None:
    from bundle_runs import here, small_run
    from edgecompress.deploy.bundle import write_bundle

    run = small_run(folder / "run")
    write_bundle(run, here(), exported=run.export, output=folder)


def _verified(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    """Any file of a bundle but its manifest: verify must never say ok."""
    outcome, detail = command(path, "verify", folder / "tiny-here", named="tiny-here")
    return ("wrong ok", f"{path.name}: {detail}") if outcome == GOOD else (outcome, detail)


def _manifested(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    return command(path, "verify", folder / "tiny-here", named="tiny-here")


def _forged(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    """A model, a sample or the logits changed by somebody who puts the hashes right; answers must still fit."""
    from edgecompress.run_directory import sha256_of, write_json

    manifest_path = folder / "tiny-here" / "manifest.json"
    good = manifest_path.read_bytes()
    manifest = json.loads(good)
    manifest["files"][path.relative_to(folder / "tiny-here").as_posix()]["sha256"] = sha256_of(path)
    write_json(manifest_path, manifest)
    try:
        return command(path, "verify", folder / "tiny-here", named="tiny-here")
    finally:
        manifest_path.write_bytes(good)


def _archived(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    good = (folder / "tiny-here.tar.gz.good").read_bytes()
    outcome, detail = command(path, "verify", path)
    if outcome == GOOD and _members(path.read_bytes()) != _members(good):
        return "wrong ok", detail
    return outcome, detail


def _members(content: bytes) -> list[tuple[str, bytes]]:
    """Files of an archive; what a gzip header says besides (a time, a name) is no content."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        return [(m.name, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar if m.isreg()]


def _archive(folder: Path) -> None:
    _bundle(folder)
    shutil.copy(folder / "tiny-here.tar.gz", folder / "tiny-here.tar.gz.good")


def _bench(folder: Path) -> None:
    from edgecompress.device.bench import measure_bundle

    _bundle(folder)
    _target_here(folder)
    results = measure_bundle(folder / "tiny-here", seconds=0.2, thoroughness="quick")
    (folder / "bench.json").write_text(json.dumps(results))


def _judged(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    """What a device sent back, as `profile --results` reads it."""
    from edgecompress.deploy.bench_results import measured_elsewhere, read_bench
    from edgecompress.measure.profiling import profile_models
    from edgecompress.settings.target import load_target

    export = folder / "run" / "export"
    models = {"fp32": export / "model.onnx", "int8": export / "model.int8.onnx"}
    target = load_target(str(folder / "here.yaml"))

    def work() -> None:
        elsewhere = measured_elsewhere(read_bench(path), models, target, place=str(path))
        profile_models(models, target=target, input_npy=None, elsewhere=elsewhere)

    return function(work, path.name)


# ---- images and their index


def _images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for suffix in ("jpg", "png", "bmp", "webp", "gif", "tiff", "ppm"):
        image.save(folder / f"image.{suffix}")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    for suffix in ("gif", "webp", "png"):
        image.save(folder / f"animated.{suffix}", save_all=True, append_images=[image.rotate(90)] * 2)


def _read_image(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    import warnings

    from edgecompress.data.images import FileItems
    from edgecompress.data.preprocessing import Preprocessing
    from edgecompress.device import infer

    preprocessing = Preprocessing(16, 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875)
    items = FileItems(folder, (path.name,), (path.stat().st_size,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd EXIF data
        if chance.random() < 0.7:
            return function(lambda: items.decode(0, preprocessing), path.name)
        try:
            infer.read_image(path, 3)
        except infer.BundleError as error:
            return refusal(str(error), path.name)
        return GOOD, ""


def _classes(folder: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(folder / split / name / f"{number}.png")
    (folder / "index.json").write_text('{"cat": 2, "dog": 5, "emu": 0}')


def _read_classes(folder: Path, path: Path, chance: random.Random) -> tuple[str, str]:
    from edgecompress.data.run_data import open_data
    from edgecompress.settings.recipe import DataSettings

    settings = DataSettings(name="image_folder", root=folder, class_index=path)
    return function(lambda: open_data(settings), path.name)


def _files_of_bundle(folder: Path) -> list[Path]:
    return [path for path in (folder / "tiny-here").rglob("*") if path.is_file() and path.name != "manifest.json"]


def _forgeable(folder: Path) -> list[Path]:
    return [path for path in _files_of_bundle(folder) if path.suffix in (".onnx", ".npy", ".txt")]


def _of_any_suffix(content: bytes, chance: random.Random) -> bytes:
    for changed in (mutation.json_changed, mutation.onnx_changed):
        try:
            return changed(content, chance)
        except (ValueError, google.protobuf.message.DecodeError):
            continue  # it is another kind of file
    return mutation.bytes_changed(content, chance)


KINDS: dict[str, Kind] = {
    "recipe": Kind(
        _recipe, _all("*.yaml"), mutation.yaml_changed, lambda f, p, c: command(p, "recipes", "validate", p), 4
    ),
    "target": Kind(
        _target, _all("*.yaml"), mutation.yaml_changed, lambda f, p, c: command(p, "targets", "validate", p), 4
    ),
    "run.json": Kind(_report_run, _all("runs/run/run.json"), mutation.json_changed, _reported, 4),
    "parity.json": Kind(_report_run, _all("runs/run/export/parity.json"), mutation.json_changed, _reported, 3),
    "profile JSON": Kind(_report_run, _all("runs/run/profile/*.json"), mutation.json_changed, _reported, 3),
    "other files of a run": Kind(
        _report_run,
        lambda f: [
            p for p in _all("*.json*")(f / "runs" / "run") if p.name not in ("run.json", "parity.json", "x86.json")
        ],
        _of_any_suffix,
        _reported,
        2,
    ),
    "run that is bundled": Kind(_bundled_run, lambda f: _all("*")(f / "run"), _of_any_suffix, _bundled, 2),
    "model.json": Kind(_stage, _all("model.json"), mutation.json_changed, _read_stage, 3),
    "safetensors of a stage": Kind(_stage, _all("*.safetensors"), mutation.safetensors_changed, _read_stage, 2),
    "checkpoint .safetensors": Kind(_weights, _all("*.safetensors"), mutation.safetensors_changed, _read_weights, 3),
    "checkpoint .pt": Kind(_weights, _all("*.pt"), mutation.bytes_changed, _read_weights, 3),
    "ONNX": Kind(_onnx_files, _all("*.onnx"), mutation.onnx_changed, _read_onnx, 4),
    "bundle, any file": Kind(_bundle, _files_of_bundle, _of_any_suffix, _verified, 2),
    "bundle manifest": Kind(_bundle, _all("tiny-here/manifest.json"), mutation.json_changed, _manifested, 3),
    "bundle, hashes put right": Kind(_bundle, _forgeable, _of_any_suffix, _forged, 2),
    "bundle archive": Kind(_archive, _all("*.tar.gz"), mutation.bytes_changed, _archived, 2),
    "bench.json of a device": Kind(_bench, _all("bench.json"), mutation.json_changed, _judged, 2),
    "image": Kind(_images, _all("*.*"), mutation.bytes_changed, _read_image, 5),
    "class index": Kind(_classes, _all("index.json"), mutation.json_changed, _read_classes, 3),
}


# ---- the process that reads, and the one that watches it


def _work(connection: multiprocessing.connection.Connection, folder: str) -> None:
    from edgecompress import console

    console.set_quiet(True)
    while True:
        name, seed = connection.recv()
        try:
            connection.send(KINDS[name].attempt(name, Path(folder) / name.replace(" ", "-"), seed))
        except Exception:
            connection.send(Finding(name, seed, "traceback", f"the good files: {traceback.format_exc()}"))


class Reader:
    """A process that reads bad files; a new one takes its place when it dies or hangs."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="bad-files-")
        self.connection, theirs = self._context.Pipe()
        self.process = self._context.Process(target=_work, args=(theirs, self.folder.name), daemon=True)
        self.process.start()
        theirs.close()
        self._known: set[str] = set()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.folder.cleanup()

    def read(self, name: str, seed: int) -> Finding:
        """One input; the first of a kind may take longer, since the good files are made and libraries are loaded."""
        limit = HANG_SECONDS if name in self._known else 120.0
        self._known.add(name)
        self.connection.send((name, seed))
        try:
            # In small slices, so that a machine that was suspended meanwhile is not taken for a hang.
            for _ in range(round(limit / _SLICE_SECONDS)):
                if self.connection.poll(_SLICE_SECONDS):
                    found: Finding = self.connection.recv()
                    return found
            outcome = "hang"
        except EOFError:
            outcome = "died"
        self.process.join(timeout=1)
        code = self.process.exitcode
        self.stop()
        self._start()
        return Finding(name, seed, outcome, f"the process that read it ended with {code}")


def try_inputs(total: int, *, first_seed: int = 0, kinds: Sequence[str] = ()) -> dict[str, list[Finding]]:
    """`total` bad inputs, shared out over the kinds by weight."""
    chosen = {name: KINDS[name] for name in kinds or KINDS}
    weights = sum(kind.weight for kind in chosen.values())
    reader = Reader()
    findings: dict[str, list[Finding]] = {}
    try:
        for name, kind in chosen.items():
            count = max(1, round(total * kind.weight / weights))
            findings[name] = [reader.read(name, seed) for seed in range(first_seed, first_seed + count)]
    finally:
        reader.stop()
    return findings


def table(findings: dict[str, list[Finding]]) -> str:
    """A row a kind, a column an outcome."""
    columns = (GOOD, REFUSED, *FAULTS)
    rows = [["kind", "inputs", *columns]]
    for name, found in findings.items():
        counts = Counter(one.outcome for one in found)
        rows.append([name, str(len(found)), *(str(counts[column]) for column in columns)])
    totals = Counter(one.outcome for found in findings.values() for one in found)
    rows.append(["all", str(totals.total()), *(str(totals[column]) for column in columns)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def faults_of(findings: dict[str, list[Finding]]) -> list[Finding]:
    return [one for found in findings.values() for one in found if one.outcome in FAULTS]


def main() -> int:
    parser = argparse.ArgumentParser(description="Give bad files to everything that reads files.")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; others follow")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only this kind; repeatable")
    parser.add_argument("--show", type=int, default=3, help="faults of a kind to print")
    arguments = parser.parse_args()
    findings = try_inputs(arguments.inputs, first_seed=arguments.seed, kinds=arguments.kind or ())
    for name in findings:
        for one in faults_of({name: findings[name]})[: arguments.show]:
            print(f"---- {one.kind}, seed {one.seed}: {one.outcome}\n{one.detail.strip()[-1500:]}\n")
    print(table(findings))
    return 1 if faults_of(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
