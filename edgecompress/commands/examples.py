"""One example a command, which ends its `--help`; a test parses every one.

What enters: a command's name. What leaves: the epilog of its help.
"""

from __future__ import annotations

_EXAMPLES = {
    "init": "init --data my_images --model timm/tf_efficientnet_lite0 --checkpoint weights.safetensors",
    "apply": "apply prune_kd --output runs/mine --set stages.pruned.epochs=5",
    "export": "export runs/mine --int8 --with-preprocessing",
    "run": "run prune_kd --target x86 --target rpi4 --dry-run",
    "profile": "profile runs/mine --target x86 --thorough",
    "report": "report runs/mine --open",
    "compare": "compare runs/one runs/two",
    "bundle": "bundle runs/mine --target rpi4",
    "verify": "verify runs/mine/bundle/mine-rpi4.tar.gz",
    "sensitivity": "sensitivity runs/mine --images 64",
    "debug-int8": "debug-int8 runs/mine --worst 3",
    "search": "search prune_kd --target x86 --max-accuracy-drop 0.01 --output runs/search",
    "doctor": "doctor",
    "trust": "trust nets.py:build",
    "recipes list": "recipes list",
    "recipes show": "recipes show prune_kd > mine.yaml",
    "recipes validate": "recipes validate mine.yaml",
    "targets list": "targets list",
    "targets show": "targets show rpi4 > mine.yaml",
    "targets validate": "targets validate mine.yaml",
    "targets detect": "targets detect --output this-machine.yaml",
    "targets schema": "targets schema > target.schema.json",
    "schema list": "schema list",
    "schema show": "schema show run",
    "runs list": "runs list",
    "runs rm": "runs rm runs/mine --yes",
}


def example(command: str) -> str | None:
    """The epilog of a command's help; None for one that has no example."""
    words = _EXAMPLES.get(command)
    # \b keeps the lines as they are.
    return None if words is None else f"\b\nExample:\n  edgecompress {words}"
