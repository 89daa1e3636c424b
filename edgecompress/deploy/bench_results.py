"""What bench.py measured on a device, read back: checked against the run's files and the target, ready to be judged.

What enters: the content of bench.json. What leaves: an `Elsewhere` for the profile. Latencies of other files, or of a
machine that is not the target, are refused: they would stand in a report under the wrong name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.device.bench import KIND, SCHEMA_VERSION
from edgecompress.errors import ConfigurationError
from edgecompress.exporting.preprocessing_graph import PIXEL_FORM, embed_preprocessing, input_form
from edgecompress.machine import mismatches
from edgecompress.measure.latencies import FreshMeasurement, LatencyMeasurement
from edgecompress.measure.profiling import Elsewhere
from edgecompress.models.onnx_files import read_onnx
from edgecompress.run_directory import Json, sha256_of
from edgecompress.settings.target import Target


def read_bench(path: Path) -> Json:
    """The content of a bench.json. Raises ConfigurationError when it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"--results {path}: cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ConfigurationError(f"--results {path}: was not written by a bundle's bench.py")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ConfigurationError(
            f"--results {path}: schema_version {document.get('schema_version')!r}, this edgecompress reads "
            f"{SCHEMA_VERSION}; use the version that made the bundle"
        )
    return document


def measured_elsewhere(bench: Json, models: Mapping[str, Path], target: Target, *, place: str) -> Elsewhere:
    """Check a bench.json against the exported `models` and the target. Raises ConfigurationError.

    Models that were not measured there are an error too, but for the baseline, which a bundle does not hold.
    """
    try:
        measured = {name: str(facts["sha256"]) for name, facts in bench["models"].items()}
        elsewhere = Elsewhere(
            place=place,
            machine=dict(bench["machine"]),
            versions={name: str(bench["versions"][name]) for name in ("numpy", "onnxruntime")},
            threads=int(bench["threads"]),
            fresh={name: FreshMeasurement(**bench["fresh"][name]) for name in measured},
            latency=LatencyMeasurement.from_dict(bench["latency"]),
            notes=_notes(measured, models, place),
        )
        _require_sound(elsewhere)
        reasons = mismatches(target, elsewhere.machine, place=place)
        complete = set(elsewhere.latency.windows_ms) == set(measured)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigurationError(f"{place}: the results are damaged: {error!r}; measure again") from error
    if not complete:
        raise ConfigurationError(f"{place}: the results are damaged: not every model has latencies; measure again")
    if reasons:
        raise ConfigurationError(f"{'; '.join(reasons)}; name the target that describes {place}")
    if bench.get("session") != target.session_settings() or bench.get("providers") != list(target.providers):
        raise ConfigurationError(
            f"{place}: measured with other providers or session options than target {target.name} says; bundle the run "
            "again for this target, and measure that"
        )
    if elsewhere.threads != target.threads:
        raise ConfigurationError(
            f"{place}: measured with {elsewhere.threads} threads, target {target.name} says {target.threads}"
        )
    return elsewhere


def _require_sound(elsewhere: Elsewhere) -> None:
    """Raises ValueError where a number is none: what is judged here stands in a report as measured."""
    latency = elsewhere.latency
    for name, fresh in elsewhere.fresh.items():
        for key, value in asdict(fresh).items():
            values: Sequence[object] = value if isinstance(value, (list, tuple)) else [value]
            optional = key in ("peak_rss_bytes", "peak_rss_bytes_range", "rss_before_load_bytes")
            wanted = 2 if key.endswith("_range") else 1
            if not (optional and value is None) and (len(values) != wanted or not all(map(_is_positive, values))):
                raise ValueError(f"{name}: {key} is no measurement")
    series: dict[str, Any] = {
        name: [window for process in rows for window in process] for name, rows in latency.windows_ms.items()
    }
    for name, windows in (series | {"reference": latency.reference_ms}).items():
        if not windows or not all(w.ndim == 1 and w.size and np.isfinite(w).all() and (w > 0).all() for w in windows):
            raise ValueError(f"{name}: holds latencies that are none")
    measured: list[Any] = [*latency.windows_ms.values(), *(latency.on_cpu_ms or {}).values()]
    counts = {tuple(len(process) for process in rows) for rows in measured}
    if len(counts) != 1 or 0 in next(iter(counts)) or len(next(iter(counts))) != len(latency.reference_ms):
        raise ValueError("models were measured in different numbers of processes or windows")
    for rows in (latency.on_cpu_ms or {}).values():
        if not all(row.ndim == 1 and row.size and np.isfinite(row).all() and (row > 0).all() for row in rows):
            raise ValueError("times on the CPU are none")
    if not _is_positive(latency.seconds) or not isinstance(latency.stopped_because, str):
        raise ValueError("how long was measured is not said")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _notes(measured: Mapping[str, str], models: Mapping[str, Path], place: str) -> tuple[str, ...]:
    """What must be said of the files that were measured. Raises ConfigurationError when they are not the run's."""
    inside = []
    for name, path in models.items():
        if name not in measured:
            if name == "baseline":
                continue
            raise ConfigurationError(f"{place}: the results hold no {name}; bundle the run again and measure it")
        if measured[name] == sha256_of(path):
            continue
        if measured[name] != _sha256_with_preprocessing(path):
            raise ConfigurationError(
                f"{place}: the {name} model that was measured is not this run's {path}; bundle the run again, and "
                "measure that"
            )
        inside.append(name)
    extra = ["Measured with the preprocessing inside the models."] if inside else []
    lost = ["The baseline was not measured: a bundle does not hold it."] if set(models) - set(measured) else []
    return (*extra, *lost)


def _sha256_with_preprocessing(path: Path) -> str | None:
    """The hash of the same model as a bundle ships it."""
    model = read_onnx(path)
    described = {entry.key: entry.value for entry in model.metadata_props}.get("edgecompress.preprocessing")
    if described is None or input_form(model) == PIXEL_FORM:
        return None
    made = embed_preprocessing(model, Preprocessing.from_dict(json.loads(described)))
    return hashlib.sha256(made.SerializeToString()).hexdigest()
