"""Procedural pictures for the demo and for tests: textured things on textured ground, with boxes.

A random patch must be recognisable in its picture, even by the features of an untrained network, so
no area is flat and no two things of a picture look alike: each has its own texture, colours, shape,
size and shading. 5 to 7 ms CPU a picture of about 320 x 240 pixels (measured on a busy machine).
The same (seed, number) gives the same pixels.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never, get_args

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8

from data.randomness import sample_generator
from data.textures import TEXTURES, Texture, lit, painted, smooth_field, tinted

Shape = Literal["ellipse", "box", "star", "ring", "blob", "triangle"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

_SHORT_SIDES = (180, 300)
_MAX_ASPECT = 1.8
_NUM_THINGS = (5, 9)
_HORIZONS = 0.6
# Stripes, checks and spots repeat: two patches of such a ground could not be told apart.
_GROUNDS: tuple[Texture, ...] = ("clouds", "fibres", "cells")
_OUTLINE_POINTS = 48
# Fixed-point bits of OpenCV's polygon corners.
_SHIFT = 4


@dataclass(frozen=True)
class Scene:
    """A picture and the things in it, the front one last."""

    jpeg: bytes
    height: int
    width: int
    boxes_xyxy: Float32[np.ndarray, "things 4"]
    """In pixels, of the whole thing within the picture, the hidden parts included."""
    shapes: tuple[Shape, ...]
    """The class of each thing."""


def draw_scene(seed: int, number: int) -> Scene:
    """Picture `number` of the endless set `seed`."""
    generator = sample_generator(seed, 0, number, "synthetic")
    height, width = _size(generator)
    picture = _ground(height, width, generator)
    order = generator.permutation(len(TEXTURES))
    shapes, boxes = list[Shape](), list[tuple[int, int, int, int]]()
    for thing in range(int(generator.integers(*_NUM_THINGS, endpoint=True))):
        shape = SHAPES[int(generator.integers(len(SHAPES)))]
        texture = TEXTURES[order[thing % len(TEXTURES)]]
        boxes.append(_put_thing(picture, shape, texture, generator))
        shapes.append(shape)
    _add_grain(picture, generator)
    quality = int(generator.integers(85, 95, endpoint=True))
    jpeg: bytes = simplejpeg.encode_jpeg(picture, quality=quality, colorsubsampling="420")
    return Scene(jpeg, height, width, np.array(boxes, dtype=np.float32), tuple(shapes))


def write_scenes(folder: Path, seed: int, count: int) -> None:
    """Write pictures 0 to `count` - 1 of the set `seed` as JPEG files; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"scene_{number:06d}.jpg"
        path.write_bytes(draw_scene(seed, number).jpeg)


