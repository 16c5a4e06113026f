"""The stream: shards to packed batches of pictures and query patches, exact and endless.

Global batch k holds the same pictures with the same patches, bit for bit, for any number of ranks
and loader processes, before and after a restart: the order is `data.order`'s, every random number
comes from a generator keyed by (seed, epoch, sample or batch), and a broken picture is skipped
without anything moving up. The state of the stream is therefore one number, the step.

Loader processes are started by a fork server, a process without threads and without a device: a
plain fork of a training process copies locks that threads of Ray, of the storage client or of the
device hold at that moment, and nobody releases them in the copy. They live across epochs and send
one packed buffer per step; the rank joins them.
"""

import logging
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Thread

import cv2
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.batches import PackedPatchBatch, SkippedPicture, join
from data.loader import LoaderFailure, LoaderPart, LoaderParts, StreamSettings, StreamSource
from data.order import batches_per_epoch, rank_streams
from data.reading import ReadCounters
from data.storage import StorageUnreachable, open_folder

_LOG = logging.getLogger(__name__)

_BROKEN_WINDOW = 1000
"""Last pictures of a rank among which the broken ones are counted."""


class StreamError(ValueError):
    """The data are not what they should be, and will not be at a later start either."""


class LoaderDied(RuntimeError):  # noqa: N818
    """A loader process is gone, e.g. for want of memory; a later start may succeed."""


@dataclass(frozen=True)
class StreamCounters:
    """What the stream of one rank has done so far."""

    pictures: int = 0
    """Pictures handed out."""
    skipped: int = 0
    """Pictures that could not be used."""
    reading: ReadCounters = field(default_factory=ReadCounters)


class PatchStream:
    """The batches of one rank. Every other rank makes its own with the same source."""

    def __init__(
        self,
        source: StreamSource,
        settings: StreamSettings,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        """`pin` puts batches into pinned memory, from which a GPU copies on its own.

        Raises ValueError where the index holds less than a batch, or ranks would be idle.
        """
        self.batches_per_epoch = batches_per_epoch(source.index, source.global_batch, source.order)
        """Steps of an epoch."""
        self.counters = StreamCounters()
        """What was done since the stream was made."""
        self._source = _with_absolute_url(source, settings)
        self._settings = settings
        self._streams = rank_streams(source.global_batch, rank, world)
        self._pin = pin
        self._broken: deque[SkippedPicture | None] = deque(maxlen=_BROKEN_WINDOW)
        self._named: set[int] = set()

    def from_step(self, step: int) -> Generator[PackedPatchBatch, None, None]:
        """This rank's part of every global batch from number `step` on, without end.

        Step `epoch * batches_per_epoch + k` is batch k of that epoch; an epoch's end is a step like
        any other. Close the iterator (`contextlib.closing`) to stop the loader processes.

        Raises StreamError where a shard cannot be read or too many pictures are broken; what a
        later start may cure: StorageUnreachable, LoaderDied.
        """
        if step < 0:
            raise ValueError(f"step={step} is before the beginning; use 0 or more")
        processes = min(self._settings.processes, len(self._streams))
        parts = self._start(step, processes)
        try:
            while True:
                yield self._joined([_received(parts) for _ in range(max(1, processes))])
        finally:
            _stop(parts)

    def _start(self, step: int, processes: int) -> Iterator[LoaderPart | LoaderFailure]:
        """The parts of all loader processes in turn: of the first, the second, ..., the first."""
        parts = LoaderParts(self._source, self._settings, self._streams, step)
        if processes == 0:
            return iter(parts)
        context = multiprocessing.get_context("forkserver")
        # What every loader process needs is imported once, in the server, and shared by them.
        context.set_forkserver_preload(["torch", "webdataset.tariterators", "data.loader"])
        with warnings.catch_warnings():
            # It counts the cores for one rank; how many processes there are is the recipe's to say.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader: DataLoader[LoaderPart | LoaderFailure] = DataLoader(
                parts,
                batch_size=None,
                num_workers=processes,
                prefetch_factor=self._settings.parts_ahead,
                multiprocessing_context=context,
                worker_init_fn=_begin_loader_process,
            )
            return iter(loader)

    def _joined(self, received: Sequence["LoaderPart"]) -> PackedPatchBatch:
        batch = join([part.packed for part in received], self._pin)
        reading = sum((part.reading for part in received), self.counters.reading)
        self.counters = StreamCounters(
            pictures=self.counters.pictures + (0 if batch.blank else batch.shape.count),
            skipped=self.counters.skipped + len(batch.skipped),
            reading=reading,
        )
        self._judge_broken(batch)
        return batch

    def _judge_broken(self, batch: PackedPatchBatch) -> None:
        """Names each broken picture once; raises StreamError where they are too many."""
        for picture in batch.skipped:
            if picture.id not in self._named:
                self._named.add(picture.id)
                _LOG.warning("skipped %s", picture)
        self._broken.extend([None] * (0 if batch.blank else batch.shape.count))
        self._broken.extend(batch.skipped)
        broken = [picture for picture in self._broken if picture is not None]
        if len(broken) > self._settings.max_broken_share * _BROKEN_WINDOW:
            first = "; ".join(str(picture) for picture in broken[:3])
            raise StreamError(
                f"{len(broken)} of the last {len(self._broken)} pictures are broken, more than "
                f"max_broken_share={self._settings.max_broken_share:g} of {_BROKEN_WINDOW}: "
                f"{first}; run `querypatch shards check {self._source.index.url}`"
            )


