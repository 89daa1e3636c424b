"""Compress a model every night: a bundle where it may ship, and why not where it may not.

    python nightly.py runs/tonight

Started again after a power cut, it goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import edgecompress


def main(output: Path) -> int:
    """Run the shipped recipe prune_kd on the digits that come with it; returns the exit code."""
    result = edgecompress.run(
        "prune_kd",
        target="x86",
        settings={"stages.dense.epochs": 4, "stages.pruned.epochs": 4},  # as --set does; left out, the recipe's
        output=output,
        resume=True,
        thoroughness="quick",
    )
    for stage in result.stages:
        print(f"{stage.id}: accuracy {stage.accuracy}, {stage.params} parameters, {stage.macs} MACs")
    profile = result.profiles["x86"]
    int8 = profile.models["int8"]
    print(f"int8: {int8.size_bytes} bytes, median {int8.latency_ms} ms")
    print(f"fp32 takes {profile.int8_speedup} times as long")
    print(f"verdict: {profile.verdict}; report: {result.reports['x86'].html}")
    if result.missed or profile.verdict != "ship":
        print("\n".join(result.missed or profile.reasons))
        return 1

    bundle = edgecompress.bundle(result, target="x86")
    found = edgecompress.verify(bundle.archive)
    print(f"{bundle.archive}: {'verified' if found.ok else 'NOT VERIFIED'}, {found.files} files")
    return 0 if found.ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except edgecompress.EdgeCompressError as error:
        sys.exit(f"error: {error}")
