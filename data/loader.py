"""What a loader process does: the samples of its streams to packed parts of global batches.

Every random number comes from a generator keyed by (seed, epoch, sample or batch), so a part does
not depend on which process makes it, or when.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from pydantic import Field
from torch.utils.data import IterableDataset, get_worker_info

from data.batches import CutPicture, PackedPatchBatch, SkippedPicture, pack
from data.blocks import stream_samples
from data.index import ShardIndex
from data.order import OrderSettings, batches_per_epoch
from data.patches import ColourOn, PatchSettings, cut_patches, draw_short_side
from data.pictures import BrokenPicture, decode_picture
from data.randomness import sample_generator
from data.reading import RangeReader, ReadCounters, ReadingSettings, ShardReadError
from data.samples import DamagedShardError, Sample, picture_bytes
from data.storage import StorageUnreachable
from models.settings import Settings


class StreamSettings(Settings):
    """How batches are made; nothing here changes what is in them."""

    processes: int = Field(default=2, ge=0)
    """Loader processes of each rank; 0 makes the batches in the training process."""
    parts_ahead: int = Field(default=2, ge=1)
    """Batches that each loader process makes ahead; each takes shared memory of its own."""
    max_broken_share: float = Field(default=0.05, ge=0, le=1)
    """Share of broken pictures among a rank's last 1000 above which the stream stops."""
    reading: ReadingSettings = ReadingSettings()
    """How shards are read."""


@dataclass(frozen=True, kw_only=True)
class StreamSource:
    """All that decides which pixels are in global batch k."""

    index: ShardIndex
    seed: int
    global_batch: int
    """Pictures of all ranks together in one step."""
    num_patches: int
    """Query patches of each picture."""
    order: OrderSettings = field(default_factory=OrderSettings)
    patches: PatchSettings = field(default_factory=PatchSettings)
    colour_on: ColourOn = "cpu"
    storage_options: Mapping[str, object] = field(default_factory=dict)
    """Options of the fsspec filesystem of the shards."""


@dataclass(frozen=True)
class LoaderPart:
    """What one loader process made of one step."""

    packed: PackedPatchBatch
    reading: ReadCounters


@dataclass(frozen=True)
class LoaderFailure:
    """Why a loader process cannot go on; sent as a value, so that one line arrives."""

    message: str
    may_pass: bool
    """True where a later start may succeed: the storage does not answer."""


class LoaderParts(IterableDataset[LoaderPart | LoaderFailure]):
    """Parts of the steps, each loader process with its share of the rank's streams."""

    def __init__(
        self, source: StreamSource, settings: StreamSettings, streams: range, first_step: int
    ) -> None:
        self._source = source
        self._settings = settings
        self._streams = streams
        self._first_step = first_step

    def __iter__(self) -> Iterator[LoaderPart | LoaderFailure]:
        worker = get_worker_info()
        streams = (
            self._streams if worker is None else self._streams[worker.id :: worker.num_workers]
        )
        try:
            yield from _parts(self._source, self._settings, streams, self._first_step)
        except (ShardReadError, DamagedShardError) as error:
            yield LoaderFailure(str(error), may_pass=False)
        except StorageUnreachable as error:
            yield LoaderFailure(str(error), may_pass=True)


def cut_sample(
    source: StreamSource, epoch: int, stream: int, sample: Sample, short_side: int
) -> CutPicture | SkippedPicture:
    """A picture with its query patches, or why there is none."""
    data = picture_bytes(sample)
    if data is None:
        reason = f"no picture among its parts ({', '.join(sample.parts)})"
        return SkippedPicture(sample.id, sample.key, sample.shard, reason)
    generator = sample_generator(source.seed, epoch, sample.id, "patches")
    try:
        cut = cut_patches(
            decode_picture(data), source.patches, source.num_patches, short_side, generator,
            source.colour_on,
        )  # fmt: skip
    except BrokenPicture as error:
        return SkippedPicture(sample.id, sample.key, sample.shard, str(error))
    return CutPicture(stream, sample.id, sample.key, cut)


def pack_cut(
    source: StreamSource,
    cut: Sequence[CutPicture | SkippedPicture],
    step: int,
    shared: bool = False,
) -> PackedPatchBatch:
    """The pictures as one part of a batch, with the names of those that there are not."""
    pictures = [picture for picture in cut if isinstance(picture, CutPicture)]
    skipped = [picture for picture in cut if isinstance(picture, SkippedPicture)]
    num_patches, side = source.num_patches, source.patches.patch_size
    return pack(pictures, skipped, step, num_patches, side, shared)


def _parts(
    source: StreamSource, settings: StreamSettings, streams: range, first_step: int
) -> Iterator[LoaderPart]:
    reader = RangeReader(source.index.url, source.storage_options, settings.reading)
    num_batches = batches_per_epoch(source.index, source.global_batch, source.order)
    shared = get_worker_info() is not None
    steps = stream_samples(
        source.index, source.seed, source.global_batch, source.order, streams, first_step,
        reader, settings.reading,
    )  # fmt: skip
    with closing(steps):
        for step, samples in enumerate(steps, start=first_step):
            epoch, batch = divmod(step, num_batches)
            cut = [
                cut_sample(source, epoch, stream, sample, _short_side(source, epoch, batch, sample))
                for stream, sample in zip(streams, samples, strict=True)
            ]
            yield LoaderPart(pack_cut(source, cut, step, shared), reader.take_counters())


def _short_side(source: StreamSource, epoch: int, batch: int, sample: Sample) -> int:
    scale_per = source.order.scale_per
    number = batch if scale_per == "batch" else sample.id
    generator = sample_generator(source.seed, epoch, number, f"short side of a {scale_per}")
    return draw_short_side(source.patches, generator)
