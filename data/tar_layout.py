"""What stands where in one tar file: samples as WebDataset groups them, with their byte ranges.

Reads headers only, about 30 microseconds a member. tarfile and webdataset both take a tar that was
cut between two members for a shorter one; here the end mark is required, and nothing may follow it.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from webdataset.tariterators import base_plus_ext

from data.samples import PICTURE_EXTENSIONS, DamagedShardError

_BLOCK = 512
_COPY = "copy it again from its source"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
# webdataset.tariterators.tar_file_iterator leaves these names out: its own metadata.
_META = re.compile(r"__[^/]*__($|/)")


class DamagedTarError(DamagedShardError):
    """A tar that cannot be read, or not as its maker meant it."""

    def __init__(self, shard: str, problem: str, remedy: str) -> None:
        super().__init__(f"shard {shard} {problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class TarPart:
    """One file of a sample."""

    extension: str
    """Lower case, all after the first dot: "jpg", "json", "v1.jpg"."""
    start: int
    """Byte offset of the content."""
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """The files of a tar that stand together and share a name up to the first dot."""

    key: str
    start: int
    """Byte offset of the first header."""
    parts: tuple[TarPart, ...]


@dataclass(frozen=True)
class TarLayout:
    """All samples of a tar, in their order."""

    samples: tuple[TarSample, ...]
    end: int
    """Byte offset behind the last file: of the end mark."""

    @property
    def offsets(self) -> Int64[np.ndarray, " samples_and_end"]:
        """Byte offset of each sample's first header, and last the end."""
        return np.array([*(sample.start for sample in self.samples), self.end], dtype=np.int64)


def read_layout(path: Path, shard: str) -> TarLayout:
    """The layout of a local tar; `shard` is its name in messages.

    Raises DamagedTarError: cut off, compressed, no tar, or a damaged header.
    """
    with path.open("rb") as file:
        _refuse_compressed(file.read(2), shard)
    try:
        with tarfile.open(path, "r:") as tar:
            samples = tuple(_grouped(tar))
            end = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise DamagedTarError(shard, f"is cut off or no tar ({error})", _COPY) from error
    _check_end(path, end, shard)
    return TarLayout(samples, end)


def picture_part(sample: TarSample) -> TarPart | None:
    """The part that `data.samples.picture_bytes` reads, or None."""
    pictures = {part.extension.rpartition(".")[2]: part for part in sample.parts}
    for extension in PICTURE_EXTENSIONS:
        if extension in pictures:
            return pictures[extension]
    return None


def merged_by_dots(sample: TarSample) -> tuple[str, str] | None:
    """Two picture names that their dots made one sample (`a.v1.jpg`, `a.v2.jpg`), or None.

    A sample with a plain part beside them (`a.jpg`, `a.mask.png`) is meant to be one.
    """
    pictures = [
        part.extension
        for part in sample.parts
        if part.extension.rpartition(".")[2] in PICTURE_EXTENSIONS
    ]
    if len(pictures) < 2 or any("." not in extension for extension in pictures):
        return None
    return f"{sample.key}.{pictures[0]}", f"{sample.key}.{pictures[1]}"


def _grouped(tar: tarfile.TarFile) -> Iterator[TarSample]:
    """Neighbours with one key, as webdataset.tariterators.group_by_keys has them.

    Where that would stop at a file that comes twice, the second begins a sample with the same key.
    """
    key, start, parts = "", 0, list[TarPart]()
    for member in tar:
        # tarfile keeps every header it saw; a shard of a million would fill the memory.
        tar.members = []  # type: ignore[attr-defined]
        if not member.isreg() or _META.match(member.name):
            continue
        prefix, extension = base_plus_ext(member.name)
        if prefix is None:
            continue
        extension = extension.lower()
        if parts and (prefix != key or any(part.extension == extension for part in parts)):
            yield TarSample(key, start, tuple(parts))
            parts = []
        if not parts:
            key, start = prefix, member.offset
        parts.append(TarPart(extension, member.offset_data, member.size))
    if parts:
        yield TarSample(key, start, tuple(parts))


def _refuse_compressed(magic: bytes, shard: str) -> None:
    if magic in _COMPRESSED:
        raise DamagedTarError(
            shard,
            f"is compressed ({_COMPRESSED[magic]}), so no sample can be found in it",
            "unpack it to a plain tar (pictures do not get smaller by compression)",
        )


def _check_end(path: Path, end: int, shard: str) -> None:
    size = path.stat().st_size
    if size < end + _BLOCK:
        problem = f"is cut off at byte {size}: the end mark of a tar is missing"
        raise DamagedTarError(shard, problem, _COPY)
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                problem = f"has a damaged header at byte {end} of {size}"
                raise DamagedTarError(shard, problem, _COPY)
