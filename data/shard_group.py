"""One group of pictures to its tars: read, decoded to be sure, written, hashed.

A tar holds the pictures' bytes unchanged and nothing that differs between two writings: no time, no
owner, no machine. So equal pictures give equal files.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.index import Shard
from data.pictures import BrokenPicture, decode_picture
from data.source_items import BadItemError, LeftOut, Source, SourceItem
from data.sources import read_item

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Group:
    """What became of one group of pictures."""

    shards: tuple[Shard, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def num_items(self) -> int:
        """Pictures of the source that the group had."""
        return sum(shard.num_samples for shard in self.shards) + len(self.left_out)


@dataclass(frozen=True)
class PictureDone:
    """One more picture was dealt with."""

    num_bytes: int
    """Of the whole sample; 0 where it was left out."""
    left_out: LeftOut | None


def write_group(
    source: Source,
    items: Sequence[SourceItem],
    stem: str,
    scratch: Path,
    max_bytes: int,
    report: Callable[[PictureDone], None],
) -> Group:
    """Write the items to `scratch`/`stem`.tar, and to `stem`_001.tar and so on beyond `max_bytes`.

    Broken pictures are left out with their reason. `report` hears of each picture; what it raises
    stops the writing.
    """
    shards, left_out = list[Shard](), list[LeftOut]()
    tar = _OpenTar(scratch / f"{stem}.tar")
    try:
        for item in items:
            try:
                parts = read_item(source, item)
                height, width, _ = decode_picture(next(iter(parts.values()))).shape
            except (BadItemError, BrokenPicture) as error:
                left_out.append(LeftOut(item.name, str(error)))
                report(PictureDone(0, left_out[-1]))
                continue
            if not tar.has_room(parts, max_bytes):
                shards.append(tar.finish())
                tar = _OpenTar(scratch / f"{stem}_{len(shards):03d}.tar")
            tar.add(item.key, parts, height, width)
            report(PictureDone(sum(map(len, parts.values())), None))
        if tar.offsets:
            shards.append(tar.finish())
    finally:
        tar.tar.close()
    return Group(tuple(shards), tuple(left_out))


@dataclass
class _OpenTar:
    """A shard that is being written."""

    path: Path
    offsets: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # GNU rather than USTAR: the same bytes here, and a foreign part's long name still fits.
        self.tar = tarfile.open(self.path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def has_room(self, parts: Mapping[str, bytes], max_bytes: int) -> bool:
        """True where the file would stay within `max_bytes`, or is empty yet."""
        added = sum(_BLOCK + _padded(len(data), _BLOCK) for data in parts.values())
        size = _padded(self.tar.offset + added + 2 * _BLOCK, tarfile.RECORDSIZE)
        return not self.offsets or size <= max_bytes

    def add(self, key: str, parts: Mapping[str, bytes], height: int, width: int) -> None:
        self.offsets.append(self.tar.offset)
        self.widths.append(width)
        self.heights.append(height)
        for extension, data in parts.items():
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(data)
            self.tar.addfile(entry, io.BytesIO(data))

    def finish(self) -> Shard:
        end = self.tar.offset
        self.tar.close()
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(
            name=self.path.name,
            sha256=sha256,
            offsets=np.array([*self.offsets, end], dtype=np.int64),
            widths=np.array(self.widths, dtype=np.int32),
            heights=np.array(self.heights, dtype=np.int32),
            size=self.path.stat().st_size,
        )


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