def write_labelled_scenes(folder: Path, name: str, seed: int, count: int) -> Path:
    """Write pictures 0 to `count` - 1 of the set `seed` into `folder/name`, with their boxes.

    Returns the COCO json, `folder/annotations/instances_{name}.json`; its classes are `SHAPES`.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = list[dict[str, object]](), list[dict[str, object]]()
    for number in range(count):
        scene = draw_scene(seed, number)
        file_name = f"scene_{number:06d}.jpg"
        (folder / name / file_name).write_bytes(scene.jpeg)
        sizes = {"height": scene.height, "width": scene.width}
        images.append({"id": number + 1, "file_name": file_name, **sizes})
        annotations += _coco_objects(scene, number + 1, len(annotations) + 1)
    categories = [{"id": id, "name": shape} for id, shape in enumerate(SHAPES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    place = folder / "annotations" / f"instances_{name}.json"
    place.write_text(json.dumps(content), encoding="utf-8")
    return place


def _coco_objects(scene: Scene, image_id: int, first_id: int) -> list[dict[str, object]]:
    return [
        {
            "id": id,
            "image_id": image_id,
            "category_id": SHAPES.index(shape) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        for id, (shape, (x0, y0, x1, y1)) in enumerate(
            zip(scene.shapes, scene.boxes_xyxy.tolist(), strict=True), start=first_id
        )
    ]


def _size(generator: np.random.Generator) -> tuple[int, int]:
    """(height, width): landscape twice as often as portrait, as photographs are."""
    short = int(generator.integers(*_SHORT_SIDES, endpoint=True))
    long = int(short * generator.uniform(1, _MAX_ASPECT))
    return (short, long) if generator.random() < 2 / 3 else (long, short)


def _ground(
    height: int, width: int, generator: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """One texture, or two that meet at a wavy horizon, under drifting light."""
    below, above = (_GROUNDS[number] for number in generator.integers(len(_GROUNDS), size=2))
    picture = painted(below, height, width, generator)
    if generator.random() < _HORIZONS:
        sky = painted(above, height, width, generator)
        waves = smooth_field(1, width, 5.0, generator)
        line = (generator.uniform(0.25, 0.75) + 0.15 * waves) * height
        is_sky = np.arange(height, dtype=np.float32)[:, None] < line
        cv2.copyTo(sky, is_sky.astype(np.uint8), picture)
    return tinted(picture, generator)


def _put_thing(
    picture: UInt8[np.ndarray, "height width 3"],
    shape: Shape,
    texture: Texture,
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Paint a thing with its shadow into the picture; its box in pixels (x0, y0, x1, y1)."""
    height, width = picture.shape[:2]
    radius = float(min(height, width) * math.exp(generator.uniform(math.log(0.1), math.log(0.3))))
    centre = generator.uniform(0.08, 0.92, size=2) * (width, height)
    outline = _outline(shape, radius, generator)
    corners = (outline + centre).astype(np.float32)
    low = np.maximum(np.floor(corners.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + 1, (width, height))
    (x0, y0), (x1, y1) = low.tolist(), high.tolist()
    _put_shadow(picture, corners, radius)
    part = picture[y0:y1, x0:x1]
    offset = low.astype(np.float32)
    mask = _mask(corners - offset, y1 - y0, x1 - x0)
    if shape == "ring":
        hole = (outline * generator.uniform(0.4, 0.65) + centre).astype(np.float32)
        mask = cv2.subtract(mask, _mask(hole - offset, y1 - y0, x1 - x0))
    surface = painted(texture, y1 - y0, x1 - x0, generator)
    _blend(part, lit(surface, 0.55, 1.25, generator), mask)
    return x0, y0, x1, y1


def _put_shadow(
    picture: UInt8[np.ndarray, "height width 3"],
    corners: Float32[np.ndarray, "corners 2"],
    radius: float,
) -> None:
    """A soft dark copy, below and to the right: it lifts the thing off a ground like its own."""
    height, width = picture.shape[:2]
    cast = corners + np.float32(0.12 * radius)
    margin = 0.25 * radius
    low = np.clip(np.floor(cast.min(axis=0) - margin).astype(int), 0, (width - 1, height - 1))
    high = np.minimum(np.ceil(cast.max(axis=0) + margin).astype(int) + 1, (width, height))
    (x0, y0), (x1, y1) = low.tolist(), high.tolist()
    mask = _mask(cast - low.astype(np.float32), y1 - y0, x1 - x0)
    mask = cv2.blur(mask, (2 * int(0.12 * radius) + 1,) * 2)
    part = picture[y0:y1, x0:x1]
    light = cv2.convertScaleAbs(mask, alpha=-0.5, beta=255)
    cv2.multiply(part, cv2.merge([light, light, light]), dst=part, scale=1 / 255)


def _outline(
    shape: Shape, radius: float, generator: np.random.Generator
) -> Float32[np.ndarray, "corners 2"]:
    """Corners (x, y) of a shape around 0, turned and stretched at random."""
    angle = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    match shape:
        case "ellipse" | "ring":
            distance = np.ones_like(angle)
        case "box":
            angle = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi
            distance = np.full(4, 1.2)
        case "triangle":
            angle = np.array([0, 2, 4]) / 3 * np.pi
            distance = np.full(3, 1.3)
        case "star":
            points = int(generator.integers(4, 8))
            angle = np.arange(2 * points) * np.pi / points
            distance = np.where(np.arange(2 * points) % 2, generator.uniform(0.4, 0.65), 1.25)
        case "blob":
            waves = generator.uniform(-0.16, 0.16, size=(4, 2))
            distance = 1 + sum(
                waves[k, 0] * np.sin((k + 2) * angle) + waves[k, 1] * np.cos((k + 2) * angle)
                for k in range(4)
            )
        case _:
            assert_never(shape)
    stretch, turn = generator.uniform(0.6, 1), generator.uniform(0, 2 * np.pi)
    x, y = radius * distance * np.cos(angle), radius * distance * np.sin(angle) * stretch
    turned = (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
    return np.stack(turned, axis=1).astype(np.float32)


def _mask(
    corners: Float32[np.ndarray, "corners 2"], height: int, width: int
) -> UInt8[np.ndarray, "height width"]:
    """255 inside the polygon, smooth at its edge."""
    mask = np.zeros((height, width), np.uint8)
    points = np.round(corners * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    return mask


def _blend(
    part: UInt8[np.ndarray, "height width 3"],
    surface: UInt8[np.ndarray, "height width 3"],
    mask: UInt8[np.ndarray, "height width"],
) -> None:
    alpha = cv2.merge([mask, mask, mask])
    front = cv2.multiply(surface, alpha, scale=1 / 255)
    back = cv2.multiply(part, 255 - alpha, scale=1 / 255)
    cv2.add(front, back, dst=part)


def _add_grain(
    picture: UInt8[np.ndarray, "height width 3"], generator: np.random.Generator
) -> None:
    """The noise of a sensor, the same in all channels: up to 7 levels on each pixel."""
    height, width = picture.shape[:2]
    grain = generator.integers(8, size=(height, width), dtype=np.uint8)
    cv2.subtract(picture, cv2.merge([grain, grain, grain]), dst=picture)
