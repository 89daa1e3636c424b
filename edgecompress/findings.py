"""What was found about a run's layers, and by a search, as typed results: what the Python API returns beside runs.

What enters: what `sensitivity`, `debug-int8` and `search` wrote. What leaves: frozen dataclasses, each with its
whole document. A search's runs are read with `open_run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecompress.results import Estimate
from edgecompress.run_directory import Json, read_json


@dataclass(frozen=True)
class LayerLoss:
    """What int8 costs in one layer. `alone_sqnr_db` is with this layer alone in int8, None where nothing is lost;
    `gain_db` what its return to float wins over full int8."""

    name: str
    alone_sqnr_db: float | None
    alone_agreement: float
    gain_db: float | None


@dataclass(frozen=True)
class Cause:
    """Why something is lost, and the setting that mends it; `full_sqnr_db` is of full int8 with it, where simulated."""

    kind: str
    words: str
    setting: str
    full_sqnr_db: float | None


@dataclass(frozen=True)
class Sensitivity:
    """What int8 costs in each layer, the worst first, and what share of each layer's channels may go.

    `layers` is empty where int8 was not asked for, `layer_ratios` None where channels were not, or where no ratios
    reach what was asked (`reason`). Channels by group and ratio stand in `document["channels"]`.
    """

    path: Path
    sqnr_db: float | None
    agreement: float | None
    layers: tuple[LayerLoss, ...]
    layer_ratios: dict[str, float] | None
    removed_macs: float | None
    reason: str | None
    document: Json = field(repr=False)


@dataclass(frozen=True)
class DiagnosedLayer:
    """A layer that loses much by int8, and why; no cause where it is the usual cost of 8 bits."""

    name: str
    alone_sqnr_db: float | None
    gain_db: float | None
    causes: tuple[Cause, ...]


@dataclass(frozen=True)
class Int8Diagnosis:
    """The layers that lose most by int8, the worst first, and what concerns the model as a whole."""

    path: Path
    sqnr_db: float | None
    agreement: float
    layers: tuple[DiagnosedLayer, ...]
    model: tuple[Cause, ...]
    document: Json = field(repr=False)


@dataclass(frozen=True)
class FrontPoint:
    """A complete run of a search: no other trial is better in everything. `missed` names the limits that it misses.

    `accuracy` is the int8 file's own on val, by which the search chooses; `latency_ms` is None where the target was not
    at hand.
    """

    trial: int
    run: Path
    accuracy: Estimate
    latency_ms: float | None
    size_bytes: int
    missed: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class SearchResult:
    """What a search found. `pick` is the point to ship, None where none keeps every limit; `reason` says why."""

    path: Path
    status: str
    front: tuple[FrontPoint, ...]
    pick: FrontPoint | None
    reason: str
    document: Json = field(repr=False)


def sensitivity_result(path: Path) -> Sensitivity:
    """A sensitivity.json, typed."""
    document = read_json(path)
    full, rows = document.get("full", {}), {row["layer"]: row for row in document.get("layers", [])}
    proposal = document.get("channels", {}).get("proposal", {})
    return Sensitivity(
        path=path,
        sqnr_db=full.get("sqnr_db"),
        agreement=full.get("agreement"),
        layers=tuple(
            LayerLoss(name, row["alone_sqnr_db"], float(row["alone_agreement"]), row["gain_db"])
            for name, row in ((name, rows[name]) for name in document.get("worst_first", []))
        ),
        layer_ratios=proposal.get("layer_ratios"),
        removed_macs=proposal.get("removed_macs"),
        reason=proposal.get("reason"),
        document=document,
    )


def diagnosis_result(path: Path) -> Int8Diagnosis:
    """A debug.json, typed."""
    document = read_json(path)
    return Int8Diagnosis(
        path=path,
        sqnr_db=document["full"]["sqnr_db"],
        agreement=float(document["full"]["agreement"]),
        layers=tuple(
            DiagnosedLayer(row["layer"], row["alone_sqnr_db"], row["gain_db"], _causes(row["causes"]))
            for row in document["layers"]
        ),
        model=_causes(document["model"]),
        document=document,
    )


def _causes(rows: list[Mapping[str, Any]]) -> tuple[Cause, ...]:
    return tuple(Cause(row["kind"], row["words"], row["setting"], row["full_sqnr_db"]) for row in rows)


def search_result(folder: Path, document: Json) -> SearchResult:
    """The content of search.json, typed; runs are found from `folder`."""
    front = tuple(
        FrontPoint(
            trial=int(row["trial"]),
            run=folder / row["run"],
            accuracy=Estimate(float(row["accuracy"]), *map(float, row["accuracy_ci95"])),
            latency_ms=row["latency_ms_p50"],
            size_bytes=int(row["size_bytes"]),
            missed=tuple(row["missed"]),
            settings=dict(row["settings"]),
        )
        for row in document["front"]
    )
    return SearchResult(
        path=folder,
        status=str(document["status"]),
        front=front,
        pick=next((point for point in front if point.trial == document["pick"]), None),
        reason=str(document["reason"]),
        document=document,
    )
