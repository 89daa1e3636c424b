"""Values in, words out: numbers in human units, limits, changes, and texts that do nothing but show themselves.

What enters: a value, and often the key that names its unit. What leaves: a text; what is no number shows as `-`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
MISSING = "-"
SAME_WITHIN = 0.005  # ratios this close to 1 are called the same
_MICRO = 1e-3
# Explicit direction marks turn the text around them; joiners, which emoji and many scripts need, stay.
_DIRECTION_MARKS = frozenset(
    chr(code) for code in (0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
)
_LABELS = {
    "fp32_max_relative_diff": "ONNX fp32: largest relative difference to PyTorch",
    "fp32_min_top1_agreement": "ONNX fp32: top-1 agreement with PyTorch",
    "int8_min_top1_agreement": "ONNX int8: top-1 agreement with fp32",
    "torch_int8_min_top1_agreement": "ONNX int8: top-1 agreement with PyTorch int8",
    "fp32_runs_fp32_max_relative_diff": "ONNX fp32 in other settings: largest relative difference",
    "fp32_runs_fp32_min_top1_agreement": "ONNX fp32 in other settings: top-1 agreement",
    "int8_runs_torch_int8_min_top1_agreement": "ONNX int8 in other settings: top-1 agreement",
    "int8_runs_int8_min_top1_agreement": "ONNX int8, optimizer off: top-1 agreement",
    "max_class_accuracy_drop": "Accuracy drop of the worst class, beyond chance",
    "max_accuracy_drop": "Accuracy drop",
    "min_int8_speedup": "int8 speedup over fp32",
    "latency_ms_p50": "Latency, median",
    "latency_ms_p90": "Latency, 90th percentile",
    "latency_ms_p99": "Latency, 99th percentile",
    "cold_start_ms": "Cold start",
    "size_bytes": "File size",
    "peak_rss_bytes": "Peak memory",
    "load_ms": "Load time",
    "first_inference_ms": "First inference",
    "cpu": "CPU",
    "isa": "ISA features",
    "os": "OS",
    "memory_bytes": "Memory",
    "num_classes": "Classes",
    "frequency_mhz": "Frequency",
    "reference_ms": "Reference loop",
    "macs": "MACs",
    "predictions_vary": "Predictions vary from image to image",
    "trained_weights": "The weights were trained",
    "ece": "Expected calibration error",
}


def number(value: object) -> float | None:
    """The value as a finite float, or None when it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def printable(value: object, *, limit: int | None = None) -> str:
    """Text that does nothing but show itself: control, direction and broken characters become U+FFFD."""

    def is_active(character: str) -> bool:
        broken = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        return broken or character in _DIRECTION_MARKS

    text = "".join("\N{REPLACEMENT CHARACTER}" if is_active(character) else character for character in str(value))
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number_text(value: object) -> str:
    """Three significant digits, and an exponent only below a thousandth: 0.312, 12.3, 1,234, 3.8e-06."""
    found = number(value)
    if found is None:
        return MISSING
    if found == 0:
        return "0"
    if abs(found) < _MICRO:
        return f"{found:.1e}"
    exponent = int(f"{found:.2e}".partition("e")[2])  # of the rounded number: 9.996 is 10.0
    return f"{found:,.{max(0, 2 - exponent)}f}"


def _scaled_text(value: object, units: Sequence[str]) -> str:
    found = number(value)
    if found is None:
        return MISSING
    step = 0
    while abs(found) >= 999.5 and step < len(units) - 1:
        found, step = found / 1000, step + 1
    return f"{number_text(found) if step else f'{found:.0f}'} {units[step]}".rstrip()


def bytes_text(value: object) -> str:
    """A size in decimal units, 1 kB being 1000 bytes: 81.2 kB."""
    return _scaled_text(value, ("B", "kB", "MB", "GB", "TB"))


def count_text(value: object) -> str:
    """A count such as MACs or parameters: 41.2 M."""
    return _scaled_text(value, ("", "k", "M", "G", "T"))


def percent_text(value: object) -> str:
    """A fraction in percent, with more digits where one would round it to a false 0 or 100 %."""
    found = number(value)
    if found is None:
        return MISSING
    decimals = 1
    while (
        decimals < 4
        and found not in (0, 1)
        and f"{100 * found:.{decimals}f}" in (f"{n:.{decimals}f}" for n in (0, 100))
    ):
        decimals += 1
    return f"{100 * found:.{decimals}f} %"


def points_text(value: object) -> str:
    """A difference in percentage points with its sign; what is not zero never shows as zero."""
    found = number(value)
    if found is None:
        return MISSING
    if abs(found) < 1e-9:
        return "0.0"
    return f"{found:+.1f}" if abs(found) >= 0.05 else f"{found:+.2f}"


def seconds_text(value: object) -> str:
    """A duration, short enough for a column: 0.42 s, 6.2 s, 74 s, 3.3 min, 2.1 h."""
    found = number(value)
    if found is None:
        return MISSING
    if found < 1:
        return f"{found:.2f} s"
    if found < 120:
        return f"{found:.1f} s" if found < 9.95 else f"{found:.0f} s"
    return f"{found / 60:.1f} min" if found < 7200 else f"{found / 3600:.1f} h"


def quantity_text(value: object, name: str) -> str:
    """A value in the unit that its key names, for instance (312345, 'size_bytes') or (0.98, 'top1_agreement')."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return MISSING
    if isinstance(value, (list, tuple)):
        texts = [quantity_text(item, name) for item in value]
        return " to ".join(texts) if len(texts) == 2 and name.endswith(("ci95", "range")) else ", ".join(texts)
    found = number(value)
    if found is None:
        return printable(value)
    words = name.split("_")
    if "bytes" in words:
        return bytes_text(found)
    if "drop" in words:
        return f"{100 * found:.1f} points"
    if {"accuracy", "agreement", "coverage", "sparsity", "fraction"} & set(words):
        return percent_text(found)
    if "speedup" in words:
        return f"{number_text(found)}x"
    if name.endswith("per_s"):
        return f"{number_text(found)}/s"
    for word, unit in (("ms", "ms"), ("db", "dB"), ("mhz", "MHz")):
        if word in words:
            return f"{number_text(found)} {unit}"
    if "seconds" in words:
        return seconds_text(found)
    return f"{value:,}" if isinstance(value, int) else number_text(found)


def label_text(name: str) -> str:
    """A key as a person would say it."""
    return _LABELS.get(name) or printable(name[:1].upper() + name[1:].replace("_", " "))


def gate_label(gate: Json) -> str:
    """What a gate is about, with the stage it judged where it names one."""
    subject = f", {printable(gate['subject'])}" if gate.get("subject") else ""
    return label_text(str(gate.get("gate", "gate"))) + subject


def limit_text(value: object, name: str) -> str:
    """A limit with its direction: 'at most 5.00 ms'. Without `min` in its name a limit is an upper one."""
    text = quantity_text(value, name)
    if number(value) is None:
        return text
    text = re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text).replace(". ", " ").removesuffix(".").replace(".x", "x")
    return f"{'at least' if 'min' in name.split('_') else 'at most'} {text}"


def change_text(before: object, after: object, *, less: str, more: str) -> str:
    """'1.85 times smaller', with `less` or `more` as the case may be; 'the same' within half a percent."""
    old, new = number(before), number(after)
    if old is None or new is None or old <= 0 or new <= 0:
        return MISSING
    ratio = old / new
    if abs(ratio - 1) <= SAME_WITHIN:
        return "the same"
    return f"{number_text(ratio)} times {less}" if ratio > 1 else f"{number_text(1 / ratio)} times {more}"
