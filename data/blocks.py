"""Samples of some streams, step by step without end: read a block ahead, in bounded memory.

A block of every stream is read by a few threads, the ranges that are needed first first. While it
is used up, the next block is requested at the same pace and a quarter of a block ahead of it, so
that at most

    streams x block x mean bytes of a sample x 1.25  +  threads x longest range

bytes are held (16 streams x 128 x 110 kB x 1.25 = 280 MB + 64 MB; `OrderSettings.block` and the
number of loader processes set it). Blocks follow each other across the end of an epoch as within
it.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from jaxtyping import Int64

from data.index import ShardIndex
from data.order import EpochPlan, OrderSettings, block_at, block_bounds, block_ids, plan_epoch
from data.picture_files import SampleReader
from data.ranges import SampleRange, sample_ranges
from data.reading import ReadingSettings
from data.samples import Sample

_LEAD = 0.25
"""Share of a block that is requested ahead of its turn."""


def stream_samples(
    index: ShardIndex,
    seed: int,
    global_batch: int,
    order: OrderSettings,
    streams: Sequence[int],
    first_step: int,
    reader: SampleReader,
    reading: ReadingSettings,
) -> Generator[tuple[Sample, ...], None, None]:
    """For every step from `first_step` on, the samples of `streams` in that global batch.

    Endless. A step counts batches since the beginning of epoch 0. Raises ShardReadError,
    DamagedShardError or StorageUnreachable where a shard cannot be read. Close the iterator to stop
    its threads.
    """
    blocks = _blocks(index, seed, global_batch, order, streams, first_step, reading)
    executor = ThreadPoolExecutor(reading.threads, thread_name_prefix="shard-reader")
    try:
        for block, following in pairwise(blocks):
            block.request(1.0, executor, reader)
            for batch in range(block.first_batch, block.num_batches):
                following.request((batch + 1) / block.num_batches + _LEAD, executor, reader)
                yield block.take(batch)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class _Block:
    """The samples of a block's streams: requested, held, and handed out once each."""

    def __init__(
        self,
        ids: Int64[np.ndarray, "streams batches"],
        first_batch: int,
        ranges: Sequence[SampleRange],
    ) -> None:
        self.first_batch = first_batch
        self.num_batches = ids.shape[1]
        self._ids = ids
        # `last_batch: wrap` may ask twice for a sample.
        self._uses = Counter(ids[:, first_batch:].ravel().tolist())
        self._ranges = ranges
        self._range_of = {
            id: number
            for number, wanted in enumerate(ranges)
            for id in range(wanted.first_id, wanted.first_id + wanted.count)
        }
        self._reads: list[Future[tuple[Sample, ...]]] = []
        self._samples: dict[int, Sample] = {}

    def request(self, share: float, executor: ThreadPoolExecutor, reader: SampleReader) -> None:
        """Asks for the first `share` of the ranges, as far as that was not done."""
        for wanted in self._ranges[len(self._reads) : round(share * len(self._ranges))]:
            self._reads.append(executor.submit(reader.samples, wanted))

    def take(self, batch: int) -> tuple[Sample, ...]:
        """One sample of every stream; waits for its read and forgets it after its last use."""
        return tuple(self._take_one(id) for id in self._ids[:, batch].tolist())

    def _take_one(self, id: int) -> Sample:
        if id not in self._samples:
            self._collect(self._range_of[id])
        self._uses[id] -= 1
        return self._samples[id] if self._uses[id] else self._samples.pop(id)

    def _collect(self, number: int) -> None:
        """Takes over what a read brought, without what is not needed any more."""
        samples = self._reads[number].result()
        self._reads[number] = Future()
        self._samples |= {sample.id: sample for sample in samples if self._uses[sample.id]}


def _blocks(
    index: ShardIndex,
    seed: int,
    global_batch: int,
    order: OrderSettings,
    streams: Sequence[int],
    first_step: int,
    reading: ReadingSettings,
) -> Iterator[_Block]:
    """The block of `first_step`, without what lies before that step, and all that follow."""
    plan = plan_epoch(index, seed, 0, global_batch, order)
    epoch, batch = divmod(first_step, plan.num_batches)
    while True:
        plan = plan_epoch(index, seed, epoch, global_batch, order)
        for number in range(block_at(plan, batch), plan.num_blocks):
            first_batch = max(0, batch - block_bounds(plan, number)[0])
            yield _block(index, plan, number, streams, first_batch, reading)
        epoch, batch = epoch + 1, 0


def _block(
    index: ShardIndex,
    plan: EpochPlan,
    number: int,
    streams: Sequence[int],
    first_batch: int,
    reading: ReadingSettings,
) -> _Block:
    ids = block_ids(plan, number, streams)
    whole = sample_ranges(index, ids.ravel().tolist(), reading.max_range_mb)
    first_use = _first_uses(ids, first_batch)
    narrowed = [_narrowed(wanted, first_use) for wanted in whole]
    needed = [wanted for wanted in narrowed if wanted.count]
    needed.sort(key=lambda wanted: min(first_use[id] for id in _ids_of(wanted) if id in first_use))
    return _Block(ids, first_batch, needed)


def _first_uses(ids: Int64[np.ndarray, "streams batches"], first_batch: int) -> dict[int, int]:
    """The batch, of those from `first_batch` on, in which each sample is needed first."""
    first_use: dict[int, int] = {}
    for batch in range(ids.shape[1] - 1, first_batch - 1, -1):
        first_use.update(dict.fromkeys(ids[:, batch].tolist(), batch))
    return first_use


def _narrowed(wanted: SampleRange, needed: dict[int, int]) -> SampleRange:
    """The range from its first to its last sample that is needed; count 0 where none is."""
    ids = [id for id in _ids_of(wanted) if id in needed]
    if not ids:
        return SampleRange(wanted.shard, wanted.first_id, wanted.first, 0)
    skipped = ids[0] - wanted.first_id
    return SampleRange(wanted.shard, ids[0], wanted.first + skipped, ids[-1] - ids[0] + 1)


def _ids_of(wanted: SampleRange) -> range:
    return range(wanted.first_id, wanted.first_id + wanted.count)
