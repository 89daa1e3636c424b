"""The int8 scheme: how tensors become integers on one kind of device.

What enters: a recipe's quantize stage and a target. What leaves: a `Scheme` with every `auto` settled, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgecompress.machine import VNNI_FEATURES, fits, has_vnni
from edgecompress.settings.recipe import QuantizeStage
from edgecompress.settings.target import Target


@dataclass(frozen=True)
class Scheme:
    """How tensors become integers: the target's scheme with every `auto` settled."""

    activations: str
    weight_bits: int

    @property
    def activation_dtype(self) -> torch.dtype:
        return torch.uint8 if self.activations == "uint8" else torch.int8

    @property
    def activation_range(self) -> tuple[int, int]:
        return (0, 255) if self.activations == "uint8" else (-128, 127)

    @property
    def weight_limit(self) -> int:
        """Largest weight magnitude as an integer: 127, or 63 where 16-bit sums would saturate."""
        return (1 << (self.weight_bits - 1)) - 1

    def to_dict(self) -> dict[str, Any]:
        return {"activations": self.activations, "weights": "int8", "weight_bits": self.weight_bits}


def resolve_scheme(stage: QuantizeStage, target: Target | None) -> tuple[Scheme, str]:
    """Settle every `auto` of the scheme; returns the scheme and the reason for the weight range, in words."""
    activations = stage.scheme.activations or (target.int8.activations if target else "auto")
    bits = stage.scheme.weight_bits or (target.int8.weight_bits if target else "auto")
    is_arm = target is not None and target.architecture == "aarch64"
    if activations == "auto":
        activations = "int8" if is_arm else "uint8"
    if bits != "auto":
        source = "recipe" if stage.scheme.weight_bits else f"target {target.name}" if target else "default"
        return Scheme(activations, int(bits)), f"{bits}-bit weights, as the {source} says"
    if is_arm:
        return Scheme(activations, 8), "8-bit weights: Arm kernels do not saturate"
    is_wide, why = sums_in_32_bits(target)
    if is_wide:
        return Scheme(activations, 8), f"8-bit weights: {why}, whose sums cannot saturate"
    return Scheme(activations, 7), f"7-bit weights: {why}, and 16-bit sums saturate with 8-bit weights"


def sums_in_32_bits(target: Target | None) -> tuple[bool, str]:
    """Whether products are summed in 32 bits (VNNI) on an x86 target, and how that is known, in words.

    This machine is asked only where it is the target: another one may lack what this one has.
    """
    if target is not None and names_vnni(target):
        return True, f"target {target.name} has VNNI"
    if target is not None and (target.device.host is not None or fits(target)):
        return False, f"target {target.name} is another machine than this one and names no VNNI in isa"
    return (True, "this CPU has VNNI") if has_vnni() else (False, "this CPU has no VNNI")


def names_vnni(target: Target) -> bool:
    """Whether a target insists on VNNI, in either of its forms."""
    return any(set(entry.split("|")) <= set(VNNI_FEATURES) for entry in target.isa)
