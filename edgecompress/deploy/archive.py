"""A bundle's archive unpacked with suspicion: nothing is written outside of the folder given, and nothing absurd.

What enters: a .tar.gz from anywhere. What leaves: regular files in a folder of ours, or the reasons why not.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path, PurePosixPath

MAX_MEMBERS = 10_000
MAX_BYTES = 4_000_000_000
_MAX_RATIO = 200  # of content to archive; weights compress by far less, a bomb by far more
_RATIO_SLACK_BYTES = 10_000_000
_BLOCK_BYTES = 1 << 20
READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


def refusals(archive: Path) -> list[str]:
    """Members of an archive that may not be unpacked, each with its reason. Raises what `READ_ERRORS` lists."""
    reasons: list[str] = []
    total, seen, tops = 0, set[str](), set[str]()
    allowed = min(MAX_BYTES, _MAX_RATIO * archive.stat().st_size + _RATIO_SLACK_BYTES)
    with tarfile.open(archive, "r:gz") as tar:
        for count, member in enumerate(tar, start=1):
            path = PurePosixPath(member.name)
            if count > MAX_MEMBERS:
                return [*reasons, f"more than {MAX_MEMBERS} members"]
            if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
                reasons.append(f"{member.name}: leads outside of the folder")
            elif member.issym() or member.islnk():
                reasons.append(f"{member.name}: is a link to {member.linkname}")
            elif not (member.isreg() or member.isdir()) or member.issparse():
                reasons.append(f"{member.name}: is neither a file nor a folder")
            elif str(path) in seen:
                reasons.append(f"{member.name}: is there twice")
            total += member.size
            if total > allowed or member.size < 0:
                return [*reasons, f"{member.name}: {total} bytes so far, more than such an archive can hold"]
            seen.add(str(path))
            tops.update(path.parts[:1])
    return reasons if len(tops) == 1 or reasons else [f"holds {len(tops)} folders at its top; a bundle has one"]


def unpack(archive: Path, folder: Path) -> Path:
    """Write the files of an archive without refusals into `folder`; returns the bundle's folder there.

    Written by hand and not by tarfile: no owner, time, link or permission of the archive is applied.
    """
    top = folder
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = folder.joinpath(*PurePosixPath(member.name).parts)
            top = folder / PurePosixPath(member.name).parts[0]
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            if source is None:
                raise ValueError(f"{member.name}: holds no data")
            with source, path.open("xb") as stream:
                while block := source.read(_BLOCK_BYTES):
                    stream.write(block)
    return top
