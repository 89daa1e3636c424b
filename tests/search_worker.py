"""One worker of a shared search, for tests: trials that only sleep, and a worker that dies in the middle of one.

Arguments: the storage, the search's folder, the number of trials, seconds a trial takes, and the trial of its own (the
first, the second, ...) at which it kills itself; 0 for never.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from edgecompress.searching.study import SharedStudy
from edgecompress.settings.search_space import Dimension

DIMENSIONS = (Dimension("ratio", 0.1, 0.9), Dimension("scope", choices=("global", "layer", {"own": 1})))


def open_study(url: str, folder: Path) -> SharedStudy:
    return SharedStudy(url, "test", dimensions=DIMENSIONS, seed=0, locks=folder / "locks")


def main(url: str, folder: Path, trials: int, seconds: float, dies_at: int) -> None:
    study = open_study(url, folder)
    study.offer([{"ratio": share / 10, "scope": "layer"} for share in (1, 5, 9)], "spread")
    own = 0
    while True:
        attempt = study.ask(trials)
        if attempt is None:
            if not study.others_at_work():
                return
            time.sleep(0.1)
            continue
        own += 1
        with (folder / "log").open("a") as log:
            log.write(f"begin {attempt.trial} {os.getpid()} {attempt.settings['ratio']!r}\n")
        time.sleep(seconds / 2)
        if own == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds / 2)
        with (folder / "log").open("a") as log:
            log.write(f"end {attempt.trial} {os.getpid()} {attempt.settings['ratio']!r}\n")
        ratio = attempt.settings["ratio"]
        study.finish(attempt, {"status": "complete", "worker": os.getpid()}, values=(1 - ratio, ratio), drop=0.0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
