"""A device over SSH, which is this machine behind an sshd of the test's own: there, back, and every way it can end."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bundle_runs import here, small_run
from conftest import CommandLine
from edgecompress import pipeline
from edgecompress.deploy import connection as connecting
from edgecompress.deploy import remote
from edgecompress.deploy.bench_results import measured_elsewhere, read_bench
from edgecompress.deploy.bundle import fill_folder, write_bundle
from edgecompress.deploy.connection import Host
from edgecompress.deploy.remote import RemoteResults, measure_on
from edgecompress.device import attendant
from edgecompress.errors import ConfigurationError, EdgeCompressError, ProfileError
from edgecompress.run_directory import Json, RunDirectory, write_json

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
TOOLS = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None] + ([] if SSHD else ["sshd"])
pytestmark = pytest.mark.skipif(bool(TOOLS), reason=f"not installed: {', '.join(TOOLS)} (Debian: openssh-server)")


@dataclass(frozen=True)
class Server:
    """An sshd on the loopback that knows one key, and how to reach it."""

    process: psutil.Process
    port: int
    folder: Path
    host: Host

    def connections(self) -> list[psutil.Process]:
        """Its processes, one or two for each connection."""
        return [child for child in self.process.children(recursive=True) if child.name().startswith("sshd")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    public = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/client.pub\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"Host device\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {folder}/client\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
        f"  UserKnownHostsFile {folder}/known\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd as root locks itself up; the system makes it at its start
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        else:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text().strip()}")
        host = Host("device", python=sys.executable, ssh=f"ssh -F {folder}/ssh_config")
        yield Server(psutil.Process(process.pid), port, folder, host)
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return small_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def bundle(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    folder = tmp_path_factory.mktemp("bundle")
    made = fill_folder(folder, run, here(), exported=run.export, name="bundle", preprocessing_inside=False)
    return folder, made


@pytest.fixture
def device(server: Server, tmp_path: Path) -> Host:
    """The device, with a work folder of the test's own."""
    return replace(server.host, work_folder=str(tmp_path / "device"))


def left_behind(device: Host, *, seconds: float = 15.0) -> list[str]:
    """Folders and processes of the device that are still there after `seconds`, or as soon as there are none."""
    deadline = time.monotonic() + seconds
    while True:
        found = [str(path) for path in Path(device.work_folder).glob("*")]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it ended meanwhile
                words = " ".join(process.cmdline())
                inside = process.cwd().startswith(device.work_folder)
                if process.pid != os.getpid() and (inside or "sys.stdin.buffer.readline()" in words):
                    found.append(f"{process.pid} {words}")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def measure(device: Host, bundle: tuple[Path, Json], kept: Path, *, seconds: float = 0.3) -> RemoteResults:
    return measure_on(device, *bundle, target=here(), seconds=seconds, kept=kept)


# ---- there and back


