"""The stream: samples to packed batches, exact and endless.

Global batch k holds the same pictures with the same pixels and targets, bit for bit, for any number
of ranks and loader processes, before and after a restart: the order is `data.order`'s, every random
number comes from a generator keyed by (seed, epoch, sample or batch), and a broken picture is
skipped without anything moving up. The state of the stream is therefore one number, the step.

Loader processes (`data.loader_processes`) live across epochs and send one packed buffer per step;
the rank joins them.
"""

import logging
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic

from data.loader import LoaderPart, P, StreamSettings, StreamSource, loader_parts
from data.loader_processes import (
    StreamError,
    next_part,
    start_loading,
    stop_loading,
    url_for_processes,
)
from data.order import batches_per_epoch, rank_streams
from data.packing import SkippedPicture, added_counts
from data.reading import ReadCounters

_LOG = logging.getLogger(__name__)

_BROKEN_WINDOW = 1000
"""Last pictures of a rank among which the broken ones are counted."""


@dataclass(frozen=True)
class StreamCounters:
    """What the stream of one rank has done so far."""

    pictures: int = 0
    """Pictures handed out."""
    skipped: int = 0
    """Pictures that could not be used."""
    reading: ReadCounters = field(default_factory=ReadCounters)
    content: Mapping[str, int] = field(default_factory=dict)
    """What the content counted, by name, e.g. `boxes_crowd`."""


class ExactStream(Generic[P]):
    """The batches of one rank. Every other rank makes its own with the same source."""

    def __init__(
        self,
        source: StreamSource[P],
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
        url = url_for_processes(source.index, source.storage_options, settings.processes)
        self._source = replace(source, index=replace(source.index, url=url))
        self._settings = settings
        self._streams = rank_streams(source.global_batch, rank, world)
        self._pin = pin
        self._broken: deque[SkippedPicture | None] = deque(maxlen=_BROKEN_WINDOW)
        self._named: set[int] = set()

    def from_step(self, step: int) -> Generator[P, None, None]:
        """This rank's part of every global batch from number `step` on, without end.

        Step `epoch * batches_per_epoch + k` is batch k of that epoch; an epoch's end is a step like
        any other. Close the iterator (`contextlib.closing`) to stop the loader processes.

        Raises StreamError where the data cannot be read or are wrong, or too many pictures are
        broken; what a later start may cure: StorageUnreachable, LoaderDied.
        """
        if step < 0:
            raise ValueError(f"step={step} is before the beginning; use 0 or more")
        processes = min(self._settings.processes, len(self._streams))
        make = partial(loader_parts, self._source, self._settings, self._streams, step)
        parts = start_loading(make, processes, self._settings.parts_ahead)
        try:
            while True:
                yield self._joined([next_part(parts) for _ in range(max(1, processes))])
        finally:
            stop_loading(parts)

    def _joined(self, received: Sequence[LoaderPart[P]]) -> P:
        counters = self.counters
        batch = self._source.content.join([part.packed for part in received], self._pin)
        self.counters = StreamCounters(
            pictures=counters.pictures + batch.count,
            skipped=counters.skipped + len(batch.skipped),
            reading=sum((part.reading for part in received), counters.reading),
            content=added_counts([counters.content, batch.counts]),
        )
        self._judge_broken(batch)
        return batch

    def _judge_broken(self, batch: P) -> None:
        """Names each broken picture once; raises StreamError where they are too many."""
        for picture in batch.skipped:
            if picture.id not in self._named:
                self._named.add(picture.id)
                _LOG.warning("skipped %s", picture)
        self._broken.extend([None] * batch.count)
        self._broken.extend(batch.skipped)
        broken = [picture for picture in self._broken if picture is not None]
        if len(broken) > self._settings.max_broken_share * _BROKEN_WINDOW:
            first = "; ".join(str(picture) for picture in broken[:3])
            check = "shards" if self._source.files is None else "data"
            raise StreamError(
                f"{len(broken)} of the last {len(self._broken)} pictures are broken, more than "
                f"max_broken_share={self._settings.max_broken_share:g} of {_BROKEN_WINDOW}: "
                f"{first}; run `querypatch {check} check {self._source.index.url}`"
            )
