"""The target: the facts of a device, the int8 scheme its kernels want, and the budgets a model must meet.

What enters: a YAML file or the name of a shipped target. What leaves: one frozen `Target`. The int8 scheme
belongs to the device and not to the recipe, because the same file runs at different speed and even
with different accuracy on different instruction sets. Every field stands in docs/targets.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from edgecompress.machine import RELEVANT_FEATURES, architecture
from edgecompress.settings.configuration import ClosedFraction, FrozenSettings, validate
from edgecompress.settings.model_settings import Identifier
from edgecompress.settings.onnx_versions import OLDEST, OPSETS, newest_read, oldest_ir, oldest_release
from edgecompress.settings.yaml_files import find_settings, read_yaml_mapping

INT8_ACTIVATIONS_KEY = "session.qdqisint8allowed"
"""The session key by which int8 activations are fused into integer kernels: on by default in Arm builds alone."""

# Session keys that matter on a CPU, for hints alone: ONNX Runtime takes any key, and ignores a misspelt one in silence.
# Source: onnxruntime_session_options_config_keys.h of the onnxruntime repository.
_SESSION_KEYS = (
    *("session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.force_spinning_stop"),
    *("session.intra_op_thread_affinities", "session.set_denormal_as_zero", "session.disable_prepacking"),
    *("session.use_env_allocators", "session.use_device_allocator_for_initializers", "session.dynamic_block_base"),
    *("session.disable_quant_qdq", "session.enable_quant_qdq_cleanup", "session.disable_double_qdq_remover"),
    *(INT8_ACTIVATIONS_KEY, "session.x64quantprecision", "session.disable_aot_function_inlining"),
    *("optimization.enable_gelu_approximation", "optimization.disable_specified_optimizers"),
    *("mlas.enable_gemm_fastmath_arm64_bfloat16", "mlas.disable_kleidiai"),
)


def _option_text(value: Any) -> Any:
    """ONNX Runtime takes options as text; YAML reads 1 and true as a number and a truth value."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value) if isinstance(value, (int, float)) else value


OptionText = Annotated[str, BeforeValidator(_option_text)]


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _spelled_otherwise(name: str, known: Iterable[str]) -> str | None:
    """The known name that differs from `name` in nothing but punctuation and case, or None."""
    return None if name in known else next((other for other in known if _bare(other) == _bare(name)), None)


class Int8Scheme(FrozenSettings):
    """How tensors become int8. `auto` is settled on the machine at hand and recorded as a decision."""

    activations: Literal["uint8", "int8", "auto"] = Field(
        default="auto", description="type of activations: uint8 on x86, int8 on Arm"
    )
    weight_bits: Literal[7, 8, "auto"] = Field(
        default="auto", description="bits of weights; 7 keeps 16-bit sums from saturating on x86 without VNNI"
    )
    conv_kernels: Literal["symmetric", "auto"] = Field(
        default="symmetric",
        description="the kernels of convolutions: the runtime's own for them, or each one's fastest, measured here",
    )


