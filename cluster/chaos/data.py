"""Drawn pictures in shards for `querypatch chaos`, one of them broken."""

import io
import tarfile
from pathlib import Path

from data.index import read_index
from data.shards import ShardSettings, write_shards
from data.sources import list_source
from data.synthetic import write_scenes

PICTURES = 23
"""No multiple of a batch."""
BROKEN = 7
"""The picture, by its id, that cannot be decoded."""
_PER_SHARD = 8


def drawn_shards(out: Path) -> Path:
    """The shards in `out`, which are made where they are missing; always the same ones."""
    shards = out / "shards"
    if not (shards / "index.json").exists():
        write_scenes(out / "pictures", seed=5, count=PICTURES)
        settings = ShardSettings(samples_per_shard=_PER_SHARD)
        write_shards(list_source(str(out / "pictures")), str(shards), settings)
        _break_picture(shards, BROKEN)
    return shards


def _break_picture(shards: Path, id: int) -> None:
    """Overwrites a picture in its shard; its place and its size stay."""
    index = read_index(str(shards))
    shard = index.shards[id // _PER_SHARD]
    path = shards / shard.name
    begin, end = (int(shard.offsets[id % _PER_SHARD + more]) for more in (0, 1))
    content = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content[begin:end] + bytes(1024))) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".jpg"):
                place = begin + member.offset_data
                content = content[:place] + bytes(member.size) + content[place + member.size :]
    path.write_bytes(content)
