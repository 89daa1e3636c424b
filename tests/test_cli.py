"""The command line: what goes to which stream, with which exit code, and that nothing heavy is loaded for --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CommandLine
from edgecompress import __version__, cli
from edgecompress.errors import DataError, TrainingError
from edgecompress.run_directory import RunDirectory
from edgecompress.shipped import shipped_files, shipped_name, shipped_path

COMMANDS = ["apply", "export", "profile", "report", "run"]  # those whose result is an Outcome
OTHERS = ["bundle", "verify", "sensitivity", "debug-int8"]
GROUPS = [f"{group} {command}" for group in ("recipes", "targets") for command in ("list", "show", "validate")]
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "numpy",
    "yaml",
    "matplotlib",
    "jinja2",
    "sklearn",
    "PIL",
}


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


# ---- help and version


@pytest.mark.parametrize("command", ["", *COMMANDS, *OTHERS, "recipes", "targets", *GROUPS])
def test_every_command_has_help(command_line: CommandLine, command: str) -> None:
    answer = command_line(*command.split(), "--help")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert " ".join(["Usage:", *command.split()]).partition(" ")[2] in " ".join(answer.stdout.split())


@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS, *GROUPS])
def test_json_and_no_gate_work_on_every_command(command_line: CommandLine, command: str) -> None:
    text = command_line(*command.split(), "--help").stdout
    assert "--json" in text
    assert "--no-gate" in text


def test_all_commands_are_listed_by_help_and_without_arguments(command_line: CommandLine) -> None:
    for arguments in ([], ["--help"]):
        answer = command_line(*arguments)
        assert [
            name for name in (*COMMANDS, *OTHERS, "recipes", "targets") if name not in answer.stdout + answer.stderr
        ] == []


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--help"], HEAVY | {"pydantic"}),
        # typer itself loads pydantic when it parses the options of a command.
        (["run", "--help"], HEAVY),
        (["--version"], HEAVY),
    ],
    ids=["help", "help of a command", "version"],
)
def test_help_loads_nothing_heavy(tmp_path: Path, words: list[str], forbidden: set[str]) -> None:
    script = (
        "import sys\n"
        "from edgecompress.cli import app\n"
        f"app({words}, standalone_mode=False)\n"
        "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)\n"
    )
    answer = python("-c", script, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    loaded = set(answer.stderr.split())
    assert "edgecompress" in loaded
    assert loaded & forbidden == set()


def test_version(command_line: CommandLine, tmp_path: Path) -> None:
    answer = command_line("--version")
    assert (answer.exit_code, answer.stdout, answer.stderr) == (0, f"edgecompress {__version__}\n", "")
    process = python("-m", "edgecompress", "--version", folder=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, answer.stdout, "")


# ---- recipes and targets


@pytest.mark.parametrize("folder", ["recipes", "targets"])
def test_list(command_line: CommandLine, folder: str) -> None:
    names = [shipped_name(folder, path) for path in shipped_files(folder)]
    answer = command_line(folder, "list")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert [line.split()[0] for line in answer.stdout.splitlines()] == names
    document = json.loads(command_line(folder, "list", "--json").stdout)
    assert [row["name"] for row in document[folder]] == names
    assert all(row["description"] in answer.stdout and row["description"] for row in document[folder])


@pytest.mark.parametrize(
    ("folder", "name"), [("recipes", "prune_kd"), ("recipes", "paper/pruning"), ("targets", "rpi4")]
)
def test_show_prints_the_file_comments_included(command_line: CommandLine, folder: str, name: str) -> None:
    path = shipped_path(folder, name)
    assert path is not None
    answer = command_line(folder, "show", name)
    assert (answer.exit_code, answer.stdout, answer.stderr) == (0, path.read_text(encoding="utf-8"), "")
    assert command_line(folder, "show", path) == answer
    document = json.loads(command_line(folder, "show", name, "--json").stdout)
    assert document["name"] == name.replace("/", "-")


@pytest.mark.parametrize(("folder", "name"), [("recipes", "prune_kd"), ("targets", "rpi4")])
def test_validate(command_line: CommandLine, folder: str, name: str) -> None:
    kind = folder.removesuffix("s")
    answer = command_line(folder, "validate", name)
    first, then = answer.stdout.splitlines()
    assert (answer.exit_code, first) == (0, f"{name}: valid {kind} '{name}'")
    assert then.startswith("next:   edgecompress run ")
    document = json.loads(command_line(folder, "validate", name, "--json").stdout)
    assert document["valid"] is True
    assert document[kind]["name"] == name
    expected = {"recipe": ["gates", "stages"], "target": ["budgets", "int8"]}[kind]
    assert [key for key in expected if key not in document[kind]] == [], "the resolved settings, defaults included"


@pytest.mark.parametrize("command", ["show", "validate"])
@pytest.mark.parametrize(
    ("folder", "name", "near"), [("recipes", "prune-kd", "prune_kd"), ("targets", "rpi55", "rpi5")]
)
def test_misspelled_names(command_line: CommandLine, command: str, folder: str, name: str, near: str) -> None:
    command_line(folder, command, name).refusal(f"{folder.removesuffix('s')} '{name}'", f"did you mean '{near}'?")
    assert near in command_line(folder, command, name, "--json").json_refusal()


# ---- usage errors, which are the parser's


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["run", "prune_kd"], "--target"),
        (["run", "--target", "x86"], "RECIPE"),
        (["run", "prune_kd", "--target", "x86", "--taget", "x"], "--taget"),
        (["profile", "--target", "x86", "--seconds", "soon"], "--seconds"),
        (["profile", "--target", "x86", "--seconds", "0"], "--seconds"),
        (["prune"], "prune"),
        (["recipes", "shw"], "shw"),
        (["recipes", "show"], "NAME"),
    ],
)
def test_usage_errors(command_line: CommandLine, arguments: list[str], needle: str) -> None:
    answer = command_line(*arguments)
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert needle in answer.stderr
    assert "Traceback" not in answer.stderr
    assert needle in command_line(*arguments, "--json").json_refusal()


def test_usage_error_with_json_as_a_process(tmp_path: Path) -> None:
    answer = python("-m", "edgecompress", "run", "prune_kd", "--json", folder=tmp_path)
    assert (answer.returncode, answer.stderr) == (2, "")
    assert json.loads(answer.stdout) == {"error": "Missing option '--target'.", "exit_code": 2}


def test_json_and_help_together_give_help(command_line: CommandLine) -> None:
    answer = command_line("run", "--json", "--help")
    assert answer.exit_code == 0
    assert "Usage:" in answer.stdout


# ---- results: the pipeline is replaced, so that only the command line is tested


@pytest.fixture
def outcome_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Make every command of the pipeline do as told; returns the list in which calls are recorded."""
    from edgecompress import pipeline

    def install(*, missed: list[str] | None = None, error: BaseException | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def fake(*arguments: Any, **options: Any) -> pipeline.Outcome:
            calls.append({"arguments": arguments, **options})
            print("a library that prints to stdout")
            if error is not None:
                raise error
            manifest = {"status": "complete", "notes": ["val is small"], "stages": [], "loss": float("nan")}
            return pipeline.Outcome(RunDirectory(tmp_path / "run"), manifest, missed or [])

        for name in COMMANDS:
            monkeypatch.setattr(pipeline, name, fake)
        return calls

    return install


def test_result_of_a_command(command_line: CommandLine, outcome_of: Callable[..., list[dict[str, Any]]]) -> None:
    calls = outcome_of()
    answer = command_line("apply", "prune_kd", "--set", "seed=1", "--set", "name=x", "--output", "a", "--resume")
    assert answer.exit_code == 0
    assert "a library" not in answer.stdout
    assert "a library that prints to stdout\n" in answer.stderr
    assert "note: val is small\n" in answer.stderr
    assert "run:" in answer.stdout
    call = calls[0]
    assert call["arguments"] == ("prune_kd",)
    assert (call["overrides"], call["output"], call["resume"]) == (["seed=1", "name=x"], Path("a"), True)
    assert call["command"].startswith("edgecompress")


def test_json_is_all_that_stdout_holds(
    command_line: CommandLine, outcome_of: Callable[..., list[dict[str, Any]]]
) -> None:
    outcome_of()
    for command in (["apply", "prune_kd"], ["run", "prune_kd", "--target", "x86"]):
        answer = command_line(*command, "--json")
        assert answer.exit_code == 0
        assert json.loads(answer.stdout)["status"] == "complete"
        assert json.loads(answer.stdout)["loss"] is None


def test_quiet_prints_the_result_only(
    command_line: CommandLine, outcome_of: Callable[..., list[dict[str, Any]]]
) -> None:
    outcome_of()
    answer = command_line("apply", "prune_kd", "--quiet")
    assert "val is small" not in answer.stderr
    assert "run:" in answer.stdout


def test_a_missed_gate_is_three_unless_told_otherwise(
    command_line: CommandLine, outcome_of: Callable[..., list[dict[str, Any]]]
) -> None:
    outcome_of(missed=["Stage int8 has accuracy 10 %."])
    answer = command_line("apply", "prune_kd")
    assert answer.exit_code == 3
    assert "gate missed: Stage int8 has accuracy 10 %.\n" in answer.stdout
    assert command_line("apply", "prune_kd", "--json").exit_code == 3
    assert command_line("apply", "prune_kd", "--no-gate").exit_code == 0
    assert command_line("apply", "prune_kd", "--no-gate", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrainingError("stage dense: the loss is nan"), 1, "stage dense: the loss is nan"),
        (DataError("pictures: nothing there"), 2, "pictures: nothing there"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["stage failed", "bad input", "interrupted"],
)
@pytest.mark.parametrize("command", [["apply", "prune_kd"], ["run", "prune_kd", "--target", "x86"]], ids=lambda c: c[0])
def test_errors_have_their_exit_codes(
    command_line: CommandLine,
    outcome_of: Callable[..., list[dict[str, Any]]],
    command: list[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    outcome_of(error=error)
    answer = command_line(*command, "--no-gate")
    assert (answer.exit_code, answer.stdout) == (code, "")
    assert answer.stderr.endswith(f"error: {message}\n")
    answer = command_line(*command, "--json")
    assert answer.exit_code == code
    assert json.loads(answer.stdout) == {"error": message, "exit_code": code}


def test_a_fault_of_our_own_is_not_hidden(
    command_line: CommandLine, outcome_of: Callable[..., list[dict[str, Any]]]
) -> None:
    """What is no error raised on purpose is a bug, and its traceback is what a bug report needs."""
    outcome_of(error=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        command_line("apply", "prune_kd")


def test_console_script_is_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["edgecompress", "targets", "list", "--json"])
    # What the command line changes for its own process.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading.Thread, "start", threading.Thread.start)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert "targets" in json.loads(capsys.readouterr().out)
