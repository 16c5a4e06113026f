"""Picture files with annotations that do not lie in shards, as the exact stream sees them.

An index stands in for the one of shards: one entry a picture. Keys, names and annotation texts are
packed into two tensors; torch moves a tensor into shared memory when it goes to another process, so
all loader processes of a rank read the same one copy, and since nothing in it is a Python object,
no reference count ever makes a private one. A set as large as COCO's train2017 (118,287 pictures,
7 boxes each) takes 72 MB of /dev/shm once and 7 MB of each process's own (measured).
"""

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from data.index import Shard, ShardIndex
from data.ranges import SampleRange, sample_ranges
from data.reading import (
    RangeReader,
    ReadCounters,
    ReadingSettings,
    StorageReader,
    is_permanent,
    one_line,
)
from data.samples import PICTURE_EXTENSIONS, SEGMENTS_PART, Sample
from data.storage import Folder, StorageOptions

_FIELDS = 4
"""Texts of each picture: key, name, name of the segments, annotation."""

_SPAN = 1 << 40
"""Bytes that each picture takes in the index: more than any range, so that each is one read."""


@dataclass(frozen=True, slots=True)
class FileItem:
    """One picture of a labelled set."""

    key: str
    """Unique in the set."""
    name: str
    """Path of the picture relative to the folder."""
    annotation: bytes
    """What becomes the `json` part: `data.annotations.annotation_json`."""
    width: int
    """Of the picture in pixels; 0 where unknown."""
    height: int
    segments: str | None = None
    """Path of the panoptic PNG relative to the folder."""


@dataclass(frozen=True)
class PictureFiles:
    """The texts of all pictures, one after the other."""

    texts: UInt8[Tensor, " bytes"]
    bounds: Int64[Tensor, " texts_and_end"]
    """Where each text begins, four a picture, and last where the last ends."""

    @property
    def num_pictures(self) -> int:
        """Pictures of the set."""
        return (len(self.bounds) - 1) // _FIELDS

    def item(self, id: int, width: int = 0, height: int = 0) -> FileItem:
        """What is known of a picture; sizes are the index's to know."""
        bounds = self.bounds[id * _FIELDS : (id + 1) * _FIELDS + 1].tolist()
        text = self.texts[bounds[0] : bounds[-1]].numpy().tobytes()
        first = bounds[0]
        key, name, segments, annotation = (
            text[start - first : end - first] for start, end in pairwise(bounds)
        )
        return FileItem(
            key.decode(), name.decode(), annotation, width, height, segments.decode() or None
        )


@runtime_checkable
class SampleReader(Protocol):
    """What reads samples, whether of shards or of files; threads may share it."""

    def samples(self, wanted: SampleRange) -> tuple[Sample, ...]:
        """The samples of a range, in order."""
        ...

    def take_counters(self) -> ReadCounters:
        """What was counted since the last call."""
        ...


def pack_files(folder: Folder, items: Sequence[FileItem]) -> tuple[ShardIndex, PictureFiles]:
    """The index and the texts of picture files in `folder`; ids are their places in `items`.

    The index tells two sets apart by all that is in `items` (`data.index.index_digest`). Raises
    ValueError where two have one key, or a name is empty.
    """
    _check(folder, items)
    files = _packed(items)
    widths = np.array([item.width for item in items], np.int32)
    heights = np.array([item.height for item in items], np.int32)
    return _index_of(folder.url, files, widths, heights), files


def open_reader(
    index: ShardIndex,
    files: PictureFiles | None,
    storage_options: StorageOptions,
    reading: ReadingSettings,
) -> SampleReader:
    """What reads the samples of an index, of shards or of files. Make it where it is used."""
    if files is None:
        return RangeReader(index.url, storage_options, reading)
    return FileReader(index, files, storage_options, reading)


def read_one(index: ShardIndex, reader: SampleReader, id: int) -> Sample:
    """One sample by its id; ValueError where there is none, else as the reader."""
    (wanted,) = sample_ranges(index, [id], max_range_mb=1)
    (sample,) = reader.samples(wanted)
    return sample


def restricted(
    index: ShardIndex, files: PictureFiles | None, ids: Sequence[int]
) -> tuple[ShardIndex, PictureFiles | None]:
    """The set of only these samples, in this order; their new ids count from 0.

    Of shards each run of neighbours becomes a part of a shard (1 kB each in every process). Raises
    ValueError where an id is unknown or comes twice.
    """
    known = range(index.num_samples)
    wrong = [id for id in ids if id not in known]
    if wrong:
        raise ValueError(f"sample {wrong[0]} is not one of the {len(known)} of {index.url}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids)} samples were chosen, {len(set(ids))} of them different")
    if files is None:
        return replace(index, shards=tuple(_parts_of_shards(index, ids))), None
    return _chosen_files(index, files, ids)


