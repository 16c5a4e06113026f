"""What the tests of the stream share: a small source, and batches taken apart to compare them."""

import hashlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from data.batches import PackedPatchBatch, views_of
from data.index import ShardIndex
from data.loader import StreamSettings, StreamSource
from data.patch_content import PatchContent
from data.patches import PatchSettings
from data.stream import ExactStream

SMALL_PATCHES = PatchSettings(patch_size=8, short_sides=(32, 36, 44), max_size=64)

Pictures = dict[tuple[int, int], tuple[int, str, str]]
"""(id, key, hash of the pixels, patches, boxes and draws) of each picture by (step, stream)."""


SMALL_CONTENT = PatchContent(3, SMALL_PATCHES)


def source_of(index: ShardIndex, **changes: Any) -> StreamSource[PackedPatchBatch]:
    """Batches of 8 small pictures with 3 patches each, unless changed."""
    source = StreamSource(index=index, seed=5, global_batch=8, content=SMALL_CONTENT)
    return replace(source, **changes)


def global_batches(
    source: StreamSource[PackedPatchBatch],
    step: int,
    count: int,
    world: int = 1,
    processes: int = 0,
) -> Pictures:
    """The pictures of `count` global batches, of all ranks together."""
    pictures: Pictures = {}
    for rank in range(world):
        stream = ExactStream(source, StreamSettings(processes=processes), rank, world)
        pictures |= pictures_of(taken(stream, step, count))
    return pictures


def taken(stream: ExactStream[PackedPatchBatch], step: int, count: int) -> list[PackedPatchBatch]:
    """`count` batches from `step` on; the loader processes are gone after it."""
    with closing(stream.from_step(step)) as batches:
        return list(islice(batches, count))


def pictures_of(batches: Iterable[PackedPatchBatch]) -> Pictures:
    """Every picture of the batches, without its padding; blank ones are left out."""
    pictures: Pictures = {}
    for batch in batches:
        views = views_of(batch)
        for row, stream in enumerate(batch.streams):
            height, width = views.sizes[row].tolist()
            parts = (
                views.pictures[row, :height, :width],
                views.patches[row],
                views.boxes_cxcywh[row],
                views.draws[row],
            )
            content = (int(views.ids[row]), batch.keys[row], digest(*parts))
            pictures[batch.step, stream] = content
    return pictures


def digest(*parts: torch.Tensor) -> str:
    """One hash of shapes and bytes."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{tuple(part.shape)}".encode())
        sha.update(part.numpy().tobytes())
    return sha.hexdigest()
