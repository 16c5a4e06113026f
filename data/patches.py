"""One pretraining sample: random query patches cut from a picture (UP-DETR, datasets/selfdet.py).

Patches are cut from the picture as it was decoded, then squashed to a square; the picture itself is
only resized. The reference's distribution, its quirk included: no patch touches the right or the
bottom edge. Ten patches cost 2.5 ms CPU a picture, 1.3 ms where their colours are left to the
training device, decoding (1.2 ms) apart; the reference takes 23 ms (measured on ImageNet).
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from pydantic import Field, model_validator

from data.colour import ColourDraws, ColourSettings, colour_patches, draw_colours
from data.pictures import TooSmallPicture, resize, resized_size
from models.settings import Settings

ColourOn = Literal["cpu", "device", "none"]
"""Where the patches' colours change: here, on the training device, or nowhere."""


class PatchSettings(Settings):
    """How pictures are resized, query patches cut and changed; the defaults are the reference's."""

    patch_size: Annotated[int, Field(ge=8)] = 128
    """Side in pixels to which every patch is squashed."""
    min_side: Annotated[int, Field(ge=1)] = 8
    """Smallest side of a patch in pixels as decoded; the largest is the picture's less this."""
    short_sides: Annotated[tuple[int, ...], Field(min_length=1)] = (
        320, 336, 352, 368, 400, 416, 432, 448, 464, 480,
    )  # fmt: skip
    """Choices in pixels for the picture's short side; 384 is missing, as in the reference."""
    max_size: Annotated[int, Field(ge=32)] = 600
    """Cap of the picture's long side in pixels; rounding exceeds it by up to 4."""
    held_out_short_side: Annotated[int, Field(ge=32)] = 480
    """Short side in pixels of held-out pictures."""
    colour: ColourSettings = ColourSettings()
    """Colour changes of the patches."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if min(self.short_sides) < 32:
            raise ValueError(
                f"short_sides={self.short_sides} goes below one cell of the backbone; "
                "use 32 pixels or more"
            )
        return self


@dataclass(frozen=True)
class PatchSample:
    """A resized picture and the query patches that were cut from it."""

    picture: UInt8[np.ndarray, "height width 3"]
    patches: UInt8[np.ndarray, "patches side side 3"]
    boxes_cxcywh: Float32[np.ndarray, "patches 4"]
    """Normalised to the picture."""
    colours: ColourDraws | None
    """Colour changes that are left to the training device; None where there are none."""


def draw_short_side(settings: PatchSettings, generator: np.random.Generator) -> int:
    """One of `settings.short_sides` in pixels, each as likely as the others."""
    return settings.short_sides[int(generator.random() * len(settings.short_sides))]


def cut_patches(
    picture: UInt8[np.ndarray, "height width 3"],
    settings: PatchSettings,
    num_patches: int,
    short_side: int,
    generator: np.random.Generator,
    colour_on: ColourOn,
) -> PatchSample:
    """Resizes the picture and cuts `num_patches` random patches; a pure function of its arguments.

    The draws of the crops come first and do not depend on `colour_on`: a held-out picture
    (`"none"`) has the same boxes with and without colour changes. Raises TooSmallPicture where a
    side is at most twice `min_side`.
    """
    height, width = picture.shape[:2]
    if min(height, width) <= 2 * settings.min_side:
        raise TooSmallPicture(
            f"{width} x {height} pixels are too few for patches of {settings.min_side}; "
            f"both sides need more than {2 * settings.min_side}"
        )
    boxes_xyxy = draw_boxes(height, width, settings.min_side, num_patches, generator)
    patches = _crop(picture, boxes_xyxy, settings.patch_size)
    colours = None if colour_on == "none" else draw_colours(settings.colour, num_patches, generator)
    if colours is not None and colour_on == "cpu":
        patches, colours = colour_patches(patches, colours), None
    resized = resize(picture, *resized_size(height, width, short_side, settings.max_size))
    return PatchSample(resized, patches, _normalised(boxes_xyxy, picture, resized), colours)


def draw_boxes(
    height: int, width: int, min_side: int, num_patches: int, generator: np.random.Generator
) -> Int64[np.ndarray, "num_patches 4"]:
    """boxes_xyxy in pixels: sides uniform in min_side..side-min_side, then the place uniform.

    The last row and column of places is never drawn (the reference's `randint(width -
    patch_width)`). Takes 4 uniform numbers per patch from the generator.
    """
    uniform = generator.random((num_patches, 2, 2))
    room = np.array([width, height])
    sides = min_side + (uniform[:, 0] * (room - 2 * min_side + 1)).astype(np.int64)
    corners = (uniform[:, 1] * (room - sides)).astype(np.int64)
    return np.concatenate([corners, corners + sides], axis=1)


def _crop(
    picture: UInt8[np.ndarray, "_ _ 3"], boxes_xyxy: Int64[np.ndarray, "patches 4"], side: int
) -> UInt8[np.ndarray, "patches {side} {side} 3"]:
    patches = np.empty((len(boxes_xyxy), side, side, 3), np.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes_xyxy):
        patches[number] = resize(picture[top:bottom, left:right], side, side)
    return patches


def _normalised(
    boxes_xyxy: Int64[np.ndarray, "patches 4"],
    picture: UInt8[np.ndarray, "_ _ 3"],
    resized: UInt8[np.ndarray, "_ _ 3"],
) -> Float32[np.ndarray, "patches 4"]:
    """boxes_cxcywh by the reference's own float32 steps, to agree with it to the last bit."""
    size = np.array(resized.shape[1::-1] * 2, np.float32)
    ratios = (np.array(resized.shape[1::-1] * 2) / np.array(picture.shape[1::-1] * 2)).astype(
        np.float32
    )
    left, top, right, bottom = (boxes_xyxy.astype(np.float32) * ratios).T
    centred = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=1)
    return centred / size
