"""Which opset and IR version each onnxruntime release reads.

What enters: a release such as "1.17". What leaves: the newest opset and IR version that it reads, and the other way
round the oldest release for an opset. A file newer than that does not load on the device, and the error there
says so only after the file has been shipped.
"""

from __future__ import annotations

from typing import NamedTuple


class Versions(NamedTuple):
    """The newest opset (of the default domain) and IR version that a release reads."""

    opset: int
    ir: int


# Up to 1.18: onnxruntime.ai/docs/reference/compatibility.html, "ONNX opset support" (1.15 reads IR 9 as well, which
# the page does not promise). The page ends there; from 1.19 on, what the released wheels for Linux themselves
# name as the newest they support when they refuse a newer file. A release between two rows reads what the older reads.
_READS: dict[str, Versions] = {
    "1.14": Versions(18, 8),
    "1.15": Versions(19, 8),
    "1.16": Versions(19, 9),
    "1.17": Versions(20, 9),
    "1.18": Versions(21, 10),
    "1.21": Versions(22, 10),
    "1.23": Versions(23, 11),
    "1.24": Versions(25, 13),
    "1.25": Versions(26, 13),
    "1.32": Versions(28, 14),
}
# The IR version that came with each opset, below which an ONNX checker refuses it.
# Source: github.com/onnx/onnx/blob/main/docs/Versioning.md, "Released Versions".
_IR_OF_OPSET = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}

OLDEST = "1.14"
"""The oldest release that reads the lowest opset which torch.onnx writes."""

OPSETS = range(18, 24)
"""The opsets that files are exported in: from the lowest that torch.onnx writes to the newest that is tested."""


def version_key(release: str) -> tuple[int, ...]:
    """A release as numbers that compare in order: "1.9" before "1.17"."""
    return tuple(int(part) for part in release.split("."))


def newest_read(release: str) -> Versions | None:
    """What an onnxruntime release reads, None for one older than the table. `release` is "1.N"."""
    known = [name for name in _READS if version_key(name) <= version_key(release)]
    return _READS[max(known, key=version_key)] if known else None


def oldest_release(opset: int, ir: int) -> str | None:
    """The oldest onnxruntime release that reads this opset and IR version, or None."""
    readers = [name for name, reads in _READS.items() if reads.opset >= opset and reads.ir >= ir]
    return min(readers, key=version_key) if readers else None


def oldest_ir(opset: int) -> int:
    """The lowest IR version that a file of this opset may have."""
    return _IR_OF_OPSET[opset]