class FileReader:
    """Reads picture files, one file a read; a sample whose picture cannot be had says why."""

    def __init__(
        self,
        index: ShardIndex,
        files: PictureFiles,
        storage_options: StorageOptions,
        reading: ReadingSettings,
    ) -> None:
        """Opens the folder of the index; StorageError where its protocol is unknown."""
        self._files = files
        self._storage = StorageReader(index.url, storage_options, reading)

    def samples(self, wanted: SampleRange) -> tuple[Sample, ...]:
        """The samples of a range, in order; StorageUnreachable where the storage is away."""
        ids = range(wanted.first_id, wanted.first_id + wanted.count)
        return tuple(self._sample(id) for id in ids)

    def take_counters(self) -> ReadCounters:
        """What was counted since the last call."""
        return self._storage.take_counters()

    def _sample(self, id: int) -> Sample:
        item = self._files.item(id)
        parts = {"json": item.annotation}
        try:
            parts[_picture_part(item.name)] = self._read(item.name)
            if item.segments is not None:
                parts[SEGMENTS_PART] = self._read(item.segments)
        except _NoFileError as error:
            kept = {"json": item.annotation}
            return Sample(id, item.key, item.name, kept, fault=str(error))
        return Sample(id, item.key, item.name, parts)

    def _read(self, name: str) -> bytes:
        # A file that is replaced under its name is not noticed; the size would cost a request.
        key = f"file {self._storage.folder.url}/{name}"
        data = self._storage.cached(key)
        if data is None:
            data = self._storage.read(name, partial(self._read_once, name), _refusal(name))
            self._storage.keep(key, data)
        return data

    def _read_once(self, name: str) -> bytes:
        folder = self._storage.folder
        data: bytes = folder.filesystem.cat_file(folder.at(name))
        return data


class _NoFileError(ValueError):
    """A file that cannot be had, now or later; the message is the reason."""


def _refusal(name: str) -> Callable[[Exception], None]:
    """Raises _NoFileError for an error that trying again cannot cure."""

    def refuse(error: Exception) -> None:
        match error:
            case FileNotFoundError():
                raise _NoFileError(f"no such file: {name}") from error
            case PermissionError():
                raise _NoFileError(f"no permission for {name} ({one_line(error)})") from error
            case OSError() if is_permanent(error):
                raise _NoFileError(f"{name}: {one_line(error)}") from error

    return refuse


def _picture_part(name: str) -> str:
    """The part that holds the picture; which format it is, is read from its bytes."""
    extension = posixpath.splitext(name)[1][1:].lower()
    return extension if extension in PICTURE_EXTENSIONS else PICTURE_EXTENSIONS[0]


def _check(folder: Folder, items: Sequence[FileItem]) -> None:
    seen = set[str]()
    for item in items:
        if item.key in seen:
            raise ValueError(f"{folder.url}: the key {item.key} comes twice; give each its own")
        if not item.name:
            raise ValueError(f"{folder.url}: the picture {item.key} has no file name")
        seen.add(item.key)


def _packed(items: Iterable[FileItem]) -> PictureFiles:
    texts = list(_texts(items))
    bounds = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    data = np.frombuffer(bytearray().join(texts), np.uint8)
    return PictureFiles(torch.from_numpy(data), torch.from_numpy(bounds))


def _texts(items: Iterable[FileItem]) -> Iterable[bytes]:
    for item in items:
        yield item.key.encode()
        yield item.name.encode()
        yield (item.segments or "").encode()
        yield item.annotation


def _index_of(url: str, files: PictureFiles, widths: np.ndarray, heights: np.ndarray) -> ShardIndex:
    digest = hashlib.sha256(files.bounds.numpy().tobytes())
    digest.update(files.texts.numpy().data)
    pictures = Shard(
        name="picture files",
        sha256=digest.hexdigest(),
        offsets=np.arange(len(widths) + 1, dtype=np.int64) * _SPAN,
        widths=widths,
        heights=heights,
        size=len(widths) * _SPAN,
    )
    return ShardIndex(url, (pictures,))


def _chosen_files(
    index: ShardIndex, files: PictureFiles, ids: Sequence[int]
) -> tuple[ShardIndex, PictureFiles]:
    (pictures,) = index.shards
    chosen = _packed(files.item(id) for id in ids)
    places = np.asarray(ids, np.int64)
    return (
        _index_of(index.url, chosen, pictures.widths[places], pictures.heights[places]),
        chosen,
    )


def _parts_of_shards(index: ShardIndex, ids: Sequence[int]) -> Iterable[Shard]:
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            run = sample_ranges(index, ids[start:place], max_range_mb=1 << 40)
            yield from (_part_of(wanted) for wanted in run)
            start = place


def _part_of(wanted: SampleRange) -> Shard:
    """The shard without what lies before and behind a range; whole where nothing does."""
    shard, end = wanted.shard, wanted.first + wanted.count
    if wanted.count == shard.num_samples:
        return shard
    return replace(
        shard,
        offsets=shard.offsets[wanted.first : end + 1].copy(),
        widths=shard.widths[wanted.first : end].copy(),
        heights=shard.heights[wanted.first : end].copy(),
        first=(shard.first or 0) + wanted.first,
    )
