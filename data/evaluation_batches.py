"""Batches for evaluation: each picture once, at one size, with its annotation as it is stored.

Pictures of like aspect come together, so that little is padding. Loader processes share out the
batches; they end with the last one. A COCO picture at 800 pixels costs a loader process 3 ms CPU;
where the device is a CPU, normalising costs 22 ms there (measured).
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Self, assert_never

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import get_worker_info

from data.annotations import BoxAnnotation
from data.class_labels import class_label
from data.classification_content import ClassSizes, as_target, decoded, judged_picture
from data.detection_batches import (
    PackedDetectionBatch,
    ReadyPicture,
    detection_to_device,
    join_detection,
    pack_detection,
)
from data.detection_content import annotation_of
from data.detection_set import DetectionSet
from data.detection_transforms import BoxedPicture, resized_picture
from data.index import ShardIndex
from data.loader_processes import next_part, start_loading, stop_loading, url_for_processes
from data.packing import SkippedPicture
from data.picture_files import open_reader, read_one
from data.pictures import BrokenPicture, decode_picture
from data.reading import ReadingSettings
from data.samples import SEGMENTS_PART, Sample, picture_bytes, why_no_picture
from models.settings import Settings
from models.structures import Classes, Images

_PARTS_AHEAD = 2
"""Batches that each loader process makes ahead."""


class EvaluationSizes(Settings):
    """The size of pictures where a detector is judged or used; the defaults are DETR's."""

    short_side: int = Field(default=800, ge=32)
    """Pixels of the short side."""
    max_size: int = Field(default=1333, ge=32)
    """Cap of the long side in pixels; rounding exceeds it by up to 4."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_size < self.short_side:
            raise ValueError(
                f"max_size={self.max_size} is less than short_side={self.short_side}; "
                f"use {self.short_side} or more"
            )
        return self


@dataclass(frozen=True)
class EvaluationBatch:
    """Pictures on the device, and what is really in them."""

    images: Images
    """No picture where all of the batch are broken: ask for `keys` first."""
    annotations: tuple[BoxAnnotation, ...]
    """One a picture: all objects, crowds and difficult ones too, in pixels as stored."""
    stored_sizes: Int64[Tensor, "batch 2"]
    """(height, width) of the pictures as stored, on the CPU."""
    keys: tuple[str, ...]
    sample_ids: Int64[Tensor, " batch"]
    """Position of each picture in the index of its set."""
    skipped: tuple[SkippedPicture, ...] = ()
    """Pictures of this batch that could not be used."""
    segments: tuple[bytes | None, ...] = ()
    """The panoptic PNG of each picture, not decoded; None where there is none."""


def evaluation_batches(
    data: DetectionSet,
    ids: Sequence[int],
    sizes: EvaluationSizes | ClassSizes,
    batch_size: int,
    processes: int,
    device: torch.device,
    reading: ReadingSettings,
) -> Generator[EvaluationBatch, None, None]:
    """The pictures with these ids, each once, grouped by like aspect; every batch but one is full.

    With `ClassSizes` the annotation of a picture is its class, as one object.

    `processes=0` works in this process. Close the iterator to end the loader processes early.
    Raises ValueError for an unknown id; StreamError where data cannot be read or an annotation is
    none; what a later start may cure: StorageUnreachable, LoaderDied.
    """
    url = url_for_processes(data.index, data.storage_options, processes)
    located = replace(data, index=replace(data.index, url=url))
    batches = like_aspects(data.index, ids, batch_size)
    make = partial(_parts, located, batches, sizes, reading)
    parts = start_loading(make, min(processes, len(batches)), _PARTS_AHEAD)
    try:
        for _ in batches:
            yield _on_device(next_part(parts), device)
    finally:
        stop_loading(parts)


def like_aspects(
    index: ShardIndex, ids: Sequence[int], batch_size: int
) -> tuple[tuple[int, ...], ...]:
    """The ids in batches, ordered by width / height and then by id; unknown sizes count as square.

    Raises ValueError for an unknown id or a batch of nothing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not a batch; use 1 or more")
    places = np.asarray(ids, np.int64)
    if len(places) and not 0 <= places.min() <= places.max() < index.num_samples:
        raise ValueError(
            f"samples {places.min()} to {places.max()} are not all in {index.url}, which holds "
            f"{index.num_samples}; ids begin at 0"
        )
    widths = np.concatenate([shard.widths for shard in index.shards])[places]
    heights = np.concatenate([shard.heights for shard in index.shards])[places]
    known = (widths > 0) & (heights > 0)
    aspects = np.where(known, widths, 1) / np.where(known, heights, 1)
    ordered = places[np.lexsort((places, aspects))].tolist()
    bounds = [*range(0, len(ordered), batch_size), len(ordered)]
    return tuple(tuple(ordered[start:end]) for start, end in pairwise(bounds))


