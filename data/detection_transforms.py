"""Augmentation of pictures with boxes, as DETR trains (its datasets/coco.py and transforms.py).

Mirrored in half of the cases; then in half of the cases resized to a random scale, and otherwise
resized, cut and resized again. Boxes follow in the reference's own float32 steps, masks of panoptic
segments in its nearest-neighbour ones. Costs 1.0 to 1.9 ms CPU for a COCO picture on a shared core,
the same steps by Pillow 5 times as much (measured); decoding is apart.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, assert_never

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int16, Int64, UInt8
from pydantic import Field, model_validator

from data.pictures import resize, resized_size
from models.settings import Settings

AugmentKind = Literal["detr", "flip", "none"]
"""DETR's whole augmentation; mirrored and resized only; one size, always the same pixels."""

Probability = Annotated[float, Field(ge=0, le=1)]

LONGEST_BEFORE_CROP = 10_000
"""Cap in pixels of the side that is resized before the cut. The reference has none, and a picture
of 1 x 10,000 pixels would take 7 GB; it acts from an aspect ratio of 16 on (our choice)."""


class AugmentSettings(Settings):
    """How pictures with boxes are changed in training; the defaults are DETR's."""

    kind: AugmentKind = "detr"
    """`detr`: flip, scales and cuts; `flip`: flip and scales; `none`: only the largest scale."""
    short_sides: Annotated[tuple[int, ...], Field(min_length=1)] = (
        480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800,
    )  # fmt: skip
    """Choices in pixels for the short side of the finished picture."""
    max_size: Annotated[int, Field(ge=32)] = 1333
    """Cap of the finished picture's long side in pixels; rounding exceeds it by up to 4."""
    flip: Probability = 0.5
    """Probability that a picture is mirrored, left for right."""
    crop: Probability = 0.5
    """Probability that a part is cut out before the picture gets its size."""
    crop_short_sides: Annotated[tuple[int, ...], Field(min_length=1)] = (400, 500, 600)
    """Choices in pixels for the short side before cutting. How much is cut away depends on the
    ratio to `crop_sides` alone, so these need no change for small pictures."""
    crop_sides: tuple[int, int] = (384, 600)
    """Least and greatest side in pixels of the part that is cut out; both sides are drawn alike."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if min(self.short_sides) < 32:
            raise ValueError(
                f"short_sides={self.short_sides} goes below one cell of the backbone; "
                "use 32 pixels or more"
            )
        if self.max_size < max(self.short_sides):
            raise ValueError(
                f"max_size={self.max_size} is less than {max(self.short_sides)} of short_sides; "
                f"raise it, e.g. to {max(self.short_sides) * 5 // 3}, or take shorter short_sides"
            )
        least, greatest = self.crop_sides
        if not 1 <= least <= greatest:
            raise ValueError(
                f"crop_sides=({least}, {greatest}) must rise from at least 1 pixel; "
                "give (least, greatest)"
            )
        if min(self.crop_short_sides) < least:
            raise ValueError(
                f"crop_short_sides={self.crop_short_sides}: {least} pixels of crop_sides cannot be "
                f"cut out of {min(self.crop_short_sides)}; use {least} or more, or cut less"
            )
        return self


@dataclass(frozen=True)
class BoxedPicture:
    """A picture and what is to be found in it."""

    picture: UInt8[np.ndarray, "height width 3"]
    boxes_xyxy: Float32[np.ndarray, "boxes 4"]
    """In pixels of this picture: edges, not centres of pixels; the right edge is at `width`."""
    labels: Int64[np.ndarray, " boxes"]
    segments: Int16[np.ndarray, "height width"] | None = None
    """Panoptic: n + 1 at the pixels of box n, 0 where there is none."""


def augment(
    picture: BoxedPicture, settings: AugmentSettings, scale: float, generator: np.random.Generator
) -> BoxedPicture:
    """The changed picture; a pure function of its arguments. Takes 7 numbers from the generator.

    `scale` in [0, 1) picks the finished short side; pictures of one batch that share it pad less.
    Boxes are clipped to the part that was cut out; those that have no area left are dropped with
    their label and segment. `none` uses neither `scale` nor what is drawn.
    """
    draws = generator.random(7).tolist()
    match settings.kind:
        case "none":
            return resized_picture(picture, max(settings.short_sides), settings.max_size)
        case "flip":
            flipped = _flipped_at(picture, draws[0], settings.flip)
        case "detr":
            flipped = _flipped_at(picture, draws[0], settings.flip)
            if draws[1] < settings.crop:
                flipped = _randomly_cut(flipped, settings, draws[2:])
        case _:
            assert_never(settings.kind)
    return resized_picture(flipped, pick(settings.short_sides, scale), settings.max_size)


def pick(choices: tuple[int, ...], draw: float) -> int:
    """The choice that a uniform number in [0, 1) falls on, each as likely as the others."""
    return choices[int(draw * len(choices))]


def flipped_picture(picture: BoxedPicture) -> BoxedPicture:
    """Mirrored, left for right; labels keep their boxes, segments their numbers."""
    width = np.float32(picture.picture.shape[1])
    left, top, right, bottom = picture.boxes_xyxy.T
    return BoxedPicture(
        # A sixteenth of numpy's time (0.09 against 1.4 ms for a COCO picture, measured).
        picture=torch.from_numpy(picture.picture).flip(1).numpy(),
        boxes_xyxy=np.stack([width - right, top, width - left, bottom], axis=1),
        labels=picture.labels,
        segments=None if picture.segments is None else picture.segments[:, ::-1],
    )


def resized_picture(picture: BoxedPicture, short_side: int, max_size: int) -> BoxedPicture:
    """Resized by DETR's rule (`resized_size`); boxes by the ratio of each axis, rounding and all.

    A segment that is thinner than the pixels that are left out may vanish; its box stays, as in
    the reference.
    """
    height, width = picture.picture.shape[:2]
    new_height, new_width = resized_size(height, width, short_side, max_size)
    if (new_height, new_width) == (height, width):
        return picture
    across, down = new_width / width, new_height / height
    return BoxedPicture(
        picture=resize(picture.picture, new_height, new_width),
        boxes_xyxy=picture.boxes_xyxy * np.array([across, down, across, down], np.float32),
        labels=picture.labels,
        segments=_nearest(picture.segments, new_height, new_width),
    )


def cut_picture(
    picture: BoxedPicture, top: int, left: int, height: int, width: int
) -> BoxedPicture:
    """The part of height x width pixels at (top, left); boxes without area there are dropped."""
    moved = picture.boxes_xyxy - np.array([left, top, left, top], np.float32)
    clipped = np.clip(moved, np.float32(0), np.array([width, height] * 2, np.float32))
    kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    rows, columns = slice(top, top + height), slice(left, left + width)
    cut = BoxedPicture(
        picture=picture.picture[rows, columns],
        boxes_xyxy=clipped,
        labels=picture.labels,
        segments=None if picture.segments is None else picture.segments[rows, columns],
    )
    return kept_boxes(cut, kept)


def kept_boxes(picture: BoxedPicture, kept: Bool[np.ndarray, " boxes"]) -> BoxedPicture:
    """Only these boxes; segments of the others become 0, the rest are numbered anew."""
    if kept.all():
        return picture
    segments = picture.segments
    if segments is not None:
        numbers = np.zeros(len(kept) + 1, np.int16)
        numbers[1:][kept] = np.arange(1, kept.sum() + 1)
        segments = numbers[segments]
    return replace(
        picture,
        boxes_xyxy=picture.boxes_xyxy[kept],
        labels=picture.labels[kept],
        segments=segments,
    )


def _flipped_at(picture: BoxedPicture, draw: float, probability: float) -> BoxedPicture:
    return flipped_picture(picture) if draw < probability else picture


def _randomly_cut(
    picture: BoxedPicture, settings: AugmentSettings, draws: list[float]
) -> BoxedPicture:
    """Resized to one of `crop_short_sides`; then sides and place of the cut are uniform."""
    resized = resized_picture(
        picture, pick(settings.crop_short_sides, draws[0]), LONGEST_BEFORE_CROP
    )
    full_height, full_width = resized.picture.shape[:2]
    width = _drawn_side(full_width, settings.crop_sides, draws[1])
    height = _drawn_side(full_height, settings.crop_sides, draws[2])
    top = int(draws[3] * (full_height - height + 1))
    left = int(draws[4] * (full_width - width + 1))
    return cut_picture(resized, top, left, height, width)


def _drawn_side(side: int, crop_sides: tuple[int, int], draw: float) -> int:
    """Uniform in least..min(side, greatest); a side that is shorter than that stays whole."""
    least, greatest = min(crop_sides[0], side), min(crop_sides[1], side)
    return least + int(draw * (greatest - least + 1))


def _nearest(
    segments: Int16[np.ndarray, "_ _"] | None, height: int, width: int
) -> Int16[np.ndarray, "height width"] | None:
    """The pixel at floor(place * old / new), as torch's `nearest`, without its float rounding."""
    if segments is None:
        return None
    rows = np.arange(height) * segments.shape[0] // height
    columns = np.arange(width) * segments.shape[1] // width
    nearest: np.ndarray = segments[rows[:, None], columns]
    return nearest
