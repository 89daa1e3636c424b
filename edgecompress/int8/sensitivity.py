"""How much each layer loses by int8: one layer alone on integers, and all of them but that one.

What enters: a calibrated int8 model and held-out images. What leaves: one row a layer, on the logits. The two views
answer two questions: alone says what a layer's own rounding costs, all but one says what its return to float buys
among the others, whose neighbours round its input and output anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from edgecompress import console
from edgecompress.int8.mixed import MixedModel, Setting, agreement, decibels, noise

Json = dict[str, Any]


@dataclass(frozen=True)
class LayerSensitivity:
    """What int8 costs in one layer, on the logits of held-out images, against float.

    `alone_*`: this layer alone in int8. `without_*`: all layers in int8 but this one; `gain_db` is what that wins
    over full int8. `alone_noise` is the energy of the error over that of the logits.
    """

    layer: str
    alone_noise: float
    alone_sqnr_db: float
    alone_agreement: float
    without_sqnr_db: float
    without_agreement: float
    gain_db: float

    def to_dict(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class Sensitivity:
    """Every layer's row, in the order in which the layers run, beside full int8."""

    images: int
    full_sqnr_db: float
    full_agreement: float
    layers: tuple[LayerSensitivity, ...]
    unmeasured: tuple[str, ...]

    def to_dict(self) -> Json:
        return {
            "images": self.images,
            "full": {"sqnr_db": self.full_sqnr_db, "agreement": self.full_agreement},
            "layers": [row.to_dict() for row in self.layers],
            "unmeasured": list(self.unmeasured),
        }

    def worst_first(self) -> list[LayerSensitivity]:
        """The rows, the layer that loses most alone first."""
        return sorted(self.layers, key=lambda row: -row.alone_noise)


def measure_sensitivity(
    mixed: MixedModel,
    images: Tensor,
    *,
    seconds: float | None = None,
    known: Mapping[str, LayerSensitivity] | None = None,
    on_row: Callable[[LayerSensitivity], None] = lambda row: None,
) -> Sensitivity:
    """Measure every layer that is not in `known` on one normalized batch [N, C, H, W].

    Layers for which `seconds` are too few are listed in `unmeasured`, the last ones first to go. `on_row` is called
    as each row is known.
    """
    rows = dict(known or {})
    full = mixed.setting(())
    reference = mixed.logits(images, mixed.float_setting)
    quantized = mixed.logits(images, full)
    full_db = decibels(noise(reference, quantized))
    todo = [layer for layer in mixed.layers if layer not in rows]
    alone = [mixed.setting(other for other in mixed.layers if other != layer) for layer in todo]
    without = [mixed.setting([layer]) for layer in todo]
    deadline = None if seconds is None else time.monotonic() + seconds / 2
    with console.progress("measuring layers", 2 * len(todo)) as advance:
        # Half of the time for each of the two views.
        first = _collect(mixed, images, mixed.float_setting, alone, deadline, advance)
        second = _collect(mixed, images, full, [without[index] for index in sorted(first)], None, advance)
    for (index, lonely), missing in zip(sorted(first.items()), [second[i] for i in sorted(second)], strict=True):
        row = _row(todo[index], reference, lonely, missing, full_db)
        rows[row.layer] = row
        on_row(row)
    return Sensitivity(
        images=len(images),
        full_sqnr_db=full_db,
        full_agreement=agreement(reference, quantized),
        layers=tuple(rows[layer] for layer in mixed.layers if layer in rows),
        unmeasured=tuple(layer for layer in mixed.layers if layer not in rows),
    )


def noise_alone(
    mixed: MixedModel,
    images: Tensor,
    *,
    known: Mapping[str, float] | None = None,
    on_layer: Callable[[str, float], None] = lambda layer, share: None,
) -> dict[str, float]:
    """The first view only, which costs half: each layer's noise alone in int8, as a share of the logits' energy."""
    found = dict(known or {})
    todo = [layer for layer in mixed.layers if layer not in found]
    alone = [mixed.setting(other for other in mixed.layers if other != layer) for layer in todo]
    reference = mixed.logits(images, mixed.float_setting)
    with console.progress("measuring layers", len(todo)) as advance:
        for index, logits in mixed.variants(images, mixed.float_setting, alone):
            found[todo[index]] = noise(reference, logits)
            on_layer(todo[index], found[todo[index]])
            advance()
    return found


def _collect(
    mixed: MixedModel,
    images: Tensor,
    base: Setting,
    settings: Sequence[Setting],
    deadline: float | None,
    advance: console.Advance,
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for index, logits in mixed.variants(images, base, settings):
        found[index] = logits
        advance()
        if deadline is not None and time.monotonic() > deadline:
            break
    return found


def _row(layer: str, reference: Tensor, alone: Tensor, without: Tensor, full_db: float) -> LayerSensitivity:
    share = noise(reference, alone)
    without_db = decibels(noise(reference, without))
    return LayerSensitivity(
        layer=layer,
        alone_noise=share,
        alone_sqnr_db=decibels(share),
        alone_agreement=agreement(reference, alone),
        without_sqnr_db=without_db,
        without_agreement=agreement(reference, without),
        gain_db=without_db - full_db,
    )
