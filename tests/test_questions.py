"""Questions on a real terminal: those of `init`, and the one before `runs rm` removes anything."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundle_runs import small_run
from edgecompress.settings.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
CTRL_C, CTRL_D = "\x03", "\x04"
_SECONDS = 120.0  # a busy machine takes long to load torch


@dataclass(frozen=True)
class Talk:
    """What was said: on the terminal, and on stdout, which was a pipe."""

    exit_code: int
    shown: str
    stdout: str


def talk(folder: Path, *words: str, answers: list[tuple[str, str]]) -> Talk:
    """Run a command with a terminal for stdin and stderr; each answer is typed when its question stands there."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}

    def take_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # these tests may have been started with it ignored
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the process

    with subprocess.Popen(
        [sys.executable, "-m", "edgecompress", *words],
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        cwd=folder,
        env=environment,
        start_new_session=True,
        preexec_fn=take_terminal,
    ) as process:
        os.close(theirs)
        shown, asked, waiting = "", 0, list(answers)
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    block = os.read(ours, 65536)
                except OSError:  # Linux reports the end of a terminal so
                    break
                if not block:
                    break
                shown += block.decode()
            if waiting and waiting[0][0] in shown[asked:]:
                _, answer = waiting.pop(0)
                asked = len(shown)
                os.write(ours, (answer if answer in (CTRL_C, CTRL_D) else answer + "\n").encode())
        else:
            process.kill()
        assert process.stdout is not None
        stdout = process.stdout.read().decode()
        process.wait()
    os.close(ours)
    assert waiting == [], (shown, stdout)
    assert "Traceback" not in shown
    return Talk(process.returncode, shown, stdout)


def test_init_asks_for_what_no_flag_said(tmp_path: Path) -> None:
    found = talk(
        tmp_path,
        "init",
        answers=[("Images", "digits"), ("Model", "student_cnn"), ("Weights", ""), ("Goal", "both"), ("Goal", "prune")],
    )
    assert found.exit_code == 0, found
    assert "'both' is neither int8 nor prune" in found.shown
    assert found.stdout.splitlines() == [
        "recipe: digits.yaml",
        "target: digits-target.yaml",
        "next:   edgecompress run digits.yaml --target digits-target.yaml",
    ]
    recipe = load_recipe(str(tmp_path / "digits.yaml"))
    assert (recipe.model.name, [stage.kind for stage in recipe.stages]) == (
        "student_cnn",
        ["train", "prune", "quantize"],
    )


def test_init_asks_only_what_is_open_and_takes_defaults(tmp_path: Path) -> None:
    words = ["init", "mine.yaml", "--target", "x86", "--goal", "prune"]
    found = talk(tmp_path, *words, answers=[("Images", "digits"), ("Model", ""), ("Goal", "")])
    assert found.exit_code == 0, found
    assert "Weights" not in found.shown, "a small net has none"
    assert "no model was named: resnet20, trained from scratch" in found.shown
    assert found.stdout == "recipe: mine.yaml\nnext:   edgecompress run mine.yaml --target x86\n"


def test_an_answer_that_is_wrong_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    found = talk(tmp_path, "init", answers=[("Images", "digts"), ("Model", ""), ("Goal", "")])
    assert found.exit_code == 2
    assert "did you mean 'digits'?" in found.shown
    assert (found.stdout, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D], ids=["Ctrl-C", "Ctrl-D"])
def test_a_question_can_be_left(tmp_path: Path, key: str) -> None:
    found = talk(tmp_path, "init", answers=[("Images", "digits"), ("Model", key)])
    assert (found.exit_code, found.stdout, list(tmp_path.iterdir())) == (130, "", [])
    assert found.shown.count("error: interrupted") == 1


@pytest.mark.parametrize(
    ("answer", "code"), [("y", 0), ("n", 2), ("", 2), (CTRL_C, 130)], ids=["y", "n", "enter", "^C"]
)
def test_runs_rm_asks_before_it_removes(tmp_path: Path, answer: str, code: int) -> None:
    small_run(tmp_path / "a run")
    small_run(tmp_path / "other")
    found = talk(tmp_path, "runs", "rm", "a run", "other", answers=[("Remove 2 runs? [y/N]", answer)])
    assert found.exit_code == code, found
    assert "a run: " in found.shown, "what would go is named, with its size"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ([] if code == 0 else ["a run", "other"])
    if code == 0:
        assert [line.partition(" (")[0] for line in found.stdout.splitlines()] == ["removed: a run", "removed: other"]
    elif code == 2:
        assert "error: nothing was removed" in found.shown
