"""Samples and batches by their ids, in this process: for evaluation and for looking at pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from data.batches import PackedPatchBatch
from data.index import ShardIndex
from data.loader import Place
from data.patch_content import PatchContent
from data.picture_files import PictureFiles, open_reader
from data.ranges import sample_ranges
from data.reading import ReadingSettings
from data.samples import Sample
from data.storage import StorageOptions


def read_samples(
    index: ShardIndex,
    ids: Sequence[int],
    storage_options: StorageOptions | None = None,
    reading: ReadingSettings | None = None,
    files: PictureFiles | None = None,
) -> Iterator[Sample]:
    """The samples with these ids, in this order; neighbours are read together, one read at a time.

    Raises ShardReadError, DamagedShardError or StorageUnreachable where a shard cannot be read,
    ValueError for an unknown id.
    """
    reading = reading or ReadingSettings()
    reader = open_reader(index, files, storage_options or {}, reading)
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            for wanted in sample_ranges(index, ids[start:place], reading.max_range_mb):
                yield from reader.samples(wanted)
            start = place


def held_out_batches(
    index: ShardIndex,
    content: PatchContent,
    seed: int,
    ids: Sequence[int],
    batch_size: int,
    reading: ReadingSettings,
) -> Iterator[PackedPatchBatch]:
    """Batches of the samples with these ids, for evaluation: always the same crops, no colour.

    Pictures are resized to `patches.held_out_short_side`. Patches are those of epoch 0 of `seed`. A
    broken picture is skipped and named in its batch.
    """
    samples = list(ids)
    reader = read_samples(index, samples, None, reading)
    plain = replace(content, colour_on="none")
    short_side = content.patches.held_out_short_side
    for step, start in enumerate(range(0, len(samples), batch_size)):
        place = Place(seed, step, epoch=0, batch=step)
        count = min(batch_size, len(samples) - start)
        cut = [plain.cut(place, row, next(reader), short_side) for row in range(count)]
        yield plain.join([plain.packed(cut, step)], pin=False)
