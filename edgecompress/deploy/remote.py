"""A device over SSH: a bundle and its scripts go there, what they measured comes back, nothing stays.

What enters: a host as OpenSSH knows it, a bundle's folder. What leaves: the content of bench.json and of the self-test.
One connection does it all, because the far end (device/attendant.py) lives exactly as long as its connection. Answers
of measuring processes are kept as they arrive, and an attempt that was cut off goes on with them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgecompress import console
from edgecompress.deploy.connection import Connection, Host
from edgecompress.device import attendant
from edgecompress.errors import ConfigurationError, ProfileError
from edgecompress.machine import mismatches
from edgecompress.measure.measuring import STANDARD
from edgecompress.run_directory import Json
from edgecompress.settings.target import Target

PYTHON_MIN = "3.9"
_BLOCK_BYTES = 1 << 18
_DESCRIBE = (
    "import json, sys; sys.path.insert(0, 'bundle'); from edgecompress.machine import describe_machine; "
    "print(json.dumps(describe_machine()))"
)


@dataclass(frozen=True)
class RemoteResults:
    """What came back: the content of bench.json, and the rows of the self-test."""

    bench: Json
    self_test: list[Json]
    reused: int


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
    connection = Connection(host)
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


def _greet(connection: Connection, host: Host) -> Json:
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
    connection: Connection, host: Host, bundle: Path, target: Target, how: list[str], answers: _Kept
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


def _upload(connection: Connection, files: Mapping[str, bytes], scripts: list[Json]) -> None:
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


def _lost(connection: Connection, host: Host, answers: _Kept, when: str) -> ProfileError:
    connection.close()
    kept = (
        f"what was measured is kept in {answers.path}" if answers.earlier + answers.new else "nothing was measured yet"
    )
    return ProfileError(
        f"{host.name}: the connection was lost {when} ({connection.words()}); {kept}. "
        "The device removes its copy by itself; repeat the same command to go on"
    )
