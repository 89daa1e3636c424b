"""A device over SSH: a bundle and its scripts go there, what they measured comes back, nothing stays.

What enters: a host as OpenSSH knows it, a bundle's folder. What leaves: the content of bench.json and of the self-test.
The system's own `ssh` makes the connection, so the user's configuration, keys and jump hosts hold. One connection does
it all, because the far end (device/attendant.py) lives exactly as long as its connection. Answers of measuring
processes are kept as they arrive, and an attempt that was cut off goes on with them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import queue
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgecompress import console
from edgecompress.device import attendant
from edgecompress.errors import ConfigurationError, ProfileError
from edgecompress.machine import mismatches
from edgecompress.measure.measuring import STANDARD
from edgecompress.run_directory import Json
from edgecompress.settings.target import Target
from edgecompress.threads import start_thread

PYTHON_MIN = "3.9"
CONNECT_SECONDS = 15
# Without a word for so long the connection counts as lost, though it may still be open: the far end speaks every 3 s.
SILENCE_SECONDS = 45.0
_STDERR_LINES = 6
_BLOCK_BYTES = 1 << 18
_DESCRIBE = (
    "import json, sys; sys.path.insert(0, 'bundle'); from edgecompress.machine import describe_machine; "
    "print(json.dumps(describe_machine()))"
)
_OPTIONS = {
    "BatchMode": "yes",  # no question that nobody can answer
    "ConnectTimeout": str(CONNECT_SECONDS),
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


@dataclass(frozen=True)
class RemoteResults:
    """What came back: the content of bench.json, and the rows of the self-test."""

    bench: Json
    self_test: list[Json]
    reused: int


class _Connection:
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
        self._threads = [start_thread(work) for work in (self._read, self._read_errors, self._beat)]

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


def measure_on(
    host: Host,
    bundle: Path,
    manifest: Json,
    *,
    target: Target,
    seconds: float,
    thoroughness: str = STANDARD,
    kept: Path,
) -> RemoteResults:
    """Run a bundle's self-test and bench.py on a device. `kept` is the folder for answers of an attempt cut off.

    Raises ProfileError when the device cannot be reached, lacks something, or the connection is lost, and
    ConfigurationError when it is not the target.
    """
    console.note(f"connecting to {host.name}")
    connection = _Connection(host)
    try:
        hello = _greet(connection, host)
        _require_fit(hello, host, manifest)
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        if hello["free_bytes"] < 2 * size:
            raise ProfileError(
                f"{host.name}: {hello['folder']} has {hello['free_bytes'] / 1e6:.1f} MB free, and {2 * size / 1e6:.1f} "
                "MB are needed; free some there, or set device.work_folder in the target's file"
            )
        how = ["--seconds", str(seconds), "--thoroughness", thoroughness]
        answers = _Kept(kept, host, hello, manifest, how)
        found = _measure(connection, host, bundle, target, how, answers)
        _require_rows(found.self_test)
        return found
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(
            f"{host.name}: answered what this edgecompress does not understand ({error!r}); nothing of it is used"
        ) from error
    finally:
        connection.close()


def _require_rows(rows: object) -> None:
    """Raises ValueError where what came back as the self-test is none."""
    if not isinstance(rows, list) or not all(
        isinstance(row, dict)
        and isinstance(row.get("model"), str)
        and isinstance(row.get("passed"), bool)
        and isinstance(row.get("problems"), list)
        and all(isinstance(problem, str) for problem in row["problems"])
        for row in rows
    ):
        raise ValueError("the self-test's rows")


def _greet(connection: _Connection, host: Host) -> Json:
    source = Path(attendant.__file__).read_bytes()
    hello = None
    with contextlib.suppress(OSError):
        connection.send(f"{len(source)}\n".encode() + source)
        connection.send(json.dumps({"work_folder": host.work_folder}).encode() + b"\n")
        hello = connection.next()
    if hello is not None and "hello" in hello:
        found: Json = hello["hello"]
        return found
    if hello is not None and "failed" in hello:
        raise ProfileError(f"{host.name}: {hello['failed']['text']}; set device.work_folder to a folder of yours there")
    connection.close()
    code, words = connection.process.returncode, connection.words()
    if code == 127 or "not found" in words:
        raise ProfileError(
            f"{host.name}: has no '{host.python}' ({words}); install Python {PYTHON_MIN} or newer there, or say which "
            "one with --host-python"
        )
    hint = f"try by hand: {host.ssh} {shlex.quote(host.name)} true"
    if "Host key verification failed" in words:
        hint = f"its host key is not known yet; connect once by hand to accept it: {host.ssh} {host.name}"
    elif "Permission denied" in words:
        hint = f"no password can be asked for here; give the device your key: ssh-copy-id {host.name}"
    raise ProfileError(f"--host {host.name}: no connection (code {code}: {words}); {hint}")


def _require_fit(hello: Json, host: Host, manifest: Json) -> None:
    """Raises ProfileError that says what to install."""
    wanted = f"numpy 'onnxruntime>={manifest['onnxruntime_min']}'"
    python = hello["executable"]
    install = (
        f"there: {python} -m pip install {wanted}; or in an environment of its own: {python} -m venv ~/venv && "
        f"~/venv/bin/pip install {wanted}, and then --host-python venv/bin/python"
    )
    if _version(hello["python"]) < _version(manifest["python_min"]):
        raise ProfileError(f"{host.name}: {python} is Python {hello['python']}; {manifest['python_min']} is the oldest")
    if hello["problem"] is not None:
        raise ProfileError(f"{host.name}: {python} cannot measure: {hello['problem']}; {install}")
    if _version(hello["onnxruntime"]) < _version(manifest["onnxruntime_min"]):
        raise ProfileError(
            f"{host.name}: onnxruntime {hello['onnxruntime']} is there, the target says {manifest['onnxruntime_min']} "
            f"or newer; {install}"
        )
    absent = [name for name in manifest["measuring"]["providers"] if name not in hello["providers"]]
    if absent:
        raise ProfileError(f"{host.name}: its onnxruntime has no {', '.join(absent)}; install a build that has")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


class _Kept:
    """Answers on disk: of this device, for these files and this time. Removed when all is measured."""

    def __init__(self, folder: Path, host: Host, hello: Json, manifest: Json, how: list[str]) -> None:
        facts = [host.name, hello["machine_id"], hello["onnxruntime"], how, manifest["files"]]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f".{manifest['target']}-{digest}.answers.jsonl"
        self.earlier = 0
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a line that was cut off is measured again
            self.path.write_text(whole, encoding="utf-8")
            self.earlier = whole.count("\n")
        self.new = 0

    def text(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""

    def add(self, row: Json) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self.new += 1

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def _measure(
    connection: _Connection, host: Host, bundle: Path, target: Target, how: list[str], answers: _Kept
) -> RemoteResults:
    if answers.earlier:
        console.note(f"going on with {answers.earlier} answers of an earlier attempt")
    files = {
        path.relative_to(bundle).as_posix(): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()
    }
    files = {f"bundle/{name}": content for name, content in files.items()} | {"kept.jsonl": answers.text()}
    bench = ["bundle/bench.py", "--stream", *how, "--answers", "kept.jsonl"]
    scripts = [
        {"name": "machine", "command": ["-c", _DESCRIBE]},
        {"name": "self-test", "command": ["bundle/infer.py", "--self-test", "--json"]},
        {"name": "bench", "command": bench},
    ]
    try:
        _upload(connection, files, scripts)
    except OSError:  # the far end is gone, and may have said why before it went
        while (message := connection.next()) is not None:
            if "failed" in message:
                raise _failure(host, message["failed"]) from None
        raise _lost(connection, host, answers, "while the files were sent") from None
    printed: dict[str, list[str]] = {"machine": [], "self-test": []}
    results: Json | None = None
    with console.progress(f"measuring on {host.name}", 1) as advance:
        while (message := connection.next()) is not None and "done" not in message:
            if "failed" in message:
                raise _failure(host, message["failed"])
            if "line" in message and message["script"] == "bench":
                row = _parsed(message["line"], host)
                if "answer" in row:
                    answers.add(row["answer"])
                    advance(0, f"{answers.earlier + answers.new} processes")
                results = row.get("results", results)
            elif "line" in message:
                printed[message["script"]].append(message["line"])
            else:
                _require_end(message, host)
                if message["script"] == "machine":
                    _require_target(_parsed("\n".join(printed["machine"]), host), host, target)
    if message is None or results is None:
        raise _lost(connection, host, answers, f"after {answers.earlier + answers.new} measuring processes")
    answers.discard()
    return RemoteResults(results, _parsed("\n".join(printed["self-test"]), host)["models"], answers.earlier)


def _parsed(text: str, host: Host) -> Json:
    try:
        document: Json = json.loads(text)
        return document
    except ValueError as error:
        raise ProfileError(f"{host.name}: answered what cannot be read: {text[:200]!r}") from error


def _require_end(message: Json, host: Host) -> None:
    """Raises ProfileError when a script did not come to its end; 1 is what a failed self-test ends with."""
    if message["ended"] == 0 or (message["script"] == "self-test" and message["ended"] == 1):
        return
    raise ProfileError(
        f"{host.name}: {message['script']} ended with code {message['ended']}: {message['stderr'].strip()}; mend it "
        "there and repeat the same command"
    )


def _require_target(machine: Json, host: Host, target: Target) -> None:
    reasons = mismatches(target, machine, place=host.name)
    if reasons:
        raise ConfigurationError(f"{'; '.join(reasons)}; name the target that describes {host.name}")


def _upload(connection: _Connection, files: Mapping[str, bytes], scripts: list[Json]) -> None:
    listed = [{"path": path, "size_bytes": len(content)} for path, content in files.items()]
    connection.send(json.dumps({"files": listed, "scripts": scripts}).encode() + b"\n")
    total = sum(len(content) for content in files.values())
    with console.progress("sending the bundle", total) as advance:
        for content in files.values():
            for start in range(0, len(content), _BLOCK_BYTES):
                block = content[start : start + _BLOCK_BYTES]
                connection.send(block)
                advance(len(block))
    connection.heartbeat = True


def _failure(host: Host, failed: Json) -> ProfileError:
    if failed["errno"] in (errno.ENOSPC, errno.EDQUOT):
        return ProfileError(
            f"{host.name}: no space left in {failed['folder']}; free some there, or set device.work_folder in the "
            "target's file, and repeat the same command"
        )
    return ProfileError(f"{host.name}: {failed['text']}; mend it and repeat the same command")


def _lost(connection: _Connection, host: Host, answers: _Kept, when: str) -> ProfileError:
    connection.close()
    kept = (
        f"what was measured is kept in {answers.path}" if answers.earlier + answers.new else "nothing was measured yet"
    )
    return ProfileError(
        f"{host.name}: the connection was lost {when} ({connection.words()}); {kept}. "
        "The device removes its copy by itself; repeat the same command to go on"
    )
