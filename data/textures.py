"""Procedural textures: random fields, waves, fibres and cells in three colours, nowhere flat.

Drawn for the pictures of the demo (`data.synthetic`); about 0.8 ms CPU for 300 x 220 pixels.
"""

import colorsys
import math
from typing import Literal, assert_never, get_args

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

Texture = Literal["clouds", "stripes", "checks", "spots", "fibres", "cells"]
TEXTURES: tuple[Texture, ...] = get_args(Texture)

_WAVELENGTHS = (7.0, 26.0)
_CELL_SIZES = (9.0, 24.0)
_LARGE_CELL = 10


def painted(
    texture: Texture, height: int, width: int, generator: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """A texture in three random colours, RGB."""
    values = _values(texture, height, width, generator)
    # Saturates: what is below 0 or above 255 becomes 0 or 255.
    levels = cv2.addWeighted(values, 255, values, 0, 0, dtype=cv2.CV_8U)
    picture: np.ndarray = cv2.LUT(cv2.merge([levels] * 3), _palette(generator)[None])
    return picture


def lit(
    picture: UInt8[np.ndarray, "height width 3"],
    darkest: float,
    brightest: float,
    generator: np.random.Generator,
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture under light that falls off evenly from a random side."""
    height, width = picture.shape[:2]
    angle = generator.uniform(0, 2 * math.pi)
    across = np.linspace(-1, 1, width, dtype=np.float32) * math.cos(angle)
    down = np.linspace(-1, 1, height, dtype=np.float32) * math.sin(angle)
    slope = (across[None] + down[:, None]) / (abs(math.cos(angle)) + abs(math.sin(angle)))
    light = (darkest + brightest) / 2 + (brightest - darkest) / 2 * slope
    bright: np.ndarray = cv2.multiply(picture, cv2.merge([light] * 3), dtype=cv2.CV_8U)
    return bright


def tinted(
    picture: UInt8[np.ndarray, "height width 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture under coloured light that drifts across it, so that no two places are alike."""
    height, width = picture.shape[:2]
    grid = generator.uniform(0.65, 1.3, (3, 3, 1)) * generator.uniform(0.82, 1.18, (3, 3, 3))
    light = cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    bright: np.ndarray = cv2.multiply(picture, light, dtype=cv2.CV_8U)
    return bright


def smooth_field(
    height: int, width: int, cells: float, generator: np.random.Generator
) -> Float32[np.ndarray, "height width"]:
    """Smooth noise between about -1 and 1, with `cells` random values along the longer side."""
    step = max(height, width) / cells
    grid = (math.ceil(height / step) + 1, math.ceil(width / step) + 1)
    values = generator.random(grid, dtype=np.float32) * 2 - 1
    # Small cells look the same with the cheaper interpolation.
    way = cv2.INTER_CUBIC if step > _LARGE_CELL else cv2.INTER_LINEAR
    field: np.ndarray = cv2.resize(values, (width, height), interpolation=way)
    return field


def _values(
    texture: Texture, height: int, width: int, generator: np.random.Generator
) -> Float32[np.ndarray, "height width"]:
    """Values of about 0 to 1, for the palette."""
    values: np.ndarray
    coarse = smooth_field(height, width, generator.uniform(2, 5), generator)
    fine = smooth_field(height, width, max(height, width) / generator.uniform(3, 8), generator)
    match texture:
        case "clouds":
            medium = smooth_field(height, width, 14.0, generator)
            values = 0.5 + 0.35 * coarse + 0.25 * medium + 0.15 * fine
        case "stripes":
            along, _ = _phases(height, width, generator)
            values = 0.5 + 0.35 * np.sin(along + 2 * coarse) + 0.15 * fine
        case "checks":
            along, across = _phases(height, width, generator)
            values = 0.5 + np.clip(4 * np.sin(along) * np.sin(across), -0.3, 0.3) + 0.15 * fine
        case "spots":
            along, across = _phases(height, width, generator)
            dots = np.sin(along + coarse) * np.sin(across + coarse)
            values = 0.35 + np.clip(5 * dots - 1, -0.15, 0.5) + 0.1 * fine
        case "fibres":
            values = 0.5 + 0.3 * _fibres(height, width, generator) + 0.25 * coarse + 0.05 * fine
        case "cells":
            values = _cells(height, width, generator) + 0.1 * fine
        case _:
            assert_never(texture)
    return values


def _palette(generator: np.random.Generator) -> UInt8[np.ndarray, "256 3"]:
    """Dark, middle and light of neighbouring hues; one time in three the light one is opposite."""
    hue = generator.random()
    turn = generator.uniform(-0.12, 0.12)
    contrast = 0.5 if generator.random() < 1 / 3 else 0.0
    strength = generator.uniform(0.15, 0.85)
    colours = [
        colorsys.hsv_to_rgb(hue % 1, strength, generator.uniform(0.1, 0.4)),
        colorsys.hsv_to_rgb((hue + turn) % 1, 0.8 * strength, generator.uniform(0.45, 0.7)),
        colorsys.hsv_to_rgb(
            (hue + 2 * turn + contrast) % 1, 0.6 * strength, generator.uniform(0.8, 1)
        ),
    ]
    if generator.random() < 0.5:
        colours.reverse()
    places = np.linspace(0, 1, 256)
    channels = [np.interp(places, (0, 0.5, 1), channel) for channel in zip(*colours, strict=True)]
    return np.round(np.stack(channels, axis=1) * 255).astype(np.uint8)


def _phases(
    height: int, width: int, generator: np.random.Generator
) -> tuple[Float32[np.ndarray, "height width"], Float32[np.ndarray, "height width"]]:
    """Phases of two waves at right angles, turned at random."""
    angle = generator.uniform(0, math.pi)
    lengths = generator.uniform(*_WAVELENGTHS, size=2)
    return (
        _phase(height, width, angle, lengths[0]),
        _phase(height, width, angle + math.pi / 2, lengths[1]),
    )


def _phase(
    height: int, width: int, angle: float, wavelength: float
) -> Float32[np.ndarray, "height width"]:
    turn = 2 * math.pi / wavelength
    across = np.arange(width, dtype=np.float32) * np.float32(turn * math.cos(angle))
    down = np.arange(height, dtype=np.float32) * np.float32(turn * math.sin(angle))
    return across[None] + down[:, None]


def _fibres(
    height: int, width: int, generator: np.random.Generator
) -> Float32[np.ndarray, "height width"]:
    """Noise drawn out in one direction, as wood, grass or fur."""
    stretch = generator.uniform(8, 30)
    upright = generator.random() < 0.5
    rows = math.ceil(height / (stretch if upright else 2)) + 1
    columns = math.ceil(width / (2 if upright else stretch)) + 1
    noise = generator.random((rows, columns), dtype=np.float32) * 2 - 1
    drawn: np.ndarray = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    return drawn


def _cells(
    height: int, width: int, generator: np.random.Generator
) -> Float32[np.ndarray, "height width"]:
    """Voronoi cells of random levels, each darker towards its middle."""
    size = generator.uniform(*_CELL_SIZES)
    count = max(3, int(height * width / size**2))
    free = np.ones((height, width), np.uint8)
    free[generator.integers(height, size=count), generator.integers(width, size=count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(
        free, cv2.DIST_L2, cv2.DIST_MASK_3, labelType=cv2.DIST_LABEL_PIXEL
    )
    levels = generator.uniform(0.1, 0.9, count + 1).astype(np.float32)
    cells: np.ndarray = levels[labels] + np.float32(0.25 / size) * distance
    return cells
