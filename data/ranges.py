"""Which byte ranges hold given samples: neighbours in a shard are read in one piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.index import Shard, ShardIndex


@dataclass(frozen=True)
class SampleRange:
    """Samples that lie one after the other in a shard."""

    shard: Shard
    first_id: int
    """Id of the first sample in the index."""
    first: int
    """Number of the first sample in the shard."""
    count: int


def sample_ranges(
    index: ShardIndex, ids: Sequence[int], max_range_mb: int
) -> tuple[SampleRange, ...]:
    """The fewest ranges that hold just these samples, in the order of their ids.

    A range stays in one shard and below `max_range_mb` (10^6 bytes) unless one sample is larger.
    ValueError for an id that is not in the index.
    """
    wanted = np.unique(np.asarray(ids, np.int64))
    if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < index.num_samples:
        raise ValueError(
            f"samples {wanted[0]} to {wanted[-1]} are not all in {index.url}, which holds "
            f"{index.num_samples}; ids begin at 0"
        )
    firsts = np.cumsum([0, *(shard.num_samples for shard in index.shards)])
    numbers = np.searchsorted(firsts, wanted, side="right") - 1
    breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(numbers) != 0)) + 1
    ranges: list[SampleRange] = []
    for piece, number in zip(np.split(wanted, breaks), np.split(numbers, breaks), strict=True):
        if len(piece):
            shard, first_id = index.shards[number[0]], int(firsts[number[0]])
            ranges += _split(shard, first_id, int(piece[0]), len(piece), max_range_mb * 10**6)
    return tuple(ranges)


def _split(
    shard: Shard, shard_first_id: int, first_id: int, count: int, max_bytes: int
) -> Iterator[SampleRange]:
    first, end = first_id - shard_first_id, first_id - shard_first_id + count
    while first < end:
        fitting = np.searchsorted(shard.offsets, shard.offsets[first] + max_bytes, side="right") - 1
        stop = min(end, max(first + 1, int(fitting)))
        yield SampleRange(shard, shard_first_id + first, first, stop - first)
        first = stop