def _begin_loader_process(_worker: int) -> None:
    """Loader processes are the parallelism; libraries' own threads would only fight over cores.

    Ctrl-C reaches every process of a terminal, and the run still needs batches to its last step:
    the training process alone decides when loader processes end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    Thread(target=_end_with_training, name="end-with-training", daemon=True).start()


def _end_with_training() -> None:
    """Ends this process when the training process is gone, however it went.

    DataLoader watches the parent of its processes, which here is the fork server; and that lives as
    long as one of them does. So after a SIGKILL of the training process all would stay (seen).
    """
    training = multiprocessing.parent_process()
    assert training is not None
    training.join()
    os._exit(1)


def _received(iterator: Iterator[LoaderPart | LoaderFailure]) -> LoaderPart:
    """The next part; one line where its loader process cannot go on or died."""
    try:
        part = next(iterator)
    except (RuntimeError, EOFError, OSError) as error:
        if not _tells_of_death(error, iterator):
            raise
        raise LoaderDied(
            f"a loader process died ({' '.join(str(error).split()) or type(error).__name__}): out "
            "of memory, or of shared memory (/dev/shm); use a smaller order.block, fewer processes "
            "or parts_ahead, or more memory, then resume"
        ) from error
    if isinstance(part, LoaderFailure):
        raise (StorageUnreachable if part.may_pass else StreamError)(part.message)
    return part


def _tells_of_death(error: Exception, iterator: Iterator[LoaderPart | LoaderFailure]) -> bool:
    """Whether an error of DataLoader means that a process is gone.

    It says so itself, or the part's shared memory could not be had from the process that made it,
    which DataLoader notices only a moment later. An error that a process raised has its traceback.
    """
    if not isinstance(iterator, _MultiProcessingDataLoaderIter):
        return False
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return "Original Traceback" not in str(error)


def _stop(iterator: Iterator[LoaderPart | LoaderFailure]) -> None:
    """Ends the loader processes now, not when the last reference to them goes."""
    match iterator:
        case _MultiProcessingDataLoaderIter():
            iterator._shutdown_workers()
        case Generator():
            iterator.close()


def _with_absolute_url(source: StreamSource, settings: StreamSettings) -> StreamSource:
    """A local folder by its whole path: loader processes may have another working directory."""
    folder = open_folder(source.index.url, source.storage_options)
    if folder.is_local:
        return replace(source, index=replace(source.index, url=folder.path))
    if source.index.url.startswith("memory://") and settings.processes:
        raise ValueError(
            f"{source.index.url} exists in this process only, so loader processes cannot read it; "
            "use processes=0"
        )
    return source
