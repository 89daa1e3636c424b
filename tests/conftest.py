"""What the tests share: one thread a library, and the command line run in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from typer.testing import CliRunner

# Read when torch is first imported, which not every test does. The nets here are so small that threads cost more than
# they save, and several test processes may share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Properties hold or they don't: how long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@dataclass(frozen=True)
class Answer:
    """What a command left behind: its exit code and both streams."""

    exit_code: int
    stdout: str
    stderr: str

    def refusal(self, *needles: str) -> str:
        """The one message of a command that refused its input; it must say every one of `needles`."""
        assert self.exit_code == 2, self
        assert self.stdout == ""
        assert self.stderr.count("error: ") == 1, self.stderr
        assert "Traceback" not in self.stderr
        message = self.stderr.partition("error: ")[2].rstrip("\n")
        assert [needle for needle in needles if needle not in message] == [], message
        return message

    def json_refusal(self) -> str:
        """The message of the same with --json: stdout is one JSON document, and stderr holds no error."""
        assert self.exit_code == 2, self
        document = json.loads(self.stdout)
        assert document.keys() == {"error", "exit_code"}
        assert document["exit_code"] == 2
        assert "error: " not in self.stderr
        assert "Traceback" not in self.stderr
        return str(document["error"])


CommandLine = Callable[..., Answer]


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tool keeps about the user stays out of the folder of whoever runs the tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    yield
    patch.undo()


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Runs `edgecompress ARGUMENTS` in the folder `tmp_path`; an exception that gets out of it fails the test."""
    from edgecompress import cli, console

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_settings", console._Settings())

    def run(*arguments: str | Path) -> Answer:
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run