@dataclass(frozen=True)
class _Part:
    """A batch on its way from a loader process."""

    packed: PackedDetectionBatch
    annotations: tuple[BoxAnnotation, ...]
    stored_sizes: tuple[tuple[int, int], ...]
    segments: tuple[bytes | None, ...]


@dataclass(frozen=True)
class _Sized:
    """A picture at the size of the evaluation."""

    ready: ReadyPicture
    annotation: BoxAnnotation
    stored_size: tuple[int, int]
    segments: bytes | None


def _parts(
    data: DetectionSet,
    batches: Sequence[Sequence[int]],
    sizes: EvaluationSizes | ClassSizes,
    reading: ReadingSettings,
    process: int,
    processes: int,
) -> Iterator[_Part]:
    """Every `processes`-th batch."""
    own = batches[process::processes]
    shared = get_worker_info() is not None
    with closing(_read_batches(data, own, reading)) as read:
        for number, samples in enumerate(read):
            sized = [_sized(sample, sizes, data.classes) for sample in samples]
            yield _part(sized, number, shared)


def _read_batches(
    data: DetectionSet, batches: Sequence[Sequence[int]], reading: ReadingSettings
) -> Generator[list[Sample], None, None]:
    """The samples of the batches; the next batch is being read while one is used."""
    reader = open_reader(data.index, data.files, data.storage_options, reading)
    read = partial(read_one, data.index, reader)
    executor = ThreadPoolExecutor(reading.threads, thread_name_prefix="evaluation-reader")
    try:
        ahead = [executor.submit(read, id) for id in batches[0]] if batches else []
        for following in [*batches[1:], ()]:
            current, ahead = ahead, [executor.submit(read, id) for id in following]
            yield [sample.result() for sample in current]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _sized(
    sample: Sample, sizes: EvaluationSizes | ClassSizes, classes: Classes
) -> _Sized | SkippedPicture:
    match sizes:
        case EvaluationSizes():
            return _boxed(sample, sizes)
        case ClassSizes():
            return _classified(sample, sizes, classes)
        case _:
            assert_never(sizes)


def _classified(sample: Sample, sizes: ClassSizes, classes: Classes) -> _Sized | SkippedPicture:
    """Its annotation has the class as its one object."""
    label = class_label(sample, classes)
    try:
        picture = decoded(sample)
    except BrokenPicture as error:
        return SkippedPicture(sample.id, sample.key, sample.shard, str(error))
    height, width = picture.shape[:2]
    annotation = BoxAnnotation(
        image_id=sample.key,
        width=width,
        height=height,
        boxes_xyxy=((0.0, 0.0, float(width), float(height)),),
        names=(classes.names[label],),
        labels=None,
        areas=None,
        crowd=(False,),
        difficult=(False,),
    )
    seen = as_target(judged_picture(picture, sizes), label)
    return _Sized(ReadyPicture(0, sample.id, sample.key, seen), annotation, (height, width), None)


def _boxed(sample: Sample, sizes: EvaluationSizes) -> _Sized | SkippedPicture:
    annotation = annotation_of(sample)
    data = picture_bytes(sample)
    if data is None:
        return SkippedPicture(sample.id, sample.key, sample.shard, why_no_picture(sample))
    try:
        picture = decode_picture(data)
    except BrokenPicture as error:
        return SkippedPicture(sample.id, sample.key, sample.shard, str(error))
    height, width = picture.shape[:2]
    stored = BoxedPicture(picture, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    resized = resized_picture(stored, sizes.short_side, sizes.max_size)
    ready = ReadyPicture(0, sample.id, sample.key, resized)
    return _Sized(ready, annotation, (height, width), sample.parts.get(SEGMENTS_PART))


def _part(sized: Sequence[_Sized | SkippedPicture], step: int, shared: bool) -> _Part:
    pictures = [each for each in sized if isinstance(each, _Sized)]
    skipped = [each for each in sized if isinstance(each, SkippedPicture)]
    ready = [replace(each.ready, stream=row) for row, each in enumerate(pictures)]
    return _Part(
        packed=pack_detection(ready, skipped, step, {}, shared=shared),
        annotations=tuple(each.annotation for each in pictures),
        stored_sizes=tuple(each.stored_size for each in pictures),
        segments=tuple(each.segments for each in pictures),
    )


def _on_device(part: _Part, device: torch.device) -> EvaluationBatch:
    packed = part.packed
    if packed.keys and device.type == "cuda":
        packed = join_detection([packed], pin=True)
    batch = detection_to_device(packed, device)
    return EvaluationBatch(
        images=batch.images,
        annotations=part.annotations,
        stored_sizes=torch.tensor(part.stored_sizes, dtype=torch.int64).view(-1, 2),
        keys=packed.keys,
        sample_ids=batch.sample_ids,
        skipped=packed.skipped,
        segments=part.segments,
    )
