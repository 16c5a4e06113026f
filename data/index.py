"""The shard index: what stands where in a folder of WebDataset tars, so that any sample can be read by its number.

An index names, per shard, the number of samples, where each sample's first tar header begins, the size of its
picture in pixels, and the sha256 of the file. It is all that the order of an epoch depends on (with the seed).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64


@dataclass(frozen=True)
class Shard:
    """One tar file of the index."""

    name: str
    """File name, relative to the folder of the index."""
    sha256: str
    offsets: Int64[np.ndarray, " samples_and_end"]
    """Byte offset of each sample's first tar header, and last the end of the last sample."""
    widths: Int32[np.ndarray, " samples"]
    """Width of each picture in pixels; 0 where the sample holds no readable picture."""
    heights: Int32[np.ndarray, " samples"]
    """Height of each picture in pixels; 0 where the sample holds no readable picture."""
    size: int
    """Bytes of the file."""

    @property
    def num_samples(self) -> int:
        """Samples in this shard."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class ShardIndex:
    """All shards of one folder, in the order of their names."""

    url: str
    """Folder of the shards: a local path or any fsspec URL, without a slash at the end."""
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards; a sample's id is its position in this count, 0 first."""
        return sum(shard.num_samples for shard in self.shards)
