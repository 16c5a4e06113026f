"""Tiny shards for the stream's tests, made with nothing but tarfile."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data.index import Shard, ShardIndex
from data.storage import StorageOptions, open_folder


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A coarse random picture, told apart by its seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, pictures: Sequence[tuple[str, bytes, int, int]]) -> Shard:
    """A tar of (file name, picture, width, height), each picture with a small json part."""
    offsets = []
    with tarfile.open(path, "w") as tar:
        for file, picture, _, _ in pictures:
            offsets.append(tar.offset)
            for name, data in ((file, picture), (f"{file.partition('.')[0]}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        offsets.append(tar.offset)
    data = path.read_bytes()
    return Shard(
        name=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        offsets=np.array(offsets, np.int64),
        widths=np.array([width for _, _, width, _ in pictures], np.int32),
        heights=np.array([height for _, _, _, height in pictures], np.int32),
        size=len(data),
    )


def write_shards(folder: Path, counts: Sequence[int], broken: Sequence[int] = ()) -> ShardIndex:
    """Shards of so many small pictures of varied aspect; the ids in `broken` are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    first_id = 0
    for number, count in enumerate(counts):
        ids = range(first_id, first_id + count)
        pictures = [_picture(id, id in broken) for id in ids]
        shards.append(write_shard(folder / f"shard-{number:03}.tar", pictures))
        first_id += count
    return ShardIndex(str(folder), tuple(shards))


def upload(index: ShardIndex, url: str, storage_options: StorageOptions) -> ShardIndex:
    """The shards of a local index at another place."""
    folder = open_folder(url, storage_options)
    for shard in index.shards:
        data = (Path(index.url) / shard.name).read_bytes()
        folder.filesystem.pipe_file(folder.at(shard.name), data)
    return replace(index, url=url)


def plain_index(counts: Sequence[int], seed: int = 0, url: str = "memory://none") -> ShardIndex:
    """An index without files: random sizes, every sample of 1024 bytes."""
    generator = np.random.default_rng(seed)
    shards = tuple(
        Shard(
            name=f"shard-{number:03}.tar",
            sha256=f"{number:064x}",
            offsets=np.arange(count + 1, dtype=np.int64) * 1024,
            widths=generator.integers(200, 600, count).astype(np.int32),
            heights=generator.integers(200, 600, count).astype(np.int32),
            size=count * 1024,
        )
        for number, count in enumerate(counts)
    )
    return ShardIndex(url, shards)


def _picture(id: int, is_broken: bool) -> tuple[str, bytes, int, int]:
    generator = np.random.default_rng(id)
    width, height = (int(side) for side in generator.integers(24, 60, 2))
    data = b"no picture" if is_broken else jpeg(width, height, id)
    return f"picture{id:05}.jpg", data, width, height
