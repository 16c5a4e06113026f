"""Panoptic segments for people: the picture tinted by segment, with the names of the classes.

The colours are those of `finetune.drawing`. A name stands where its segment is thickest, so that it
is inside even of a ring; segments that are too small for their name get none.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

from finetune.drawing import (
    LEAST_LONG_SIDE,
    Box,
    are_overlapping,
    caption_font,
    colour_of,
    draw_segments,
    readable_on,
)
from finetune.panoptic_quality import PanopticMap
from models.structures import Classes

_SEARCHED_SIDE = 256
"""Longest side in pixels of the map on which the thickest place is looked for."""


def draw_panoptic(
    picture: UInt8[np.ndarray, "height width 3"], found: PanopticMap, classes: Classes
) -> Image.Image:
    """The picture with every segment tinted, outlined and named; a small one comes back enlarged.

    Segments with scores have them behind their names. Void stays as it is.
    """
    scale = max(1, -(-LEAST_LONG_SIDE // max(picture.shape[:2])))
    enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    numbers = found.numbers.repeat(scale, axis=0).repeat(scale, axis=1)
    canvas = Image.fromarray(draw_segments(enlarged, numbers, found.labels))
    _draw_names(canvas, numbers, found, _captions(found, classes))
    return canvas


def _captions(found: PanopticMap, classes: Classes) -> list[str]:
    names = [classes.names[label] for label in found.labels]
    if found.scores is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, found.scores, strict=True)]


def _draw_names(
    canvas: Image.Image,
    numbers: Int16[np.ndarray, "height width"],
    found: PanopticMap,
    captions: Sequence[str],
) -> None:
    """Large segments first; a name that would cover another is left out."""
    draw = ImageDraw.Draw(canvas)
    font = caption_font(max(12, round(max(canvas.size) / 56)))
    step = -(-max(numbers.shape) // _SEARCHED_SIDE)
    coarse = numbers[::step, ::step]
    areas = np.bincount(numbers.ravel(), minlength=len(captions) + 1)[1:]
    height = sum(font.getmetrics()) + 2
    taken: list[Box] = []
    for place in np.argsort(-areas, kind="stable").tolist():
        width = int(draw.textlength(captions[place], font=font)) + 6
        middle = _thickest(coarse == place + 1)
        if middle is None or areas[place] < width * height:
            continue
        box = _around(middle[1] * step, middle[0] * step, width, height, canvas.size)
        if any(are_overlapping(box, other) for other in taken):
            continue
        taken.append(box)
        colour = colour_of(int(found.labels[place]))
        draw.rectangle(box, fill=colour)
        draw.text((box[0] + 3, box[1] + 1), captions[place], fill=readable_on(colour), font=font)


def _thickest(mask: np.ndarray) -> tuple[int, int] | None:
    """(row, column) of the pixel that is farthest from the segment's rim, also the picture's."""
    if not mask.any():
        return None
    depth = distance_transform_edt(np.pad(mask, 1))
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return int(row) - 1, int(column) - 1


def _around(x: int, y: int, width: int, height: int, size: tuple[int, int]) -> Box:
    left = max(0, min(x - width // 2, size[0] - width))
    top = max(0, min(y - height // 2, size[1] - height))
    return left, top, left + width, top + height
