"""What to do next: the command that a command's last line names.

What enters: what a command found. What leaves: one command to copy, with a word behind `#` where something is to be
done by hand first.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edgecompress.deploy.verify import Verification
    from edgecompress.pipeline import Outcome
    from edgecompress.run_directory import Json


_OF_ONE_RUN = ("--resume", "--no-resume", "--json", "--quiet", "--no-gate")  # of a command that is given again


def next_command(outcome: Outcome) -> str:
    """After a step of a run: the step that is still missing, or what the verdict asks for."""
    run, manifest = shlex.quote(str(outcome.run.path)), outcome.manifest
    targets = outcome.targets or tuple(map(str, manifest.get("targets") or ()))[:1] or ("x86",)
    exported = manifest.get("exports", {})
    if not exported:
        return f"edgecompress export {run} --int8"
    if not any(export.get("int8") for export in exported.values()):
        return f"edgecompress export {run} --int8  # for int8 too"
    for target in targets:
        profile = outcome.profiles.get(target) or outcome.run.read_profile(target)
        if profile is None:
            return f"edgecompress profile {run} --target {shlex.quote(target)}"
        if profile["verdict"] == "hold":
            return f"edgecompress debug-int8 {run}"
        if profile["verdict"] == "inconclusive" and profile["measured"]:
            return f"edgecompress profile {run} --target {shlex.quote(target)} --thorough"
    if outcome.profiles and not outcome.reports:
        return f"edgecompress report {run} --open"
    return f"edgecompress bundle {run} --target {shlex.quote(targets[0])}"


def after_validation(kind: str, name: str, searched: Sequence[str]) -> str:
    """A valid recipe is tried, or searched where it leaves something open; a valid target is measured for."""
    if kind == "target":
        return shlex.join(["edgecompress", "run", "prune_kd", "--target", name])
    if searched:
        words = ["search", name, "--target", _own_target(), "--max-accuracy-drop", "0.01", "--dry-run"]
    else:
        words = ["run", name, "--target", _own_target(), "--dry-run"]
    return shlex.join(["edgecompress", *words])


def after_examination(is_fit: bool) -> str:
    """A machine that is fit runs the shipped recipe; one that is not is looked at again."""
    if is_fit:
        return f"edgecompress run prune_kd --target {_own_target()}"
    return "edgecompress doctor  # once the problems above are mended"


def after_sensitivity(outcome: Outcome, document: Json, what: Literal["int8", "channels", "both"]) -> str:
    """The proposed ratios are tried; what int8 costs is explained."""
    ratios = document.get("channels", {}).get("proposal", {}).get("layer_ratios")
    if what != "int8" and ratios:
        return f"{_again(outcome.manifest)}  # with these layer_ratios in a prune stage of the recipe"
    return shlex.join(["edgecompress", "debug-int8", str(outcome.run.path)])


def after_diagnosis(outcome: Outcome, document: Json) -> str:
    """The settings that mend something are tried; where nothing is wrong, the run goes on."""
    if document.get("model") or any(layer["causes"] for layer in document["layers"]):
        return f"{_again(outcome.manifest)}  # with a setting from above in stage {document['stage']}"
    return next_command(outcome)


def after_bundle(archive: Path) -> str:
    """A bundle is checked, as it will be on the other side."""
    return shlex.join(["edgecompress", "verify", str(archive)])


def after_verification(found: Verification) -> str | None:
    """What is whole goes on its way; what is not is made again. None where no command mends it."""
    path = shlex.quote(found.path)
    if found.kind == "run":
        return f"edgecompress report {path} --open" if found.ok else None
    if not found.ok:
        return "edgecompress bundle RUN --target T  # write it again from its run"
    if found.kind == "archive":
        return f"tar xzf {path}  # on the device; then in its folder: python3 infer.py --self-test"
    return f"cd {path} && python3 infer.py --self-test  # on the device"


def after_comparison(document: Json) -> str:
    """The first candidate that may ship is bundled; where none may, the first is asked why."""
    candidates = document["candidates"]
    fit = [candidate for candidate in candidates if candidate["verdict"] == "ship"]
    if fit:
        return shlex.join(["edgecompress", "bundle", str(fit[0]["run"]), "--target", str(fit[0]["target"])])
    return shlex.join(["edgecompress", "debug-int8", str(candidates[0]["run"])])


def after_search(document: Json) -> str:
    """The pick is bundled; where there is none, the nearest point is looked at."""
    runs = {row["trial"]: row["run"] for row in document["front"]}
    folder, target = Path(document["folder"]), str(document["target"])
    if document["pick"] is not None:
        return shlex.join(["edgecompress", "bundle", str(folder / runs[document["pick"]]), "--target", target])
    nearest = folder / document["nearest"][0]["run"] if document["nearest"] else folder
    if nearest == folder:
        return shlex.join(["edgecompress", "search", "--help"])
    return shlex.join(["edgecompress", "report", str(nearest), "--open"])


def _again(manifest: Json) -> str:
    """The command that makes a run like this one, in a new directory."""
    words = shlex.split(str(manifest.get("command") or ""))
    if words[:1] != ["edgecompress"] or words[1:2] not in (["run"], ["apply"]):  # a trial of a search, for instance
        words = ["edgecompress", "run", str(manifest.get("recipe_source") or manifest["recipe_name"])]
        for target in manifest.get("targets") or [_own_target()]:
            words += ["--target", str(target)]
        for override in manifest.get("overrides") or []:
            words += ["--set", str(override)]
    kept = [word for before, word in zip(["", *words], words, strict=False) if "--output" not in (before, word)]
    return shlex.join(w for w in kept if w not in _OF_ONE_RUN and not w.startswith("--output="))


def _own_target() -> str:
    from edgecompress.settings.target import own_target

    return own_target().name
