"""How long a changed float model takes beside the one that it came from, measured before the change is made.

What enters: two modules of one architecture's input. What leaves: the share of the latency that is left, with its
interval. Both are exported as they would be for the target and run side by side in fresh processes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgecompress.errors import ConfigurationError
from edgecompress.export import Provenance, export_onnx
from edgecompress.measuring import measure_latency
from edgecompress.preprocessing import Preprocessing
from edgecompress.profiling import not_at_hand
from edgecompress.target import Target

# Five processes end within this time on a quiet machine; a busy one gets more of them.
_SECONDS = 6.0
_NARROW = 0.03


@dataclass(frozen=True)
class LatencyShare:
    """A candidate's latency over the reference's, its 95 % interval, and both medians in ms."""

    share: float
    low: float
    high: float
    reference_ms: float
    candidate_ms: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def latency_trials(
    reference: nn.Module, preprocessing: Preprocessing, target: Target, *, what: str
) -> Iterator[Callable[[nn.Module], LatencyShare]]:
    """Gives a function that measures a candidate beside `reference`, in float on ONNX Runtime.

    Raises ConfigurationError where the target is not the machine at hand: `what` names the setting that asks for it.
    """
    reasons = not_at_hand(target)
    if reasons:
        raise ConfigurationError(
            f"{what} is measured, and target {target.name} is not this machine ({'; '.join(reasons)}); "
            "give a target that is at hand, or macs_ratio"
        )
    size = preprocessing.input_size
    example = torch.zeros(2, preprocessing.channels, size, size)
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
        folder = Path(scratch)

        def export(module: nn.Module, name: str) -> Path:
            provenance = Provenance((), "", "", {})
            path = folder / name
            export_onnx(
                module,
                example,
                path,
                target=target,
                preprocessing=preprocessing,
                provenance=provenance,
                extra_metadata={},
            )
            return path

        before = export(reference, "before.onnx")

        def share_of(candidate: nn.Module) -> LatencyShare:
            models = {"before": before, "after": export(candidate, "after.onnx")}
            measured = measure_latency(
                models,
                threads=target.threads,
                providers=target.providers,
                input_npy=None,
                seconds=_SECONDS,
                narrow_enough=_NARROW,
                session=target.session_settings(),
            )
            ratio = measured.ratio("after", "before")
            before_ms, after_ms = (measured.percentile(name, 50).value for name in ("before", "after"))
            return LatencyShare(ratio.ratio, ratio.low, ratio.high, before_ms, after_ms)

        yield share_of
