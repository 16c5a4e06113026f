"""Samples and batches by their ids, in this process: for evaluation and for looking at pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from data.batches import PackedPatchBatch, join
from data.index import ShardIndex
from data.loader import StreamSource, cut_sample, pack_cut
from data.ranges import sample_ranges
from data.reading import RangeReader, ReadingSettings
from data.samples import Sample


def read_samples(
    index: ShardIndex,
    ids: Sequence[int],
    storage_options: Mapping[str, object] | None = None,
    reading: ReadingSettings | None = None,
) -> Iterator[Sample]:
    """The samples with these ids, in this order; neighbours are read together, one read at a time.

    Raises ShardReadError, DamagedShardError or StorageUnreachable where a shard cannot be read,
    ValueError for an unknown id.
    """
    reading = reading or ReadingSettings()
    reader = RangeReader(index.url, storage_options or {}, reading)
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            for wanted in sample_ranges(index, ids[start:place], reading.max_range_mb):
                yield from reader.samples(wanted)
            start = place


def held_out_batches(
    source: StreamSource, ids: Sequence[int], batch_size: int, reading: ReadingSettings
) -> Iterator[PackedPatchBatch]:
    """Batches of the samples with these ids, for evaluation: always the same crops, no colour.

    Pictures are resized to `patches.held_out_short_side`. Patches are those of epoch 0 of
    `source.seed`. A broken picture is skipped and named in its batch.
    """
    samples = list(ids)
    reader = read_samples(source.index, samples, source.storage_options, reading)
    plain = replace(source, colour_on="none")
    short_side = source.patches.held_out_short_side
    for step, start in enumerate(range(0, len(samples), batch_size)):
        count = min(batch_size, len(samples) - start)
        cut = [cut_sample(plain, 0, place, next(reader), short_side) for place in range(count)]
        yield join([pack_cut(plain, cut, step)])