class SessionSettings(FrozenSettings):
    """Options of the ONNX Runtime session, applied when measuring as they are on the device."""

    optimization: Literal["disabled", "basic", "extended", "all"] = Field(
        default="all", description="graph optimization level"
    )
    execution: Literal["sequential", "parallel"] = Field(
        default="sequential", description="whether independent nodes may run side by side"
    )
    inter_op_threads: PositiveInt = Field(default=1, description="threads for independent nodes, with parallel only")
    arena: bool = Field(default=True, description="keep memory between inferences (enable_cpu_mem_arena)")
    memory_pattern: bool = Field(default=True, description="plan all memory of a known shape at once")
    config: dict[str, OptionText] = Field(
        default_factory=dict, description="session configuration entries, key to text"
    )

    @field_validator("config")
    @classmethod
    def _known_keys(cls, config: dict[str, str]) -> dict[str, str]:
        for key in config:
            if not re.fullmatch(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+", key):
                raise ValueError(f"'{key}' is no session key; they look like session.intra_op.allow_spinning")
            other = _spelled_otherwise(key, _SESSION_KEYS)
            if other is not None:
                raise ValueError(f"'{key}' would be ignored by ONNX Runtime; did you mean '{other}'?")
        return config

    @model_validator(mode="after")
    def _threads_are_used(self) -> SessionSettings:
        if self.inter_op_threads > 1 and self.execution == "sequential":
            raise ValueError("inter_op_threads has no effect with execution: sequential; set execution: parallel")
        return self


SPEED_BUDGET = "min_int8_speedup"
"""The budget on int8's speed against fp32, and the gate of the same name on what chose the placement."""


class Budgets(FrozenSettings):
    """What a model may cost on the device. Left out means no limit."""

    latency_ms_p50: PositiveFloat | None = Field(default=None, description="median latency of one inference, ms")
    latency_ms_p90: PositiveFloat | None = Field(default=None, description="90th percentile of the latency, ms")
    latency_ms_p99: PositiveFloat | None = Field(default=None, description="99th percentile of the latency, ms")
    size_bytes: PositiveInt | None = Field(default=None, description="size of the model's file, bytes")
    peak_rss_bytes: PositiveInt | None = Field(
        default=None, description="peak resident memory of the whole process, Python and runtime included, bytes"
    )
    load_ms: PositiveFloat | None = Field(default=None, description="time to make the session, ms")
    first_inference_ms: PositiveFloat | None = Field(default=None, description="time of the first inference, ms")
    cold_start_ms: PositiveFloat | None = Field(default=None, description="load and first inference together, ms")
    max_accuracy_drop: ClosedFraction | None = Field(
        default=None, description="accuracy lost against the recipe's first model, fraction"
    )
    min_int8_speedup: PositiveFloat | None = Field(
        default=1.0, description="fp32 latency over int8 latency, at least this"
    )


def _one_word(value: str) -> str:
    if not re.fullmatch(r"[^\s-]\S*", value):  # a leading dash would be taken for an option
        raise ValueError(f"'{value}' must be one word that does not begin with a dash")
    return value


OneWord = Annotated[str, AfterValidator(_one_word)]


class Device(FrozenSettings):
    """How the device is reached when it is not the machine at hand."""

    host: OneWord | None = Field(default=None, description="user@host, or a name from the user's ssh configuration")
    python: OneWord = Field(
        default="python3", description="the device's Python, with numpy and onnxruntime: a name or a path"
    )
    work_folder: OneWord = Field(
        default=".edgecompress", description="folder for what is copied there, under the user's home or absolute"
    )


class Target(FrozenSettings):
    """One kind of device."""

    name: Identifier = Field(description="name of the target; left out, the file's name")
    description: str = Field(default="", description="one line for people")
    sources: tuple[str, ...] = Field(default=(), description="where the facts below come from")
    architecture: Literal["x86_64", "aarch64"] = Field(description="the CPU's architecture")
    isa: tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]+(\|[a-z0-9_]+)*$")], ...] = Field(
        default=(), description="CPU features the device has, as the kernel names them; `a|b` means either"
    )
    device_model: str | None = Field(
        default=None, description="text in the board's name (/proc/device-tree/model); left out, any machine will do"
    )
    cores: PositiveInt | None = Field(default=None, description="CPU cores of the device")
    memory_bytes: PositiveInt | None = Field(default=None, description="memory of the device, bytes")
    providers: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("CPUExecutionProvider",), description="execution providers in order of preference"
    )
    provider_options: dict[str, dict[str, OptionText]] = Field(
        default_factory=dict, description="options of each provider: provider, then key to text"
    )
    session: SessionSettings = Field(default=SessionSettings(), description="session options")
    threads: PositiveInt = Field(default=1, description="intra-op threads of one inference")
    cpu_affinity: tuple[NonNegativeInt, ...] = Field(
        default=(), description="CPUs that the process may run on, as the kernel numbers them; empty: any"
    )
    int8: Int8Scheme = Field(default=Int8Scheme(), description="the int8 scheme that its kernels want")
    # Off a multiple of 4, float convolutions take 1.3 to 2.4 times as long as the next multiple up (3x3, depthwise):
    # ONNX Runtime's blocked layout is lost. Blocks hold 8 floats with AVX2 and 16 with AVX-512, where odd multiples of
    # 8 gain nothing in float (0.99 of the time of the next multiple of 16, with 0.79 of its MACs) and cost int8's
    # depthwise layers (1.37). Still 8: int8's other layers gain (0.90 to 0.95), and nets with 16 channels could not be
    # cut at all. Measured on an AVX-512 Xeon by benchmarks/channel_multiple.py --rounds 60, 2026-11-25.
    channel_multiple: PositiveInt = Field(default=8, description="channel counts are rounded to this when pruning")
    onnxruntime_min: Annotated[str, Field(pattern=r"^1\.\d+$")] = Field(
        default="1.17", description="the oldest onnxruntime release that must read the files"
    )
    opset: PositiveInt = Field(default=OPSETS[0], description="opset of the exported files")
    max_ir_version: PositiveInt | None = Field(
        default=None, description="IR version of the exported files; left out, the newest that onnxruntime_min reads"
    )
    budgets: Budgets = Field(default=Budgets(), description="what a model may cost")
    device: Device = Field(default=Device(), description="how the device is reached")

    @field_validator("isa")
    @classmethod
    def _spelling_of_isa(cls, isa: tuple[str, ...]) -> tuple[str, ...]:
        for name in (name for entry in isa for name in entry.split("|")):
            other = _spelled_otherwise(name, RELEVANT_FEATURES)
            if other is not None:
                raise ValueError(f"'{name}' is not how the kernel names it; did you mean '{other}'?")
        return isa

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        faults = [*self._version_faults(), *self._device_faults()]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _version_faults(self) -> list[str]:
        """Files that the oldest runtime could not read."""
        if self.opset not in OPSETS:
            return [f"opset: {self.opset} cannot be exported; use {OPSETS[0]} to {OPSETS[-1]}"]
        reads, runtime = newest_read(self.onnxruntime_min), self.onnxruntime_min
        if reads is None:
            return [f"onnxruntime_min: {runtime} cannot read opset {self.opset}; use {OLDEST}"]
        oldest, wanted = oldest_ir(self.opset), self.max_ir_version
        enough = oldest_release(self.opset, wanted or oldest)
        mend = f"; set onnxruntime_min: '{enough}' or lower it" if enough else "; lower it"
        if self.opset > reads.opset:
            return [f"opset: onnxruntime {runtime} reads opset {reads.opset} at most, not {self.opset}{mend}"]
        if wanted is not None and wanted > reads.ir:
            return [f"max_ir_version: onnxruntime {runtime} reads IR version {reads.ir} at most, not {wanted}{mend}"]
        if wanted is not None and wanted < oldest:
            return [f"max_ir_version: a file of opset {self.opset} needs IR version {oldest} at least, not {wanted}"]
        return []

    def _device_faults(self) -> list[str]:
        """Settings that contradict the device's own facts."""
        faults = []
        for name in self.provider_options:
            if name not in self.providers:
                faults.append(f"provider_options: '{name}' is not among providers ({', '.join(self.providers)})")
        if len(set(self.cpu_affinity)) < len(self.cpu_affinity):
            faults.append("cpu_affinity: a CPU stands twice")
        elif 0 < len(self.cpu_affinity) < self.threads:
            faults.append(f"cpu_affinity: {self.threads} threads on {len(self.cpu_affinity)} CPUs wait for each other")
        if self.cores is not None:
            if self.threads > self.cores:
                faults.append(f"threads: {self.threads} threads, but cores is {self.cores}")
            if any(cpu >= self.cores for cpu in self.cpu_affinity):
                faults.append(f"cpu_affinity: CPUs are numbered 0 to {self.cores - 1}, by cores")
        memory, peak = self.memory_bytes, self.budgets.peak_rss_bytes
        if memory is not None and peak is not None and peak > memory:
            faults.append(f"budgets.peak_rss_bytes: {peak} is more than memory_bytes, {memory}")
        return faults

    @property
    def ir_version(self) -> int:
        """IR version of the exported files: `max_ir_version`, or the newest that `onnxruntime_min` reads."""
        reads = newest_read(self.onnxruntime_min)
        assert reads is not None  # validated
        return self.max_ir_version or reads.ir

    @property
    def fuses_int8_activations(self) -> bool:
        """Whether the device's sessions run int8 activations on integer kernels: Arm builds do, x86 builds if asked.

        A machine of another kind that computes the device's answers must run the same graph.
        """
        default = "1" if self.architecture == "aarch64" else "0"
        return self.session.config.get(INT8_ACTIVATIONS_KEY, default) == "1"

    def session_settings(self) -> dict[str, Any]:
        """How a session is made for this target beside threads and providers, in the measuring process's own words."""
        return {
            "provider_options": [self.provider_options.get(name, {}) for name in self.providers],
            "cpu_affinity": list(self.cpu_affinity),
            "optimization": self.session.optimization,
            "execution": self.session.execution,
            "inter_op_threads": self.session.inter_op_threads,
            "arena": self.session.arena,
            "memory_pattern": self.session.memory_pattern,
            "session": dict(self.session.config),
        }


def load_target(source: str) -> Target:
    """Load a target from a file or a shipped name. Raises ConfigurationError with every fault."""
    path = find_settings(source, kind="target")
    document = read_yaml_mapping(path)
    document.setdefault("name", path.stem)
    return validate(Target, document, source=source)


def own_target() -> Target:
    """The shipped target of the machine at hand: arm64 or x86."""
    return load_target("arm64" if architecture() == "aarch64" else "x86")
