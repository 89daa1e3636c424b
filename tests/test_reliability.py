"""Full disks, failing syncs, two commands on one run, runs of an earlier version: said clearly, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import CommandLine
from crash_points import exact_files, faults_of
from edgecompress.errors import ExportError, MachineError, RunError, machine_fault, machine_faults
from edgecompress.run_directory import LOCK_FILE, alone_in, write_text
from edgecompress.settings.recipe import Recipe, load_recipe
from edgecompress.steps.run_start import place_run, start_run

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
data: {name: digits, max_train_samples: 64}
model: {name: resnet8, arguments: {width: 8}, preprocessing: {input_size: 16}}
stages: [{id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def started(recipe: Path, output: Path | None, *, resume: bool = False) -> Path:
    """The run directory that a command begins, without any stage."""
    with start_run(load_recipe(str(recipe)), str(recipe), (), ["x86"], output, resume, "") as run:
        return run.directory.path


# ---- two commands on one run


def test_the_second_command_is_refused_and_told_whose_it_is(recipe: Path, tmp_path: Path) -> None:
    run = started(recipe, tmp_path / "run")
    with alone_in(run):
        with pytest.raises(RunError, match=rf"another command works on this run \(process {os.getpid()} on .*since"):
            started(recipe, run, resume=True)
    assert not (run / LOCK_FILE).exists()
    assert started(recipe, run, resume=True) == run


@pytest.mark.parametrize(
    "words",
    [
        ["export"],
        ["report"],
        ["profile", "--target", "x86"],
        ["bundle", "--target", "x86"],
        ["sensitivity"],
        ["debug-int8"],
    ],
)
def test_every_command_that_writes_asks_first(
    command_line: CommandLine, recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    run = started(recipe, tmp_path / "run")
    before = (run / "run.json").read_bytes()
    with alone_in(run):
        command_line(words[0], run, *words[1:]).refusal("another command works on this run")
    assert (run / "run.json").read_bytes() == before


def test_a_run_at_work_is_not_removed(command_line: CommandLine, recipe: Path, tmp_path: Path) -> None:
    run = started(recipe, tmp_path / "run")
    with alone_in(run):
        command_line("runs", "rm", run, "--yes").refusal("another command works on this run")
    assert (run / "run.json").exists()
    assert command_line("runs", "rm", run, "--yes").exit_code == 0
    assert not run.exists()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgecompress.run_directory import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {process.pid} "), alone_in(run):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (run / LOCK_FILE).exists()
    with alone_in(run):
        assert f"process {os.getpid()} " in (run / LOCK_FILE).read_text()
    assert list(run.iterdir()) == []


def test_a_folder_that_holds_only_a_dead_commands_lock_can_be_begun_in(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text("process 1 on elsewhere")
    assert started(recipe, tmp_path / "run") == tmp_path / "run"


def test_runs_begun_in_the_same_second_have_folders_of_their_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({started(recipe, None) for _ in range(10)}) == 10


# ---- what the machine refuses


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/a.onnx"), "run/a.onnx: No space left.*free some space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "run"), "run: Read-only file system; make it writable"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "run"), r"run: Too many open files; .*ulimit -n"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error; the disk may be failing"),
        (MemoryError(), "not enough memory; end other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory.*smaller batch"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free some space"),
        (RuntimeError("While executing %conv\ncould not create a primitive"), "not enough memory: could not create"),
    ],
)
def test_each_has_its_sentence(error: Exception, words: str) -> None:
    with pytest.raises(MachineError, match=words), machine_faults():
        raise error


def test_a_step_that_made_an_error_of_its_own_of_it_hides_nothing() -> None:
    error = ExportError("the model cannot be exported; its forward must not depend on tensor values")
    error.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(MachineError, match=r"not enough memory.*can't allocate memory"), machine_faults():
        raise error
    error.__cause__ = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "model.onnx")  # which it is about
    assert machine_fault(error) is None


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"), machine_faults():
        raise RuntimeError("a mistake of ours")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failing_disk_ends_with_1_and_leaves_what_was_there(
    command_line: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    kept = tmp_path / "run" / "run.json"
    real, count = getattr(os, call), 0

    def failing(*arguments: Any, **words: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **words)

    monkeypatch.setattr(os, call, failing)
    answer = command_line("apply", recipe, "--output", "run", "--no-gate")
    assert answer.exit_code == 1, answer
    assert answer.stderr.count("error: ") == 1
    assert "No space left on device; free some space" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert kept.exists() == (after > 0)
    if after:
        assert json.loads(kept.read_text())["status"] == "running"  # it could not be changed any more, which was said
        assert "that the run failed could not be written either" in answer.stderr
    assert [path.name for path in tmp_path.rglob(".*")] == []


STARVED = """
import os, resource, sys
from edgecompress import cli
lowest_free = os.open(os.devnull, os.O_RDONLY)
os.close(lowest_free)
most = lowest_free + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
cli.main()
"""


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_process_that_can_open_no_file_still_says_so(more: int, as_json: bool, tmp_path: Path) -> None:
    """Not even the libraries that print messages can be loaded then."""
    words = [str(more), "export", str(tmp_path / "nothing"), *(["--json"] if as_json else [])]
    done = subprocess.run([sys.executable, "-c", STARVED, *words], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    wanted = "Too many open files; raise the limit" if more == 0 else "not a run directory"
    if as_json:
        document = json.loads(done.stdout)
        assert document["exit_code"] == done.returncode
        assert wanted in document["error"]
    else:
        assert done.stderr.startswith("error: ")
        assert wanted in done.stderr
    if more == 0:
        assert done.returncode == 1


THREADLESS = """
import sys, threading
from edgecompress import cli

