"""The far end of `profile --host`: takes a bundle from the connection, runs its scripts, and leaves nothing behind.

What enters on stdin: a header, the files, then a heartbeat every few seconds. What leaves on stdout: lines that begin
with MARK, one JSON object each. Sent as source to the device's own Python 3.9 or newer, so the standard library is all
that it may import. It lives exactly as long as the connection: when stdin ends, or no heartbeat comes, the scripts are
killed and the folder is removed. A folder whose attendant was killed itself is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

MARK = "@edgecompress "
PREFIX = "session-"
HEARTBEAT_SECONDS = 3.0
SILENCE_SECONDS = 30.0
_STDERR_BYTES = 4000
_ORPHAN_SECONDS = 60.0


def say(**message: Any) -> None:
    """One line for the near end."""
    with _writing:
        sys.stdout.write(MARK + json.dumps(message) + "\n")
        sys.stdout.flush()


_writing = threading.Lock()


def _packages() -> dict[str, Any]:
    """Versions of what the scripts need, or why they cannot be imported."""
    found: dict[str, Any] = {"problem": None, "numpy": None, "onnxruntime": None, "providers": []}
    try:
        import numpy
        import onnxruntime

        found["numpy"], found["onnxruntime"] = numpy.__version__, onnxruntime.__version__
        found["providers"] = list(onnxruntime.get_available_providers())
    except Exception as error:  # a wheel for another CPU fails in ways of its own
        found["problem"] = f"{type(error).__name__}: {error}"
    return found


def _machine_id() -> str:
    """What tells this device from another one that has its address."""
    for path in ("/etc/machine-id", "/proc/device-tree/serial-number"):
        try:
            return Path(path).read_text(encoding="ascii", errors="replace").strip("\0\n ")
        except OSError:
            continue
    return platform.node()


def _sweep(base: Path) -> None:
    """Remove folders of attendants that were killed: nobody holds their lock."""
    for folder in base.glob(f"{PREFIX}*"):
        try:
            with (folder / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            if time.time() - folder.stat().st_mtime > _ORPHAN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # it is in use
            continue


class Session:
    """This connection's folder and running script, and the one way in which both end: `close`, from any thread."""

    def __init__(self, stream: BinaryIO, base: Path) -> None:
        self.stream = stream
        self.base = base
        self.base_made = not base.exists()
        self.folder: Path | None = None
        self.child: subprocess.Popen[str] | None = None
        self.last = time.monotonic()
        self._closing = threading.Lock()

    def on_signal(self, *_: Any) -> None:
        """Close; but not once more from within `close`, which this thread may be at."""
        if not self._closing.locked():
            self.close()

    def close(self) -> None:
        """Kill the script and all that it started, remove the folder, and end this process."""
        self._closing.acquire()  # never given back: the first thread to come here ends the process
        self._kill()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.base_made:
            with contextlib.suppress(OSError):  # another session is in it
                self.base.rmdir()
        # Not sys.exit: a reading thread would hold the process for as long as the connection stands.
        os._exit(0)

    def _kill(self) -> None:
        child = self.child
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def guard(self) -> None:
        """End when nothing has come from the near end for too long."""
        while time.monotonic() - self.last < SILENCE_SECONDS:
            time.sleep(HEARTBEAT_SECONDS)
        self.close()

    def beat(self) -> None:
        """Tell the near end that this one lives. Not in `guard`: where the connection is stuck, this waits."""
        with contextlib.suppress(OSError, ValueError):
            while True:
                time.sleep(HEARTBEAT_SECONDS)
                say(alive=True)

    def watch(self) -> None:
        """Read heartbeats, and end when the connection does."""
        while self.stream.readline():
            self.last = time.monotonic()
        self.close()

    def receive(self, folder: Path, files: list[dict[str, Any]]) -> None:
        """Write the files that follow on the connection: {"path", "size_bytes"} in this order."""
        for entry in files:
            path = folder / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            left = int(entry["size_bytes"])
            with path.open("wb") as out:
                while left:
                    block = self.stream.read(min(left, 1 << 16))
                    if not block:
                        self.close()
                    self.last = time.monotonic()
                    out.write(block)
                    left -= len(block)

    def run(self, script: dict[str, Any], folder: Path) -> None:
        """Run one script, hand on what it prints line by line, then how it ended."""
        with tempfile.TemporaryFile(dir=folder) as errors:
            child = subprocess.Popen(
                [sys.executable, *script["command"]],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # a group of its own, so that its measuring processes end with it
            )
            self.child = child
            assert child.stdout is not None
            for line in child.stdout:
                say(script=script["name"], line=line.rstrip("\n"))
            code = child.wait()
            self._kill()
            self.child = None
            errors.seek(0, os.SEEK_END)
            errors.seek(max(0, errors.tell() - _STDERR_BYTES))
            say(script=script["name"], ended=code, stderr=errors.read().decode("utf-8", "replace"))


def attend() -> None:
    """Greet, receive, run, clean up."""
    stream = sys.stdin.buffer
    session = Session(stream, Path(os.path.expanduser("~")) / json.loads(stream.readline())["work_folder"])
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, session.on_signal)
    for work in (session.guard, session.beat):
        threading.Thread(target=work, daemon=True).start()
    try:
        session.base.mkdir(parents=True, exist_ok=True)
        _sweep(session.base)
        facts = {"python": platform.python_version(), "executable": sys.executable, "machine_id": _machine_id()}
        free = shutil.disk_usage(session.base).free
        say(hello={**facts, **_packages(), "folder": str(session.base), "free_bytes": free})
        line = stream.readline()
        if not line:
            session.close()
        order = json.loads(line)
        session.folder = folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=session.base))
        with (folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            session.receive(folder, order["files"])
            threading.Thread(target=session.watch, daemon=True).start()
            for script in order["scripts"]:
                session.run(script, folder)
        shutil.rmtree(folder)
        say(done=True)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # perhaps nobody listens any more
            say(failed={"errno": error.errno, "text": str(error), "folder": str(session.base)})
    finally:
        session.close()


if __name__ == "__main__":
    attend()
