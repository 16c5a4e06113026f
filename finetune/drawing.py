"""Pictures for people: boxes with names and scores, segments, and sheets of several pictures.

A class has one colour wherever it is drawn. Lines and letters grow with the picture, and a small
picture is enlarged, so that the names can be read at any size.
"""

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Int16, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

LEAST_LONG_SIDE = 400
"""Shorter pictures are enlarged to this many pixels before anything is drawn on them."""
SEGMENT_OPACITY = 0.45
TILE_WIDTH = 420
MARGIN = 12
TITLE_HEIGHT = 20
BACKGROUND = (250, 250, 248)
INK = (40, 40, 40)

_GOLDEN = 0.618033988749895


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet."""

    title: str
    picture: Image.Image


def draw_boxes(
    picture: UInt8[np.ndarray, "height width 3"],
    boxes_xyxy: Float32[np.ndarray, "boxes 4"],
    labels: Int64[np.ndarray, " boxes"],
    captions: Sequence[str],
    width: int | None = None,
) -> Image.Image:
    """The picture with a box and a caption for each object, the first ones on top.

    Boxes are in pixels and are drawn as far as they lie in the picture. It comes back `width`
    pixels wide; where that is None, as it is, but a small one enlarged.
    """
    enlarged = max(1.0, LEAST_LONG_SIDE / max(picture.shape[:2]))
    scale = enlarged if width is None else width / picture.shape[1]
    canvas = _scaled(Image.fromarray(picture), scale)
    line = max(2, round(max(canvas.size) / 300))
    frames = [_frame(box, canvas.size) for box in (boxes_xyxy * scale).tolist()]
    draw = ImageDraw.Draw(canvas)
    colours = [colour_of(int(label)) for label in labels]
    for frame, colour in reversed(list(zip(frames, colours, strict=True))):
        _draw_frame(draw, frame, colour, line)
    _draw_captions(draw, frames, colours, captions, canvas.size)
    return canvas


def draw_segments(
    picture: UInt8[np.ndarray, "height width 3"],
    segments: Int16[np.ndarray, "height width"],
    labels: Int64[np.ndarray, " segments"],
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture with segment n + 1 tinted in the colour of label n and outlined; 0 is left."""
    palette = np.array([(0, 0, 0), *(colour_of(int(label)) for label in labels)], np.float32)
    opacity = np.where(segments > 0, np.float32(SEGMENT_OPACITY), np.float32(0))[:, :, None]
    tinted = picture * (1 - opacity) + palette[segments] * opacity
    tinted[_edges(segments)] = 255
    levels: np.ndarray = tinted.round().astype(np.uint8)
    return levels


def draw_sheet(tiles: Iterable[Tile], columns: int = 4, width: int = TILE_WIDTH) -> Image.Image:
    """The pictures, each `width` pixels wide under its title, in columns of like length."""
    drawn = [_titled(tile, width) for tile in tiles]
    bottoms = [MARGIN] * max(1, min(columns, len(drawn)))
    places = []
    for tile in drawn:
        column = bottoms.index(min(bottoms))
        places.append((MARGIN + column * (width + MARGIN), bottoms[column]))
        bottoms[column] += tile.height + MARGIN
    sheet = Image.new("RGB", (MARGIN + len(bottoms) * (width + MARGIN), max(bottoms)), BACKGROUND)
    for tile, place in zip(drawn, places, strict=True):
        sheet.paste(tile, place)
    return sheet


@lru_cache(maxsize=4096)
def colour_of(label: int) -> Colour:
    """The colour of a class: hues by the golden ratio, so that neighbours differ most."""
    hue = (0.03 + label * _GOLDEN) % 1
    brightness = (1.0, 0.82, 0.92)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, brightness)
    return round(red * 255), round(green * 255), round(blue * 255)


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    if scale == 1:
        return picture
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _frame(box_xyxy: list[float], size: tuple[int, int]) -> Box:
    """The pixels of the box's outline, inside the picture and at least one wide and high."""
    width, height = size
    left, right = (min(max(round(side), 0), width - 1) for side in (box_xyxy[0], box_xyxy[2] - 1))
    top, bottom = (min(max(round(side), 0), height - 1) for side in (box_xyxy[1], box_xyxy[3] - 1))
    return left, top, max(left, right), max(top, bottom)


def _draw_frame(draw: ImageDraw.ImageDraw, frame: Box, colour: Colour, line: int) -> None:
    # A dark rim, or the colour would drown in a picture of the same colour.
    draw.rectangle(frame, outline=(0, 0, 0), width=line + 1)
    draw.rectangle(frame, outline=colour, width=line)


def _draw_captions(
    draw: ImageDraw.ImageDraw,
    frames: Sequence[Box],
    colours: Sequence[Colour],
    captions: Sequence[str],
    size: tuple[int, int],
) -> None:
    """Each at the first place by its box that is free, in their order; last resort: its corner."""
    font = caption_font(max(12, round(max(size) / 45)))
    taken: list[Box] = []
    for frame, colour, caption in zip(frames, colours, captions, strict=True):
        place = _caption_place(draw, frame, caption, font, size, taken)
        taken.append(place)
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + 3, place[1] + 1), caption, fill=readable_on(colour), font=font)


def _caption_place(
    draw: ImageDraw.ImageDraw,
    frame: Box,
    caption: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: Sequence[Box],
) -> Box:
    left, top, right, bottom = frame
    width = int(draw.textlength(caption, font=font)) + 6
    height = sum(font.getmetrics()) + 2
    corners = [
        (left, top - height),
        (left, top),
        (left, bottom + 1),
        (right - width, top - height),
        (right - width, top),
        (left, bottom - height),
        (right - width, bottom - height),
        *((left, top + height * row) for row in range(1, 6)),
    ]
    places = [_inside(x, y, width, height, size) for x, y in corners]
    free = (place for place in places if not any(are_overlapping(place, other) for other in taken))
    return next(free, places[0])


def _inside(x: int, y: int, width: int, height: int, size: tuple[int, int]) -> Box:
    x = max(0, min(x, size[0] - width))
    y = max(0, min(y, size[1] - height))
    return x, y, x + width, y + height


def are_overlapping(first: Box, second: Box) -> bool:
    """Whether two boxes have area in common."""
    across = first[0] < second[2] and second[0] < first[2]
    return across and first[1] < second[3] and second[1] < first[3]


def readable_on(colour: Colour) -> Colour:
    """Black or white, by the brightness that the eye sees (Rec. 601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else (255, 255, 255)


def _edges(segments: Int16[np.ndarray, "height width"]) -> np.ndarray:
    """True where the pixel to the right or below belongs to another segment."""
    edges = np.zeros(segments.shape, bool)
    edges[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    edges[:-1] |= segments[:-1] != segments[1:]
    return edges


def _titled(tile: Tile, width: int) -> Image.Image:
    height = max(1, round(tile.picture.height * width / tile.picture.width))
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + height), BACKGROUND)
    font = caption_font(13)
    title = tile.title
    while title and font.getlength(title) > width:
        title = title[:-1]
    ImageDraw.Draw(sheet).text((0, 1), title, fill=INK, font=font)
    fitting = tile.picture.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(fitting, (0, TITLE_HEIGHT))
    return sheet


@lru_cache
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """The letters of captions, `size` pixels high."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
