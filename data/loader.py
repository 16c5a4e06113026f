"""What a loader process does: the samples of its streams to packed parts of global batches.

What is made of the samples is the content's business (`data.patch_content`,
`data.detection_content`). Every random number comes from a generator keyed by (seed, epoch, sample
or batch), so a part does not depend on which process makes it, or when.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from pydantic import Field
from torch.utils.data import get_worker_info

from data.blocks import stream_samples
from data.index import ShardIndex
from data.order import OrderSettings, batches_per_epoch
from data.packing import SkippedPicture
from data.picture_files import PictureFiles, open_reader, read_one
from data.randomness import sample_generator
from data.reading import ReadCounters, ReadingSettings
from data.samples import Sample
from data.storage import StorageOptions
from models.settings import Settings


@runtime_checkable
class PackedPart(Protocol):
    """What the stream asks of a packed batch, or of one loader process's part of it."""

    @property
    def step(self) -> int:
        """Number of the global batch since the beginning of the run."""
        ...

    @property
    def count(self) -> int:
        """Pictures of the stream; the one of a blank batch is none."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Name of each picture."""
        ...

    @property
    def skipped(self) -> tuple[SkippedPicture, ...]:
        """Pictures that could not be used; nothing takes their place."""
        ...

    @property
    def blank(self) -> bool:
        """True where all pictures were skipped: one empty picture stands in."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What else was counted while it was made, by name."""
        ...


P = TypeVar("P", bound=PackedPart)

ReadSample = Callable[[int], Sample]
"""Any other sample of the same set, by its id."""


@dataclass(frozen=True)
class Place:
    """Where in a run a global batch is: with a sample's id, all that its random numbers hang on."""

    seed: int
    step: int
    """Number of the batch since the beginning of the run."""
    epoch: int
    batch: int
    """Number of the batch in its epoch."""
    scale_per: Literal["batch", "picture"] = "batch"
    """Whether one scale is drawn for the batch or one for each picture."""


@runtime_checkable
class BatchContent(Protocol[P]):
    """What is made of samples; it travels to the loader processes, so it is small data."""

    def part(
        self,
        place: Place,
        streams: Sequence[int],
        samples: Sequence[Sample],
        read: ReadSample,
        shared: bool,
    ) -> P:
        """One loader process's part of a global batch: a pure function of its arguments.

        `streams` are the places of the samples in the global batch. `shared` asks for shared
        memory.
        """
        ...

    def join(self, parts: Sequence[P], pin: bool) -> P:
        """The parts of one step in the order of their streams, in pinned memory if asked."""
        ...


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
class StreamSource(Generic[P]):
    """All that decides which pixels are in global batch k."""

    index: ShardIndex
    seed: int
    global_batch: int
    """Pictures of all ranks together in one step."""
    content: BatchContent[P]
    """What is made of the samples."""
    order: OrderSettings = field(default_factory=OrderSettings)
    files: PictureFiles | None = None
    """Where the pictures lie in files of their own; None for shards."""
    storage_options: StorageOptions = field(default_factory=dict)
    """Options of the fsspec filesystem of the pictures."""


@dataclass(frozen=True)
class LoaderPart(Generic[P]):
    """What one loader process made of one step."""

    packed: P
    reading: ReadCounters


def loader_parts(
    source: StreamSource[P],
    settings: StreamSettings,
    streams: range,
    first_step: int,
    process: int,
    processes: int,
) -> Iterator[LoaderPart[P]]:
    """Parts of all steps from `first_step` on, of every `processes`-th of a rank's streams.

    Endless. Raises ShardReadError, DamagedShardError, AnnotationError or StorageUnreachable.
    """
    own = streams[process::processes]
    reader = open_reader(source.index, source.files, source.storage_options, settings.reading)
    num_batches = batches_per_epoch(source.index, source.global_batch, source.order)
    shared = get_worker_info() is not None
    read = partial(read_one, source.index, reader)
    steps = stream_samples(
        source.index, source.seed, source.global_batch, source.order, own, first_step, reader,
        settings.reading,
    )  # fmt: skip
    with closing(steps):
        for step, samples in enumerate(steps, start=first_step):
            epoch, batch = divmod(step, num_batches)
            place = Place(source.seed, step, epoch, batch, source.order.scale_per)
            packed = source.content.part(place, own, samples, read, shared)
            yield LoaderPart(packed, reader.take_counters())


def scale_generator(place: Place, sample_id: int) -> np.random.Generator:
    """What a picture's scale is drawn from: of its batch, or of its own by `scale_per`."""
    number = place.batch if place.scale_per == "batch" else sample_id
    purpose = f"short side of a {place.scale_per}"
    return sample_generator(place.seed, place.epoch, number, purpose)
