"""Pictures for people: query patches with what the model finds."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

MARGIN = 12
STRIP_GAP = 4
TEXT_HEIGHT = 18
BACKGROUND = (250, 250, 248)
INK = (40, 40, 40)


@dataclass(frozen=True)
class Tile:
    """One picture, the query patches cut from it, and what the model found for each."""

    title: str
    picture: UInt8[np.ndarray, "height width 3"]
    patches: UInt8[np.ndarray, "patches side side 3"]
    boxes_xyxy: Float[np.ndarray, "patches 4"]
    """Where each patch was cut, in pixels."""
    found_xyxy: Float[np.ndarray, "patches 4"] | None = None
    """Where the model finds each patch, in pixels."""


def draw_grid(tiles: Sequence[Tile], columns: int = 3, width: int = 420) -> Image.Image:
    """The tiles in columns: boxes of patches solid, what was found dashed in the same colour."""
    bottoms = [MARGIN] * min(columns, len(tiles))
    places: list[tuple[Image.Image, int, int]] = []
    for tile in tiles:
        drawn = _draw_tile(tile, width)
        column = bottoms.index(min(bottoms))
        places.append((drawn, MARGIN + column * (width + MARGIN), bottoms[column]))
        bottoms[column] += drawn.height + MARGIN
    sheet = Image.new("RGB", (MARGIN + len(bottoms) * (width + MARGIN), max(bottoms)), BACKGROUND)
    for drawn, left, top in places:
        sheet.paste(drawn, (left, top))
    return sheet


def _draw_tile(tile: Tile, width: int) -> Image.Image:
    scale = width / tile.picture.shape[1]
    picture = Image.fromarray(tile.picture).resize(
        (width, max(1, round(tile.picture.shape[0] * scale))), Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(picture)
    for number, box in enumerate(tile.boxes_xyxy * scale):
        draw.rectangle([float(value) for value in box], outline=_colour(number, tile), width=2)
        if tile.found_xyxy is not None:
            _dashed_rectangle(draw, tile.found_xyxy[number] * scale, _colour(number, tile))
    strip = _draw_strip(tile, width)
    sheet = Image.new(
        "RGB", (width, TEXT_HEIGHT + picture.height + STRIP_GAP + strip.height), BACKGROUND
    )
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(sheet).text((0, 1), tile.title[:64], fill=INK, font=font)
    sheet.paste(picture, (0, TEXT_HEIGHT))
    sheet.paste(strip, (0, TEXT_HEIGHT + picture.height + STRIP_GAP))
    return sheet


def _draw_strip(tile: Tile, width: int) -> Image.Image:
    """The patches themselves, each framed in the colour of its box."""
    per_row = min(len(tile.patches), 10)
    rows = -(-len(tile.patches) // per_row)
    side = (width - STRIP_GAP * (per_row - 1)) // per_row
    side = min(side, 80)
    strip = Image.new("RGB", (width, rows * (side + STRIP_GAP)), BACKGROUND)
    for number, patch in enumerate(tile.patches):
        small = Image.fromarray(patch).resize((side, side), Image.Resampling.BILINEAR)
        outline = [0, 0, side - 1, side - 1]
        ImageDraw.Draw(small).rectangle(outline, outline=_colour(number, tile), width=2)
        row, column = divmod(number, per_row)
        strip.paste(small, (column * (side + STRIP_GAP), row * (side + STRIP_GAP)))
    return strip


def _colour(number: int, tile: Tile) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number / max(1, len(tile.patches)), 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _dashed_rectangle(
    draw: ImageDraw.ImageDraw, box: Float[np.ndarray, " 4"], colour: tuple[int, int, int]
) -> None:
    left, top, right, bottom = (float(value) for value in box)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    for (x0, y0), (x1, y1) in pairwise(corners):
        length = max(abs(x1 - x0), abs(y1 - y0))
        for dash in np.arange(0, length, 10):
            begin, end = dash / length, min(1.0, (dash + 5) / length)
            ends = [
                (x0 + (x1 - x0) * begin, y0 + (y1 - y0) * begin),
                (x0 + (x1 - x0) * end, y0 + (y1 - y0) * end),
            ]
            draw.line(ends, fill=colour, width=2)
