"""Progress and prose: all on stderr, little of it without a terminal, and warnings always."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgecompress import console


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_settings", console._Settings())


def work(description: str = "training dense", total: int = 5) -> None:
    with console.progress(description, total=total) as advance:
        for step in range(total):
            advance()
            advance(0, status=f"loss {step}")


def test_a_short_piece_of_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_long_work_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_SHOW_AFTER_SECONDS", 0.0)
    work("training [dense]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "training [dense]: done in 0.0 s loss 4\n"


def test_without_a_terminal_work_that_goes_on_says_so_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("edgecompress.console.time.monotonic", lambda: float(next(clock)))
    work(total=5)  # ten calls, ten seconds apart
    assert capsys.readouterr().err.splitlines() == [
        "training dense: 2 of 5 loss 0",
        "training dense: 3 of 5 loss 2",
        "training dense: 5 of 5 loss 3",
        "training dense: done in 110.0 s loss 4",
    ]


def test_work_that_fails_is_not_said_to_be_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_SHOW_AFTER_SECONDS", 0.0)

    def fail() -> None:
        with console.progress("training", total=2):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert capsys.readouterr().err == ""


def test_quiet_leaves_warnings_and_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_SHOW_AFTER_SECONDS", 0.0)
    console.set_quiet(True)
    console.note("a note")
    work()
    assert capsys.readouterr() == ("", "")
    console.warn("weights are random")
    console.error("no such file")
    assert capsys.readouterr() == ("", "warning: weights are random\nerror: no such file\n")
    console.set_quiet(False)
    console.note("a note")
    assert capsys.readouterr() == ("", "a note\n")


@pytest.mark.parametrize("say", [console.note, console.warn, console.error], ids=lambda f: f.__name__)
def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], say: object) -> None:
    """No markup, no emoji, no line breaks of our own: messages hold paths, keys and YAML."""
    text = "nets.py:fire: stages[0] [red]is[/red] [a, b] :warning: \\[x] " + "long " * 60 + "end\\"
    say(text)  # type: ignore[operator]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(text + "\n")
    assert err.count("\n") == 1


def on_a_terminal(script: str, **variables: str) -> str:
    """What a script shows on a terminal of its own, control codes included."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment |= variables
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # Linux reports the end of a terminal so
                break
            if not block:
                break
            shown += block
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


def test_on_a_terminal_a_bar_is_drawn_and_notes_stand_above_it() -> None:
    script = (
        "from edgecompress import console\n"
        "with console.progress('training [dense]', total=3) as advance:\n"
        "    for step in range(3):\n"
        "        advance(status=f'loss {step}')\n"
        "        with console.progress('evaluating', total=1) as inner:\n"
        "            inner()\n"
        "        console.note(f'note {step}')\n"
        "console.note('after')\n"
    )
    text = on_a_terminal(script)
    assert "training [dense]" in text
    assert "3/3" in text
    assert "loss 2" in text
    assert [f"note {step}\r\n" in text for step in range(3)] == [True] * 3
    assert "after" in text


BUSY = (
    "from edgecompress import console\n"
    "import time\n"
    "with console.busy('exporting [x]'):\n"
    "    time.sleep(0.3)\n"
    "    with console.progress('inside', total=1) as advance:\n"
    "        advance()\n"
    "console.warn('over')\n"
)


def test_work_of_unknown_length_has_a_spinner_on_a_terminal() -> None:
    text = on_a_terminal(BUSY)
    assert "exporting [x]" in text
    assert "\x1b[1;33mwarning" in text


def test_no_color_is_honoured() -> None:
    """Neither bars nor marks are coloured; moving the cursor is no colour."""
    text = on_a_terminal(BUSY, NO_COLOR="1")
    assert "exporting [x]" in text
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;[0-9;]+)m", text)


def test_without_a_terminal_only_long_work_of_unknown_length_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.busy("exporting"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "_SECONDS_BEFORE_BUSY_IS_TOLD", 0.0)
    with console.busy("exporting"):
        pass
    assert capsys.readouterr().err == "exporting: done in 0.0 s\n"
    console.set_quiet(True)
    with console.busy("exporting"):
        pass
    assert capsys.readouterr().err == ""
