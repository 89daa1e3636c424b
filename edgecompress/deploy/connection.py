"""A device as OpenSSH knows it, and a connection to it.

What enters: the user's name for the device. What leaves: bytes sent to the far end (device/attendant.py), and its
messages. The system's own `ssh` makes the connection, so the user's configuration, keys and jump hosts hold.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from edgecompress.device import attendant
from edgecompress.errors import ConfigurationError, ProfileError
from edgecompress.run_directory import Json
from edgecompress.settings.target import Target
from edgecompress.threads import start_thread

_CONNECT_SECONDS = 15
# Without a word for so long the connection counts as lost, though it may still be open: the far end speaks every 3 s.
SILENCE_SECONDS = 45.0
_STDERR_LINES = 6
_OPTIONS = {
    "BatchMode": "yes",  # no question that nobody can answer
    "ConnectTimeout": str(_CONNECT_SECONDS),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
}


@dataclass(frozen=True)
class Host:
    """How a device is reached. `ssh` is the command that connects, as in `rsync -e`; `python` its interpreter."""

    name: str
    python: str = "python3"
    work_folder: str = ".edgecompress"
    ssh: str = "ssh"

    def __post_init__(self) -> None:
        # A name that begins with a dash would be taken for an option, and an option of ssh may name a command to run.
        for value, what in ((self.name, "--host"), (self.python, "the device's Python"), (self.work_folder, "folder")):
            if not value or value.startswith("-") or not value.isprintable() or any(c.isspace() for c in value):
                raise ConfigurationError(f"{what} '{value}': must be one word that does not begin with a dash")
        # ssh puts the name into commands of its configuration (ProxyCommand %h), which a shell reads.
        if not re.fullmatch(r"(ssh://)?[\w.@:%+=,\[\]/-]+", self.name):
            raise ConfigurationError(f"--host '{self.name}': holds characters that no host name has; give user@device")
        if any(part.startswith("-") for part in self.name.removeprefix("ssh://").split("@")):
            raise ConfigurationError(f"--host '{self.name}': neither user nor host may begin with a dash")
        try:
            words = shlex.split(self.ssh)
        except ValueError as error:
            raise ConfigurationError(f"--ssh '{self.ssh}': {error}") from error
        if not words:
            raise ConfigurationError("--ssh: give the command that connects, such as 'ssh -p 2222'")

    @classmethod
    def of(cls, target: Target, name: str | None, *, python: str | None, ssh: str) -> Host | None:
        """The host that the command line names, or the target's own; None where neither names one."""
        name = name if name is not None else target.device.host
        if name is None:
            return None
        return cls(name, python=python or target.device.python, work_folder=target.device.work_folder, ssh=ssh)

    def command(self) -> list[str]:
        """The command line that starts the attendant's Python on the device."""
        options = [word for key, value in _OPTIONS.items() for word in ("-o", f"{key}={value}")]
        # The attendant's source comes on stdin, so that the device's shell, whatever it is, has only this to read.
        loader = "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
        there = f"exec {shlex.quote(self.python)} -B -u -c {shlex.quote(loader)}"
        return [*shlex.split(self.ssh), "-T", *options, "--", self.name, there]


class Connection:
    """A running ssh with its streams read in threads, so that neither side can block the other."""

    def __init__(self, host: Host) -> None:
        self.host = host
        try:
            self.process = subprocess.Popen(
                host.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise ProfileError(f"--host {host.name}: {host.ssh} cannot be started: {error}; install OpenSSH") from error
        self.messages: queue.Queue[Json | None] = queue.Queue()
        self.errors: list[str] = []
        self._sending = threading.Lock()
        try:
            self._threads = [start_thread(work) for work in (self._read, self._read_errors, self._beat)]
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _stream(self, stream: IO[bytes] | None) -> Iterator[str]:
        assert stream is not None
        for line in stream:
            yield line.decode("utf-8", "replace").rstrip("\n")

    def _read(self) -> None:
        for line in self._stream(self.process.stdout):
            if line.startswith(attendant.MARK):  # anything else is a greeting of the device's shell
                with contextlib.suppress(ValueError):
                    self.messages.put(json.loads(line[len(attendant.MARK) :]))
        self.messages.put(None)

    def _read_errors(self) -> None:
        for line in self._stream(self.process.stderr):
            self.errors = [*self.errors, line][-_STDERR_LINES:]

    def _beat(self) -> None:
        """Heartbeats once the files are sent; the lock keeps them out of the files."""
        while self.process.poll() is None:
            time.sleep(attendant.HEARTBEAT_SECONDS)
            if self.heartbeat:
                with contextlib.suppress(OSError, ValueError):
                    self.send(b"\n")

    heartbeat = False

    def send(self, data: bytes) -> None:
        with self._sending:
            assert self.process.stdin is not None
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def next(self) -> Json | None:
        """The next message that is more than a sign of life; None when the connection is over."""
        while True:
            try:
                message = self.messages.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                self.errors.append(f"no sign of life for {SILENCE_SECONDS:.0f} s")
                return None
            if message is None or "alive" not in message:
                return message

    def close(self) -> None:
        """End ssh, whatever it is doing; the far end sees its input end and cleans up."""
        with contextlib.suppress(OSError, ValueError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for thread in self._threads[:2]:
            thread.join(timeout=5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def words(self) -> str:
        """The end of what ssh said."""
        return "; ".join(line.strip() for line in self.errors if line.strip()) or "ssh said nothing"