def no_memory(thread):
    raise MemoryError

def work():
    threading.Thread._bootstrap = no_memory
    no_memory.__name__ = "_bootstrap"
    threading.Thread(target=print).start()

cli.app = work
cli.main()
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_thread_that_has_no_memory_to_begin_ends_the_command(as_json: bool) -> None:
    """Python itself would wait for it for ever."""
    words = [sys.executable, "-c", THREADLESS, *(["--json"] if as_json else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    message = json.loads(done.stdout)["error"] if as_json else done.stderr
    assert "not enough memory; end other programs" in message
    assert "Traceback" not in done.stderr


def test_a_file_replaced_on_a_full_disk_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left"), machine_faults():
        write_text(tmp_path / "a.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# ---- runs of an earlier version


def changed(run: Path, change: Any) -> None:
    document = json.loads((run / "run.json").read_text())
    change(document)
    (run / "run.json").write_text(json.dumps(document))


def resolved(recipe: Path) -> Recipe:
    return load_recipe(str(recipe))


def test_a_run_from_before_a_field_was_known_goes_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = started(recipe, tmp_path / "run")
    now = json.loads((run / "run.json").read_text())["recipe"]
    changed(run, lambda m: (m["recipe"]["gates"].pop("variant_samples"), m.update(edgecompress_version="0.0.1")))
    assert started(recipe, run, resume=True) == run
    said = capsys.readouterr().err
    assert "from edgecompress 0.0.1" in said
    assert f"gates.variant_samples: not known, {now['gates']['variant_samples']} taken" in said
    assert json.loads((run / "run.json").read_text())["recipe"] == now


def test_a_default_that_has_changed_is_named(recipe: Path, tmp_path: Path) -> None:
    run = started(recipe, tmp_path / "run")
    changed(run, lambda m: m["recipe"]["gates"].update(variant_samples=3))
    with pytest.raises(RunError, match=r"made with another recipe \(gates.variant_samples: 3 there, \d+ now\)"):
        place_run(resolved(recipe), run, True)


def test_a_recipe_that_this_version_cannot_read_names_the_one_that_can(recipe: Path, tmp_path: Path) -> None:
    run = started(recipe, tmp_path / "run")
    changed(run, lambda m: (m["recipe"].update(later=1), m.update(edgecompress_version="9.1")))
    with pytest.raises(RunError, match=r"cannot go on with a recipe that 9.1 wrote; use that version.*later"):
        place_run(resolved(recipe), run, True)


# ---- the same again


TRAINED = """
data: {name: digits, max_train_samples: 128}
model: {name: resnet8, arguments: {width: 8}, preprocessing: {input_size: 16}}
stages:
  - {id: dense, kind: train, epochs: 1, warmup_epochs: 0}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 16}}
"""


@pytest.mark.slow
def test_the_same_recipe_and_decisions_give_the_same_bytes(command_line: CommandLine, tmp_path: Path) -> None:
    """Weights, logits, ONNX and int8 ONNX of two runs. What was decided by measuring comes from the first one."""
    (tmp_path / "trained.yaml").write_text(TRAINED)
    for name in ("first", "second"):
        answer = command_line("apply", "trained.yaml", "--output", name, "--no-gate")
        assert answer.exit_code == 0, answer
        if name == "second":
            decisions = json.loads((tmp_path / "first" / "run.json").read_text())["decisions"]
            changed(tmp_path / name, lambda m, made=decisions: m.update(decisions=made))
        answer = command_line("export", name, "--int8", "--no-gate")
        assert answer.exit_code == 0, answer
    made = [*(tmp_path / "first").rglob("*.safetensors"), *(tmp_path / "first").rglob("*.onnx")]
    made += [*(tmp_path / "first").rglob("*.npy"), *(tmp_path / "first").rglob("model.json")]
    assert {path.name for path in made} >= {"model.safetensors", "model.json", "model.onnx", "model.int8.onnx"}
    others = [tmp_path / "second" / path.relative_to(tmp_path / "first") for path in made]
    assert [str(a) for a, b in zip(made, others, strict=True) if a.read_bytes() != b.read_bytes()] == []


@pytest.mark.slow
def test_different_runs_at_once_are_as_each_would_be_alone(command_line: CommandLine, tmp_path: Path) -> None:
    """Real processes in one folder, begun in the same second. EDGECOMPRESS_PARALLEL_RUNS=10 starts more of them."""
    (tmp_path / "trained.yaml").write_text(TRAINED)
    assert command_line("apply", "trained.yaml", "--output", "alone", "--no-gate").exit_code == 0
    words = [sys.executable, "-m", "edgecompress", "apply", "trained.yaml", "--no-gate"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"log-{number}.txt" for number in range(int(os.environ.get("EDGECOMPRESS_PARALLEL_RUNS", "3")))]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for log in logs:
            with log.open("wb") as stream:
                started.append(
                    subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * len(logs), "\n".join(log.read_text() for log in logs)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == len(logs)
    alone = exact_files(tmp_path / "alone")
    assert len(alone) > 3
    for run in runs:
        assert json.loads((run / "run.json").read_text())["status"] == "complete"
        assert list(faults_of(run)) == []
        assert exact_files(run) == alone
