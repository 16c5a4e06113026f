"""Batches for a trial step: of as many pictures as one likes, as large as the recipe's can become.

A real batch is repeated and padded: memory hangs on shapes, not on what the pictures show.
"""

from dataclasses import replace
from typing import TypeVar, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.stages import Recipe
from data.detection_transforms import AugmentSettings
from data.patches import PatchSettings
from finetune.recipe import FinetuneRecipe
from models.structures import DetectionBatch, Images, PatchBatch, Targets
from pretrain.recipe import PretrainRecipe

AnyBatch = PatchBatch | DetectionBatch

T = TypeVar("T")


def largest_shape(recipe: Recipe) -> tuple[int, int]:
    """Sides in pixels, the shorter first, of the largest padded picture that a batch may have.

    Where pictures of like aspect are batched together that is the largest picture itself, else
    a square: one picture may be upright and another lie.
    """
    sizes: PatchSettings | AugmentSettings
    match recipe:
        case PretrainRecipe():
            sizes = recipe.data.patches
        case FinetuneRecipe():
            sizes = recipe.data.augment
        case _:
            assert_never(recipe)
    short = min(max(sizes.short_sides), sizes.max_size)
    return (short if recipe.data.order.aspect_buckets else sizes.max_size, sizes.max_size)


def padded(batch: AnyBatch, shape: tuple[int, int]) -> AnyBatch:
    """The batch with more padding, where it is smaller than `shape` (the shorter side first)."""
    height, width = batch.images.pixels.shape[-2:]
    wanted = shape if height <= width else shape[::-1]
    more = (max(0, wanted[1] - width), max(0, wanted[0] - height))
    if not any(more):
        return batch
    images = Images(
        pixels=_grown(batch.images.pixels, more, 0),
        padding=_grown(batch.images.padding, more, True),
        sizes=batch.images.sizes,
    )
    match batch:
        case PatchBatch():
            return replace(batch, images=images)
        case DetectionBatch():
            segments = None if batch.segments is None else _grown(batch.segments, more, 0)
            return replace(batch, images=images, segments=segments)
        case _:
            assert_never(batch)


def repeated(batch: AnyBatch, count: int) -> AnyBatch:
    """A batch of `count` pictures: those of `batch`, one round after the other."""
    rows = torch.arange(count) % len(batch.images.sizes)
    images = Images(
        _taken(batch.images.pixels, rows),
        _taken(batch.images.padding, rows),
        _taken(batch.images.sizes, rows),
    )
    boxes, labels = batch.targets.boxes_cxcywh, batch.targets.labels
    targets = Targets(_of(boxes, rows), _of(labels, rows))
    keys, ids = _of(batch.keys, rows), _taken(batch.sample_ids, rows)
    match batch:
        case PatchBatch():
            return replace(
                batch,
                images=images,
                patches=_taken(batch.patches, rows),
                targets=targets,
                keys=keys,
                sample_ids=ids,
                places=None if batch.places is None else _of(batch.places, rows),
            )
        case DetectionBatch():
            crops, segments = batch.query_patches, batch.segments
            return replace(
                batch,
                images=images,
                targets=targets,
                keys=keys,
                sample_ids=ids,
                query_patches=None if crops is None else _taken(crops, rows),
                segments=None if segments is None else _taken(segments, rows),
            )
        case _:
            assert_never(batch)


def _grown(tensor: Tensor, more: tuple[int, int], value: float) -> Tensor:
    """With `more` (columns, rows) of `value` at the right and the bottom."""
    return F.pad(tensor, (0, more[0], 0, more[1]), value=value)


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device))


def _of(things: tuple[T, ...], rows: Tensor) -> tuple[T, ...]:
    return tuple(things[row] for row in rows.tolist())
