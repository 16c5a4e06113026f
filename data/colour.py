"""Colour changes of query patches: half-strength SimCLR (UP-DETR, datasets/selfdet.py).

Jitter of brightness, contrast, saturation and hue in random order, greyscale, blur; each patch has
its own draws. The draws are data (`ColourDraws`), made apart from the operators, so that the same
patch may be changed here on the CPU (OpenCV, Pillow's semantics) or on the training device
(`data.device_colour`).
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Self

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from pydantic import Field, model_validator

from models.settings import Settings

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The four steps of the jitter, as they stand in `ColourDraws.order`."""

ORDERS: Int64[np.ndarray, "24 4"] = np.array(list(permutations(range(4))), np.int64)
"""Every order of the four steps; `pack_draws` stores an order as its row here."""

DRAW_COLUMNS = 8
"""Numbers per patch in a packed array of draws."""


Share = Annotated[float, Field(ge=0, le=1)]


class ColourSettings(Settings):
    """How strongly and how often a patch's colours change; the defaults are the reference's."""

    jitter_probability: Share = 0.8
    """Share of patches whose brightness, contrast, saturation and hue change."""
    brightness: Share = 0.4
    """Factors are drawn from 1 - brightness to 1 + brightness."""
    contrast: Share = 0.4
    """Factors are drawn from 1 - contrast to 1 + contrast."""
    saturation: Share = 0.4
    """Factors are drawn from 1 - saturation to 1 + saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest turn of the hue in either direction, in turns of the colour circle."""
    grey_probability: Share = 0.2
    """Share of patches that lose their colour."""
    blur_probability: Share = 0.5
    """Share of patches that are blurred."""
    min_blur_sigma: Annotated[float, Field(gt=0)] = 0.1
    """Smallest standard deviation of the blur, in pixels of the resized patch."""
    max_blur_sigma: Annotated[float, Field(le=2.5)] = 2.0
    """Largest standard deviation of the blur, in pixels of the resized patch."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_blur_sigma > self.max_blur_sigma:
            raise ValueError(
                f"min_blur_sigma={self.min_blur_sigma} is above "
                f"max_blur_sigma={self.max_blur_sigma}; swap them"
            )
        return self


@dataclass(frozen=True)
class ColourDraws:
    """What happens to the colours of each of one picture's patches."""

    jitter: Bool[np.ndarray, " patches"]
    """False where the four jitter steps are left out."""
    order: Int64[np.ndarray, "patches 4"]
    """The jitter steps, first to last."""
    factors: Float32[np.ndarray, "patches 3"]
    """Factors of brightness, contrast and saturation; 1 changes nothing."""
    hue: Float32[np.ndarray, " patches"]
    """Turn of the hue, in turns of the colour circle."""
    grey: Bool[np.ndarray, " patches"]
    blur_sigma: Float32[np.ndarray, " patches"]
    """Standard deviation of the blur in pixels; 0 where there is none."""


def draw_colours(
    settings: ColourSettings, num_patches: int, generator: np.random.Generator
) -> ColourDraws:
    """Independent draws per patch, distributed as in torchvision's ColorJitter and RandomApply.

    Takes 9 uniform numbers per patch from the generator, whatever the settings.
    """
    uniform = generator.random((num_patches, 9))
    strengths = np.array([settings.brightness, settings.contrast, settings.saturation])
    sigma_range = settings.max_blur_sigma - settings.min_blur_sigma
    sigma = settings.min_blur_sigma + sigma_range * uniform[:, 8]
    return ColourDraws(
        jitter=uniform[:, 0] < settings.jitter_probability,
        order=ORDERS[(uniform[:, 1] * len(ORDERS)).astype(np.int64)],
        factors=(1 + strengths * (2 * uniform[:, 2:5] - 1)).astype(np.float32),
        hue=(settings.hue * (2 * uniform[:, 5] - 1)).astype(np.float32),
        grey=uniform[:, 6] < settings.grey_probability,
        blur_sigma=np.where(uniform[:, 7] < settings.blur_probability, sigma, 0).astype(np.float32),
    )


def pack_draws(draws: ColourDraws) -> Float32[np.ndarray, "patches 8"]:
    """The draws as one small array for the training device; `unpack_draws` gives them back."""
    code = (draws.order[:, None] == ORDERS).all(axis=2).argmax(axis=1)
    columns = (draws.jitter, code, *draws.factors.T, draws.hue, draws.grey, draws.blur_sigma)
    return np.stack(columns, axis=1).astype(np.float32)


def unpack_draws(packed: Float32[np.ndarray, "patches 8"]) -> ColourDraws:
    """What `pack_draws` packed."""
    return ColourDraws(
        jitter=packed[:, 0] > 0,
        order=ORDERS[packed[:, 1].astype(np.int64)],
        factors=packed[:, 2:5],
        hue=packed[:, 5],
        grey=packed[:, 6] > 0,
        blur_sigma=packed[:, 7],
    )


def colour_patches(
    patches: UInt8[np.ndarray, "patches side side 3"], draws: ColourDraws
) -> UInt8[np.ndarray, "patches side side 3"]:
    """Each patch changed by its own draws, with Pillow's semantics."""
    changed = np.empty_like(patches)
    for number, patch in enumerate(patches):
        changed[number] = patch
    return changed
