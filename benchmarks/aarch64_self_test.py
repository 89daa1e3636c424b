"""Does a bundle give its expected answers on 64-bit Arm? Its self-test under user-mode emulation; never a latency.

    python benchmarks/aarch64_self_test.py runs/mine/bundle/prune_kd-arm64
    python benchmarks/aarch64_self_test.py BUNDLE --cpu cortex-a72 --cpu max --root arm64-root   # keeps what it fetched

Needs qemu-aarch64 (Debian: qemu-user), apt-get and dpkg-deb, and their and pip's usual package sources: Debian's Python
for arm64 is unpacked into a folder (nothing is installed on this machine), and numpy's and onnxruntime's aarch64 wheels
beside it. It proves that the files load on Arm, that their operators exist there, and how far the Arm kernels agree
with the expected logits. The CPUs differ in what they can multiply: cortex-a72 (Raspberry Pi 4) has no dot products,
cortex-a76 (Raspberry Pi 5) has them, max has all that the emulator knows. Emulated time says nothing about a device, so
none is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Emulated CPU, and the part number that an Arm kernel gives for it in /proc/cpuinfo.
CPUS = {"cortex-a72": "0xd08", "cortex-a76": "0xd0b", "max": "0xd0b"}
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")
EMULATOR = "qemu-aarch64"


def run(command: list[str | Path], *, what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{what} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def unpack_python(root: Path) -> Path:
    """Debian's Python for arm64 and what it depends on, unpacked into `root`; returns its program."""
    state, cache = root / "apt" / "state", root / "apt" / "cache"
    for folder in (state / "lists" / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "apt" / "status").touch()
    apt = ["apt-get", "-q", "-o", "APT::Architecture=arm64", "-o", "APT::Architectures::=arm64"]
    apt += ["-o", f"Dir::State={state}", "-o", f"Dir::State::status={root / 'apt' / 'status'}"]
    apt += ["-o", f"Dir::Cache={cache}", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
    run([*apt, "update"], what="apt-get update for arm64")
    run(
        [*apt, "install", "--download-only", "-y", "--no-install-recommends", "python3", "libstdc++6", "libgcc-s1"],
        what="fetching Debian's Python for arm64",
    )
    for package in sorted((cache / "archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, root], what=f"unpacking {package.name}")
    return next(path for path in sorted((root / "usr" / "bin").glob("python3.*")) if path.name[8:].isdigit())


def unpack_wheels(root: Path, python: Path) -> None:
    """numpy, onnxruntime and what they depend on, for this Python on aarch64."""
    wheels = root / "wheels"
    command: list[str | Path] = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "-d", wheels]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += [
        "--implementation",
        "cp",
        "--python-version",
        python.name.removeprefix("python"),
        "numpy",
        "onnxruntime",
    ]
    run(command, what="fetching aarch64 wheels")
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(root / "site")


def describe_cpu(root: Path, cpu: str) -> None:
    """Write the /proc/cpuinfo that the emulated programs see.

    They would read this machine's own, which on x86 names no Arm CPU; onnxruntime 1.32 crashes on it.
    """
    (root / "proc").mkdir(exist_ok=True)
    fields = {"BogoMIPS": "100.00", "Features": "fp asimd", "CPU implementer": "0x41", "CPU architecture": "8"}
    fields |= {"CPU variant": "0x1", "CPU part": CPUS[cpu], "CPU revision": "1"}
    processors = ({"processor": str(index), **fields} for index in range(os.cpu_count() or 1))
    blocks = ("".join(f"{name}\t: {value}\n" for name, value in processor.items()) for processor in processors)
    (root / "proc" / "cpuinfo").write_text("\n".join(blocks) + "\n", encoding="ascii")


def self_test(bundle: Path, root: Path, python: Path, cpu: str) -> tuple[str, list[dict[str, object]]]:
    """Versions as the emulated machine reports them, and the rows of the self-test."""
    describe_cpu(root, cpu)
    emulated: list[str | Path] = [EMULATOR, "-cpu", cpu, "-L", root, "-E", f"PYTHONPATH={root / 'site'}", python, "-B"]
    facts = "import numpy, onnxruntime as o, platform as p; print(p.machine(), p.python_version(), o.__version__)"
    machine = run([*emulated, "-c", facts], what=f"Python on {cpu}").split()
    if machine[0] != "aarch64":
        raise SystemExit(f"the emulator reports {machine[0]}, not aarch64")
    command = [*emulated, bundle / "infer.py", "--self-test", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SystemExit(f"the self-test on {cpu} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return f"Python {machine[1]}, onnxruntime {machine[2]}", json.loads(done.stdout)["models"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--cpu", action="append", choices=CPUS, help="emulated CPU, may be repeated (default: all)")
    parser.add_argument("--root", type=Path, help="folder for Python and wheels of arm64, kept for the next time")
    arguments = parser.parse_args()
    lost = [tool for tool in (EMULATOR, "apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if lost:
        raise SystemExit(f"not installed: {', '.join(lost)} (Debian: qemu-user, apt, dpkg)")
    if not (arguments.bundle / "infer.py").is_file():
        raise SystemExit(f"{arguments.bundle}: is no bundle's folder; make one: edgecompress bundle RUN --target arm64")
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.root or Path(scratch)).resolve()
        made = root / "made"
        if not made.is_file():
            python = unpack_python(root)
            unpack_wheels(root, python)
            made.write_text(str(python.relative_to(root)))
        python = root / made.read_text()
        passed = True
        print("| emulated CPU | model | images | same top class | largest difference | allowed | rms | allowed | |")
        print("|---|---|---|---|---|---|---|---|---|")
        for cpu in arguments.cpu or CPUS:
            versions, rows = self_test(arguments.bundle.resolve(), root, python, cpu)
            for row in rows:
                allowed = row["allowed"]
                print(
                    f"| {cpu} | {row['model']} | {row['samples']} | {row['same_top1']} | {row['max_abs_diff']:.3g} | "
                    f"{allowed['max_abs_diff']:.3g} | {row['rms_diff']:.3g} | {allowed['rms_diff']:.3g} | "
                    f"{'passed' if row['passed'] else 'FAILED'} |"
                )
                for problem in row["problems"]:
                    print(f"    {problem}")
                passed = passed and bool(row["passed"])
        emulator = run([EMULATOR, "--version"], what=EMULATOR).splitlines()[0]
        print(f"\n{versions}; {emulator}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
