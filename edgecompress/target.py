"""The target: the facts of a device, the int8 scheme its kernels want, and the budgets a model must meet.

What enters: a YAML file or the name of a shipped target. What leaves: one frozen `Target`. The int8 scheme
belongs to the device and not to the recipe, because the same file runs at different speed and even
with different accuracy on different instruction sets.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from edgecompress.configuration import ClosedFraction, FrozenSettings, read_yaml_mapping, validate
from edgecompress.recipe import Identifier, find_settings

# Newest opset and IR version that each onnxruntime release reads.
# Source: onnxruntime.ai/docs/reference/compatibility.html, "ONNX Runtime Compatibility".
ONNXRUNTIME_READS: dict[str, tuple[int, int]] = {
    "1.14": (18, 8),
    "1.15": (19, 9),
    "1.16": (19, 9),
    "1.17": (20, 9),
    "1.18": (21, 10),
    "1.19": (21, 10),
    "1.20": (21, 10),
}
EXPORT_OPSET = 18  # the lowest that torch.onnx's exporter writes, so the widest reach


class Int8Scheme(FrozenSettings):
    """How tensors become int8. `auto` is settled on the machine at hand and recorded as a decision."""

    activations: Literal["uint8", "int8", "auto"] = "auto"
    weight_bits: Literal[7, 8, "auto"] = Field(
        default="auto", description="7 keeps 16-bit sums from saturating on x86 without VNNI (reduce_range)"
    )


class Budgets(FrozenSettings):
    """What a model may cost on the device. Left out means no limit."""

    latency_ms_p90: PositiveFloat | None = None
    size_bytes: PositiveInt | None = None
    peak_rss_bytes: PositiveInt | None = None
    load_ms: PositiveFloat | None = None
    first_inference_ms: PositiveFloat | None = None
    max_accuracy_drop: ClosedFraction | None = None
    min_int8_speedup: PositiveFloat | None = 1.0


class Target(FrozenSettings):
    """One kind of device."""

    name: Identifier
    description: str = ""
    sources: tuple[str, ...] = Field(default=(), description="where the facts below come from")
    architecture: Literal["x86_64", "aarch64"]
    isa: tuple[str, ...] = Field(
        default=(), description="CPU features the device has, as the kernel names them; `a|b` means either"
    )
    device_model: str | None = Field(
        default=None, description="text in the board's name (/proc/device-tree/model); left out, any machine will do"
    )
    cores: PositiveInt | None = None
    memory_bytes: PositiveInt | None = None
    providers: Annotated[tuple[str, ...], Field(min_length=1)] = ("CPUExecutionProvider",)
    threads: PositiveInt = Field(default=1, description="intra-op threads of one inference")
    int8: Int8Scheme = Int8Scheme()
    channel_multiple: PositiveInt = Field(default=8, description="channel counts are rounded to this when pruning")
    onnxruntime_min: Annotated[str, Field(pattern=r"^1\.\d+$")] = "1.17"
    budgets: Budgets = Budgets()

    @model_validator(mode="after")
    def _readable(self) -> Target:
        oldest = min(ONNXRUNTIME_READS, key=_version_key)
        if _version_key(self.onnxruntime_min) < _version_key(oldest):
            raise ValueError(f"onnxruntime_min {self.onnxruntime_min} cannot read opset {EXPORT_OPSET}; use {oldest}")
        return self

    @property
    def opset(self) -> int:
        """Opset of the exported files: the lowest the exporter writes, which every allowed runtime reads."""
        return EXPORT_OPSET

    @property
    def ir_version(self) -> int:
        """IR version of the exported files: the newest that `onnxruntime_min` reads."""
        known = [v for v in ONNXRUNTIME_READS if _version_key(v) <= _version_key(self.onnxruntime_min)]
        return ONNXRUNTIME_READS[max(known, key=_version_key)][1]


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def load_target(source: str) -> Target:
    """Load a target from a file or a shipped name. Raises ConfigurationError with every fault."""
    path = find_settings(source, kind="target")
    document = read_yaml_mapping(path)
    document.setdefault("name", path.stem)
    return validate(Target, document, source=source)
