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
from torch import Tensor, nn

from edgecompress.data.preprocessing import Preprocessing
from edgecompress.errors import ConfigurationError
from edgecompress.exporting.onnx_export import Provenance, export_onnx
from edgecompress.measure.measuring import measure_latency
from edgecompress.measure.profiling import not_at_hand
from edgecompress.models.complexity import weight_layers
from edgecompress.settings.target import Target

# Five processes end within this time on a quiet machine; a busy one gets more of them.
_SECONDS = 6.0
_LAYER_SECONDS = 3.0
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


def input_shapes(module: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of what each convolution and linear layer reads, for one image, by module name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
        for name, layer in weight_layers(module).items()
    ]
    try:
        with torch.no_grad():
            module.eval()(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _require_at_hand(target: Target, what: str, instead: str) -> None:
    reasons = not_at_hand(target)
    if reasons:
        raise ConfigurationError(
            f"{what} is measured, and target {target.name} is not this machine ({'; '.join(reasons)}); "
            f"give a target that is at hand, or {instead}"
        )


def _compare(before: Path, after: Path, target: Target, seconds: float) -> LatencyShare:
    measured = measure_latency(
        {"before": before, "after": after},
        threads=target.threads,
        providers=target.providers,
        input_npy=None,
        seconds=seconds,
        narrow_enough=_NARROW,
        session=target.session_settings(),
    )
    ratio = measured.ratio("after", "before")
    before_ms, after_ms = (measured.percentile(name, 50).value for name in ("before", "after"))
    return LatencyShare(ratio.ratio, ratio.low, ratio.high, before_ms, after_ms)


def layer_trial(
    before: nn.Module, after: nn.Module, shape: tuple[int, ...], target: Target, *, what: str
) -> LatencyShare:
    """How long `after` takes beside `before`, two modules that read one tensor of `shape` [1, ...].

    Raises ConfigurationError where the target is not the machine at hand.
    """
    _require_at_hand(target, what, "measured: false")
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
        paths = []
        for name, module in (("before", before), ("after", after)):
            path = Path(scratch) / f"{name}.onnx"
            _write(
                module, torch.zeros(2, *shape[1:]), path, target, Preprocessing(4, 1, (0.0,), (1.0,), "bilinear", 1.0)
            )
            paths.append(path)
        return _compare(paths[0], paths[1], target, _LAYER_SECONDS)


def _write(module: nn.Module, example: Tensor, path: Path, target: Target, preprocessing: Preprocessing) -> None:
    export_onnx(
        module,
        example,
        path,
        target=target,
        preprocessing=preprocessing,
        provenance=Provenance((), "", "", {}),
        extra_metadata={},
    )


@contextmanager
def latency_trials(
    reference: nn.Module, preprocessing: Preprocessing, target: Target, *, what: str
) -> Iterator[Callable[[nn.Module], LatencyShare]]:
    """Gives a function that measures a candidate beside `reference`, in float on ONNX Runtime.

    Raises ConfigurationError where the target is not the machine at hand: `what` names the setting that asks for it.
    """
    _require_at_hand(target, what, "macs_ratio")
    size = preprocessing.input_size
    example = torch.zeros(2, preprocessing.channels, size, size)
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as scratch:
        before, after = Path(scratch) / "before.onnx", Path(scratch) / "after.onnx"
        _write(reference, example, before, target, preprocessing)

        def share_of(candidate: nn.Module) -> LatencyShare:
            _write(candidate, example, after, target, preprocessing)
            return _compare(before, after, target, _SECONDS)

        yield share_of