@pytest.mark.slow
def test_a_device_is_profiled_and_nothing_stays(run: RunDirectory, device: Host, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    write_json(tmp_path / "here.json", here().model_dump(mode="json"))
    outcome = pipeline.profile(run.path, target=str(tmp_path / "here.json"), seconds=0.5, host=device)
    profile = json.loads(run.profile_path("here").read_text())
    assert profile["measured"] is True
    assert profile["device"]["place"] == "device"
    assert profile["device"]["machine"]["cores"]
    assert [row["passed"] for row in profile["device"]["self_test"]] == [True, True]
    for model in profile["models"].values():
        assert 0 < model["latency_ms"]["p50"] <= model["latency_ms"]["p99"]
        assert model["load_ms"] > 0
        assert model["macs"] > 0
    low, high = profile["int8_speedup"]["ci95"]
    assert low <= profile["int8_speedup"]["ratio"] <= high
    assert profile["verdict"] in ("ship", "hold", "inconclusive")
    assert outcome.reports["here"].html.stat().st_size > 1000
    assert list(run.path.glob("profile/.*")) == []
    assert left_behind(device) == []
    assert not Path(device.work_folder).exists()  # it was not there before


@pytest.mark.slow
def test_a_cut_connection_is_said_and_a_second_try_goes_on(
    server: Server, device: Host, bundle: tuple[Path, Json], tmp_path: Path
) -> None:
    """The server's processes of this connection are killed while bench.py measures, as when a cable is pulled."""
    failure: list[BaseException] = []

    def attempt() -> None:
        try:
            measure(device, bundle, tmp_path / "kept", seconds=15)
        except EdgeCompressError as error:
            failure.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        (kept,) = list(tmp_path.glob("kept/.*.jsonl")) or [None]
        if kept is not None and kept.read_text().count("\n") >= 8:
            break
        time.sleep(0.05)
    assert list(Path(device.work_folder).glob("session-*"))
    for connection in server.connections():
        connection.kill()
    thread.join(timeout=60)
    (error,) = failure
    assert isinstance(error, ProfileError)
    assert "the connection was lost after" in str(error)
    assert "repeat the same command to go on" in str(error)
    assert left_behind(device) == []
    assert kept is not None
    rows = kept.read_text().count("\n")
    # The same command; with another time to spend, the answers would be those of other questions.
    started = time.monotonic()
    finished = measure(device, bundle, tmp_path / "kept", seconds=15)
    assert finished.reused == rows
    assert time.monotonic() - started < 120
    assert len(finished.bench["latency"]["reference_ms"]) >= 5
    assert not kept.exists()
    assert left_behind(device) == []


@pytest.mark.slow
def test_a_silent_connection_ends_at_both_ends(
    device: Host, bundle: tuple[Path, Json], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh is stopped, so nothing is closed and nothing is said: each end must notice by itself."""
    impatient = Path(attendant.__file__).read_text().replace("SILENCE_SECONDS = 30.0", "SILENCE_SECONDS = 4.0")
    (tmp_path / "attendant.py").write_text(impatient)
    monkeypatch.setattr(attendant, "__file__", str(tmp_path / "attendant.py"))
    monkeypatch.setattr(attendant, "HEARTBEAT_SECONDS", 1.0)
    monkeypatch.setattr(connecting, "SILENCE_SECONDS", 8.0)
    connections: list[connecting.Connection] = []

    class Stopping(connecting.Connection):
        def next(self) -> Json | None:
            connections.append(self)
            message = super().next()
            if message is not None and message.get("script") == "bench":
                psutil.Process(self.process.pid).suspend()
            return message

    monkeypatch.setattr(remote, "Connection", Stopping)
    with pytest.raises(ProfileError, match=r"connection was lost after .*no sign of life for 8 s"):
        measure(device, bundle, tmp_path / "kept", seconds=60)
    assert left_behind(device) == []
    assert connections[0].process.returncode is not None


def test_folders_that_nobody_holds_are_swept(device: Host, bundle: tuple[Path, Json], tmp_path: Path) -> None:
    base = Path(device.work_folder)
    for name in ("session-dead", "session-alive", "other"):
        (base / name).mkdir(parents=True)
        (base / name / "lock").touch()
    connection = connecting.Connection(device)
    with (base / "session-alive" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            assert remote._greet(connection, device)["folder"] == str(base)
        finally:
            connection.close()
    assert sorted(path.name for path in base.iterdir()) == ["other", "session-alive"]


def test_a_device_that_is_not_the_target_is_not_measured(
    device: Host, bundle: tuple[Path, Json], tmp_path: Path
) -> None:
    board = here(device_model="A board that nobody has")
    with pytest.raises(ConfigurationError, match="device names no board; name the target that describes device"):
        measure_on(device, *bundle, target=board, seconds=30, kept=tmp_path)
    assert left_behind(device) == []


# ---- what is missing there


def failing(device: Host, bundle: tuple[Path, Json], tmp_path: Path) -> str:
    with pytest.raises(ProfileError) as caught:
        measure(device, bundle, tmp_path / "kept")
    assert left_behind(device) == []
    return str(caught.value)


def test_a_device_without_the_packages_is_told_what_to_install(
    device: Host, bundle: tuple[Path, Json], tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    message = failing(replace(device, python=str(tmp_path / "venv" / "bin" / "python")), bundle, tmp_path)
    assert "No module named 'numpy'" in message
    assert "pip install numpy 'onnxruntime>=1.17'" in message
    assert "--host-python venv/bin/python" in message


def test_a_device_with_an_old_runtime_is_told_which_one_it_needs(
    device: Host, bundle: tuple[Path, Json], tmp_path: Path
) -> None:
    folder, made = bundle
    message = failing(device, (folder, made | {"onnxruntime_min": "1.999"}), tmp_path)
    assert "the target says 1.999 or newer" in message


def test_a_device_without_python_is_told_so(device: Host, bundle: tuple[Path, Json], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    message = failing(replace(device, python=f"python;touch${{IFS}}{mark}"), bundle, tmp_path)
    assert "install Python 3.9 or newer there" in message
    assert not mark.exists()


def test_a_server_that_does_not_answer(server: Server, bundle: tuple[Path, Json], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = replace(server.host, ssh=f"{server.host.ssh} -p {free.getsockname()[1]}")
        with pytest.raises(ProfileError, match=r"no connection .*Connection refused.*try by hand: ssh"):
            measure(closed, bundle, tmp_path)
    stranger = replace(server.host, ssh=f"{server.host.ssh} -o UserKnownHostsFile=/dev/null")
    with pytest.raises(ProfileError, match="its host key is not known yet; connect once by hand"):
        measure(stranger, bundle, tmp_path)
    keyless = replace(server.host, ssh=f"{server.host.ssh} -o PubkeyAuthentication=no")
    with pytest.raises(ProfileError, match=r"Permission denied.*ssh-copy-id device"):
        measure(keyless, bundle, tmp_path)
    with pytest.raises(ProfileError, match=r"cannot be started.*install OpenSSH"):
        measure(replace(server.host, ssh="no-such-ssh"), bundle, tmp_path)


@pytest.mark.parametrize("is_known", [True, False], ids=["seen before", "met while writing"])
def test_a_full_disk_is_said(
    device: Host, bundle: tuple[Path, Json], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        device = replace(device, work_folder=str(disk / "work"))
        if not is_known:
            source = Path(attendant.__file__).read_text()
            (tmp_path / "attendant.py").write_text(source.replace("shutil.disk_usage(session.base).free", "10**12"))
            monkeypatch.setattr(attendant, "__file__", str(tmp_path / "attendant.py"))
            upload = remote._upload

            def interrupted(*arguments: Any) -> None:
                """As where ssh ends before all is sent: by then the device has said why."""
                with contextlib.suppress(OSError):
                    upload(*arguments)
                raise BrokenPipeError

            monkeypatch.setattr(remote, "_upload", interrupted)
        message = failing(device, bundle, tmp_path)
        assert ("MB are needed" if is_known else "no space left") in message
        assert "device.work_folder" in message
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- what is refused before anything is started


@pytest.mark.parametrize("host", ["-oProxyCommand=touch${IFS}mark", "", "a b", "a\nb"])
def test_hosts_that_ssh_would_misread_are_refused(command_line: CommandLine, tmp_path: Path, host: str) -> None:
    run = small_run(tmp_path / "run")
    answer = command_line("profile", run.path, "--target", "x86", f"--host={host}")
    answer.refusal("must be one word that does not begin with a dash")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name",
    ["localhost;touch${IFS}mark", "$(touch${IFS}mark)", "a`b`", "u'x@h", 'h"', "me@-oProxyCommand=x", "a|b", "a&b"],
)
def test_hosts_that_a_shell_would_misread_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="--host"):
        Host(name)


@pytest.mark.parametrize("name", ["pi", "user@device.local", "ssh://me@device:2222", "fe80::1%eth0", "DOM+me@10.0.0.7"])
def test_hosts_that_people_have_are_taken(name: str) -> None:
    command = Host(name).command()
    assert command[command.index("--") + 1] == name


def test_the_devices_shell_reads_one_command_whatever_its_python_is_called() -> None:
    command = Host("device", python="/opt/$(touch${IFS}mark)'x/python3").command()[-1]
    assert shlex.split(command)[:2] == ["exec", "/opt/$(touch${IFS}mark)'x/python3"]


@pytest.mark.parametrize(
    "rows", [None, {}, [1], [{"model": "fp32"}], [{"model": "fp32", "passed": True, "problems": [1]}]]
)
def test_a_self_test_that_is_none_is_not_believed(rows: object) -> None:
    with pytest.raises(ValueError, match="self-test"):
        remote._require_rows(rows)


# ---- results that a device wrote by itself


@pytest.fixture(scope="module")
def results(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bench.py of a bundle wrote."""
    folder = tmp_path_factory.mktemp("bench")
    made = write_bundle(run, here(), exported=run.export, output=folder)
    command = [sys.executable, made.folder / "bench.py", "--seconds", "0.2", "--output", folder / "bench.json"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bench.json"


def test_results_of_a_device_are_judged(run: RunDirectory, results: Path, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    write_json(tmp_path / "here.json", here().model_dump(mode="json"))
    pipeline.profile(run.path, target=str(tmp_path / "here.json"), results=results)
    profile = json.loads(run.profile_path("here").read_text())
    bench = json.loads(results.read_text())
    assert profile["measured"] is True
    assert "Measured with the preprocessing inside the models." in profile["notes"]
    assert profile["models"]["int8"]["load_ms"] == bench["fresh"]["int8"]["load_ms"]
    assert profile["method"]["processes"] == len(bench["latency"]["reference_ms"])


def test_results_of_other_files_machines_or_shapes_are_refused(
    run: RunDirectory, results: Path, tmp_path: Path
) -> None:
    models = {"fp32": run.export / "model.onnx", "int8": run.export / "model.int8.onnx"}
    bench = read_bench(results)
    assert measured_elsewhere(bench, models, here(), place="it").machine == bench["machine"]

    def refused(change: dict[str, Any], target: Any = None) -> str:
        with pytest.raises(ConfigurationError) as caught:
            measured_elsewhere({**bench, **change}, models, target or here(), place="the device")
        return str(caught.value)

    swapped = {"fp32": bench["models"]["int8"], "int8": bench["models"]["fp32"]}
    assert "is not this run's" in refused({"models": swapped})
    assert "hold no int8" in refused({"models": {"fp32": bench["models"]["fp32"]}})
    assert "names no board" in refused({}, here(device_model="A board that nobody has"))
    assert "measured with 1 threads, target here says 2" in refused({}, here(threads=2))
    for change in ({"fresh": {}}, {"latency": {}}, {"machine": None}, {"models": []}):
        assert "damaged" in refused(change)
    path = tmp_path / "other.json"
    for text, needle in (
        ("[]", "was not written by"),
        ("{", "cannot be read"),
        ('{"kind": "edgecompress bench"}', "None"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=needle):
            read_bench(path)
