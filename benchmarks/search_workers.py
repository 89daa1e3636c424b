"""How many trials an hour several workers of one search finish, against one worker.

    python benchmarks/search_workers.py --storage postgresql://me@localhost/searches --workers 1 2 4 --trials 12

Every count of workers gets a study of its own in the database and --trials trials of a small recipe on the embedded
digits, each trained from scratch so that no trial waits for another's stage; every worker has one thread. For a target
that is another machine nothing is timed in a trial, so workers only share cores. The clock runs from the first trial's
begin to the last one's end; start-up of the processes is left out, since a search lasts hours. Counted as well: trials
that began more than once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgecompress.machine import describe_machine, summarize_machine

RECIPE = """
name: NAME
data: {name: digits}
model: {name: student_cnn, arguments: {width: {search: [24, 32]}}}
stages:
  - {id: dense, kind: train, epochs: EPOCHS, batch_size: 32, learning_rate: {search: {low: 0.01, high: 0.1, log: true}}}
  - {id: int8, kind: quantize, effort: fast, placement: full, calibration: {samples: 32}}
"""


def finished(folder: Path) -> int:
    """Trials that are over, by search.json; it is replaced whole, so it is always readable."""
    try:
        document = json.loads((folder / "search.json").read_text())
    except OSError:
        return 0
    return sum(trial["status"] != "running" for trial in document["trials"])


def timed(storage: str, work: Path, workers: int, trials: int, epochs: int) -> dict[str, Any]:
    """One search by `workers` processes at a time."""
    folder = work / f"workers-{workers}"
    recipe = work / f"workers-{workers}.yaml"
    recipe.write_text(RECIPE.replace("NAME", f"workers-{workers}-{time.time_ns()}").replace("EPOCHS", str(epochs)))
    words = [sys.executable, "-m", "edgecompress", "search", str(recipe), "--target", "rpi5", "--resume", "--quiet"]
    words += ["--max-accuracy-drop", "1", "--trials", str(trials), "--storage", storage, "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(workers)
    ]
    while not list(folder.glob("trials/*/run.json")):
        if all(process.poll() is not None for process in processes):
            raise SystemExit(f"no worker began a trial; try: {' '.join(words)}")
        time.sleep(0.05)
    begun = time.monotonic()
    while finished(folder) < trials:
        if all(process.poll() is not None for process in processes):
            break
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    codes = [process.wait() for process in processes]
    document = json.loads((folder / "search.json").read_text())
    return {
        "workers": workers,
        "seconds": seconds,
        "trials_per_hour": 3600 * trials / seconds,
        "complete": sum(trial["status"] == "complete" for trial in document["trials"]),
        "begun_again": sum(trial.get("attempts", 1) > 1 for trial in document["trials"]),
        "exit_codes": codes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, help="an empty PostgreSQL database; its tables are made")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=20, help="of each trial's training")
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.trials} trials of one search")
    for column in ("workers", "seconds", "trials an hour", "against one worker", "complete", "begun again"):
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for workers in arguments.workers:
            row = timed(arguments.storage, Path(work), workers, arguments.trials, arguments.epochs)
            rows.append(row)
            ratio = row["trials_per_hour"] / rows[0]["trials_per_hour"]
            counts = (str(row["complete"]), str(row["begun_again"]))
            table.add_row(
                str(workers), f"{row['seconds']:.1f}", f"{row['trials_per_hour']:.0f}", f"{ratio:.2f}", *counts
            )
    console = Console(width=120)
    console.print(table)
    console.print(summarize_machine(describe_machine()))


if __name__ == "__main__":
    main()
