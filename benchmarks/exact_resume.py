"""Kill training at random points, go on, and compare the final weights bit for bit with a run that was never stopped.

    python benchmarks/exact_resume.py --kills 20
    python benchmarks/exact_resume.py --recipe prune_kd --set stages.dense.epochs=4 --kills 3

Each kill is a SIGKILL at a moment drawn by seed within the time that the undisturbed command took (start-up
included); then the same command goes on with --resume. Every .safetensors file of the stages is compared by its sha256,
and metrics.jsonl must hold each epoch once. Ends with 1 where any run differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgecompress.run_directory import sha256_of


def _command(arguments: argparse.Namespace, output: Path) -> list[str]:
    overrides = [part for text in arguments.overrides for part in ("--set", text)]
    command = [sys.executable, "-m", "edgecompress", "apply", arguments.recipe, "--output", str(output)]
    return [*command, "--resume", "--quiet", "--no-gate", *overrides]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")


def _weights(run: Path) -> dict[str, str]:
    return {str(path.relative_to(run)): sha256_of(path) for path in sorted(run.glob("stages/*/*.safetensors"))}


def _epochs(run: Path) -> list[tuple[str, str, int]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["stage"], line["phase"], line["epoch"]) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="prune_kd")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary folder otherwise")
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.folder or Path(temporary)
        whole = folder / "whole"
        started = time.monotonic()
        _run(_command(arguments, whole))
        seconds = time.monotonic() - started
        expected, epochs = _weights(whole), _epochs(whole)
        print(f"undisturbed: {seconds:.1f} s, {len(epochs)} epochs, {len(expected)} files of weights", flush=True)
        identical = 0
        for number in range(1, arguments.kills + 1):
            run = folder / f"killed-{number}"
            moment = drawn.uniform(0.0, seconds)
            process = subprocess.Popen(_command(arguments, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(timeout=moment)
                where = "had ended"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                where = (
                    f"killed in epoch {len(_epochs(run)) + 1}" if (run / "metrics.jsonl").is_file() else "killed early"
                )
            _run(_command(arguments, run))
            same = _weights(run) == expected and _epochs(run) == epochs
            identical += same
            print(f"{number}: {where} at {moment:.1f} s: {'identical' if same else 'DIFFERENT'}", flush=True)
    print(f"identical: {identical} of {arguments.kills}")
    sys.exit(0 if identical == arguments.kills else 1)


if __name__ == "__main__":
    main()
