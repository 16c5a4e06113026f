"""From masks of queries to one segment a pixel (DETR, section 4.4; its PostProcessPanoptic).

Queries that are sure of a class take part; every pixel goes to the one with the highest mask logit;
stuff of one class becomes one segment; segments of a few pixels are taken out and their pixels
given to the next best. Two things differ from the public code, on purpose: it stretches a padded
mask over the unpadded picture where a batch has padding, and when segments are taken out it forgets
that stuff was merged, which leaves one of its queries in and the pixels of the others to whatever
comes next. Masks are made at most 16 at a time, see `models.mask_head`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from pydantic import Field
from torch import Tensor

from finetune.panoptic_quality import PanopticMap
from models.mask_head import MaskSource, PanopticDetector
from models.settings import Settings
from models.structures import Classes, Images

_MASKS_AT_ONCE = 16


class SegmentSettings(Settings):
    """Which queries become segments."""

    threshold: float = Field(default=0.85, ge=0, le=1)
    """Least probability, 0 to 1, of the class of a query that takes part."""
    max_small_area: int = Field(default=4, ge=0)
    """Segments of so many pixels of the stored picture, or fewer, are taken out."""


@torch.no_grad()
def panoptic_maps(
    model: PanopticDetector,
    images: Images,
    stored_sizes: Sequence[tuple[int, int]],
    classes: Classes,
    settings: SegmentSettings,
) -> list[PanopticMap]:
    """The segments of each picture at its stored (height, width); labels are those of `classes`.

    The model is in evaluation mode. A picture in which no query is sure has void alone.
    """
    source = model.detect(images)
    last = source.detection.groups[0].layers[-1]
    best, labels = last.logits.float().softmax(-1).max(-1)
    sure = (labels < last.logits.shape[-1] - 1) & (best > settings.threshold)
    padded = images.pixels.shape[-2:]
    maps = []
    for picture, stored in enumerate(stored_sizes):
        query = sure[picture].nonzero()[:, 0]
        logits = _enlarged(_masks(model, source, picture, query), (padded[0], padded[1]))
        height, width = images.sizes[picture].tolist()
        maps.append(
            merged_segments(
                logits[:, :height, :width],
                labels[picture, query],
                best[picture, query],
                _are_things(classes),
                stored,
                settings.max_small_area,
            )
        )
    return maps


def merged_segments(
    logits: Float[Tensor, "queries height width"],
    labels: Int64[Tensor, " queries"],
    scores: Float[Tensor, " queries"],
    are_things: Bool[Tensor, " classes"],
    stored: tuple[int, int],
    max_small_area: int,
) -> PanopticMap:
    """The segments of one picture, whose queries are all sure, at its stored (height, width).

    A merged segment has the score of its surest query.
    """
    if not len(labels):
        return _void(stored)
    first = _first_of_segment(labels, are_things.to(labels.device))
    owner = _owner(logits, first, stored)
    areas = torch.bincount(owner.flatten(), minlength=len(labels))
    kept = (areas > max_small_area)[first]
    if not kept.any():
        return _void(stored)
    if not kept.all():
        # Once is enough: those that are left only gain pixels.
        owner = _owner(logits.masked_fill(~kept[:, None, None], -torch.inf), first, stored)
    return _numbered(owner, labels, scores, first)


def _masks(
    model: PanopticDetector, source: MaskSource, picture: int, query: Int64[Tensor, " queries"]
) -> Float[Tensor, "queries rows columns"]:
    if not len(query):
        return source.attention.new_zeros(0, 1, 1)
    parts = [
        model.masks(source, torch.full_like(part, picture), part)
        for part in torch.split(query, _MASKS_AT_ONCE)
    ]
    return torch.cat(parts).float()


def _enlarged(
    logits: Float[Tensor, "queries _ _"], size: tuple[int, int]
) -> Float[Tensor, "queries height width"]:
    if not len(logits):
        return logits.new_zeros(0, *size)
    return F.interpolate(logits[:, None], size=size, mode="bilinear")[:, 0]


def _are_things(classes: Classes) -> Bool[Tensor, " classes"]:
    return torch.tensor(classes.things or (True,) * len(classes.names))


def _first_of_segment(
    labels: Int64[Tensor, " queries"], are_things: Bool[Tensor, " classes"]
) -> Int64[Tensor, " queries"]:
    """For each query the first one of its segment: itself, or for stuff that of its class."""
    places = torch.arange(len(labels), device=labels.device)
    together = (labels[:, None] == labels[None]) & ~are_things[labels][:, None]
    together |= places[:, None] == places[None]
    return together.int().argmax(1)


def _owner(
    logits: Float[Tensor, "queries _ _"],
    first: Int64[Tensor, " queries"],
    stored: tuple[int, int],
) -> Int64[Tensor, "height width"]:
    """The first query of each pixel's segment, of the nearest pixel by their middles, as Pillow."""
    owner = first[logits.argmax(0)]
    rows, columns = (
        (2 * torch.arange(new, device=owner.device) + 1) * old // (2 * new)
        for new, old in zip(stored, owner.shape, strict=True)
    )
    return owner[rows[:, None], columns]


def _numbered(
    owner: Int64[Tensor, "height width"],
    labels: Int64[Tensor, " queries"],
    scores: Float[Tensor, " queries"],
    first: Int64[Tensor, " queries"],
) -> PanopticMap:
    present, numbers = torch.unique(owner, return_inverse=True)
    best = scores.new_zeros(len(scores)).scatter_reduce(0, first, scores, "amax")
    return PanopticMap(
        numbers=(numbers + 1).to(torch.int16).cpu().numpy(),
        labels=labels[present].cpu().numpy(),
        crowd=np.zeros(len(present), bool),
        scores=_float32(best[present]),
    )


def _void(stored: tuple[int, int]) -> PanopticMap:
    return PanopticMap(
        numbers=np.zeros(stored, np.int16),
        labels=np.zeros(0, np.int64),
        crowd=np.zeros(0, bool),
        scores=np.zeros(0, np.float32),
    )


def _float32(values: Float[Tensor, " _"]) -> Float32[np.ndarray, " _"]:
    numbers: np.ndarray = values.float().cpu().numpy()
    return numbers
