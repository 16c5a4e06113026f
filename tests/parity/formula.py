"""The tensors of a parity case, made from names: weights, pictures and targets need no files.

A name's CRC-32 seeds a NumPy generator; the values were fixed when the reference ran and must never
change.
"""

import fnmatch
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Array = np.ndarray
Change = float | Mapping[str, float]

_FIELD_CELLS = 8


def weights(manifest: Path, changes: Mapping[str, Change]) -> dict[str, Array]:
    """Every float tensor of a manifest by key; `changes` go to those whose key ends so."""
    entries = json.loads(manifest.read_text())
    made = {
        key: _changed(key, weight(key, tuple(entry["shape"])), changes)
        for key, entry in entries.items()
        if entry["dtype"].startswith("float") and not entry.get("alias_of")
    }
    twins = {
        key: made[entry["alias_of"]]
        for key, entry in entries.items()
        if entry.get("alias_of") in made
    }
    return made | twins


def weight(key: str, shape: tuple[int, ...]) -> Array:
    """The value of a parameter or buffer; its shape and the end of its key tell its kind."""
    draw = _normal(key, shape)
    tenth = np.float32(0.1)
    if key.endswith("running_var"):
        return np.asarray(1 + tenth * np.abs(draw))
    if key.endswith("running_mean"):
        return tenth * draw
    if len(shape) > 1:
        fan_in = math.prod(shape[1:])
        return draw / np.float32(math.sqrt(fan_in))
    return 1 + tenth * draw if key.endswith("weight") else tenth * draw


def picture(name: str, height: int, width: int) -> Array:
    """A smooth picture, [3, height, width]: bilinear between 8 x 8 normal values per channel."""
    field = _normal(name, (3, _FIELD_CELLS, _FIELD_CELLS))
    top, bottom, down = _neighbours(height)
    left, right, across = _neighbours(width)
    down, across = down[None, :, None], across[None, None, :]
    upper = field[:, top][:, :, left] * (1 - across) + field[:, top][:, :, right] * across
    lower = field[:, bottom][:, :, left] * (1 - across) + field[:, bottom][:, :, right] * across
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)


def targets(name: str, count: int, num_classes: int) -> tuple[Array, Array]:
    """`count` boxes (cx, cy, w, h inside the unit square) and their labels."""
    rng = _generator(name)
    size = rng.uniform(0.1, 0.6, (count, 2)).astype(np.float32)
    offset = rng.uniform(0, 1, (count, 2)).astype(np.float32)
    centre = (size / 2 + offset * (1 - size)).astype(np.float32)
    labels = rng.integers(0, num_classes, count, dtype=np.int64)
    return np.concatenate((centre, size), axis=1), labels


def keep(name: str, shape: tuple[int, ...], ratio: float) -> Array:
    """True where a query keeps the feature of its patch."""
    return _generator(name).random(shape) > ratio


def _changed(key: str, value: Array, changes: Mapping[str, Change]) -> Array:
    for pattern, change in changes.items():
        if fnmatch.fnmatchcase(key, f"*{pattern}"):
            scale, shift = (
                (change["scale"], change["shift"]) if isinstance(change, Mapping) else (change, 0)
            )
            value = np.float32(scale) * value + np.float32(shift)
    return value


def _neighbours(length: int) -> tuple[Array, Array, Array]:
    """For each pixel of a side: the cell before it, the one after it, and how far between."""
    place = np.linspace(0, _FIELD_CELLS - 1, length, dtype=np.float32)
    before = np.minimum(place.astype(np.int64), _FIELD_CELLS - 2)
    return before, before + 1, place - before


def _normal(name: str, shape: tuple[int, ...]) -> Array:
    return _generator(name).standard_normal(shape, dtype=np.float32)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
