"""Colour changes of query patches: half-strength SimCLR (UP-DETR, datasets/selfdet.py).

Jitter of brightness, contrast, saturation and hue in random order, greyscale, blur; each patch has
its own draws. The draws are data (`ColourDraws`), made apart from the operators, so that the same
patch may be changed here on the CPU (OpenCV, Pillow's semantics) or on the training device
(`data.device_colour`). Ten patches of 128 pixels cost 1.3 ms CPU here, 17 ms with Pillow and
torchvision (measured).
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import permutations
from typing import Annotated, Self, assert_never

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from pydantic import Field, model_validator

from models.settings import Settings


class JitterStep(IntEnum):
    """The four steps of the jitter, as they stand in `ColourDraws.order`."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


ORDERS: Int64[np.ndarray, "24 4"] = np.array(list(permutations(JitterStep)), np.int64)
"""Every order of the four steps; `pack_draws` stores an order as its row here."""

DRAW_COLUMNS = 8
"""Numbers per patch in a packed array of draws."""

BLUR_TAPS = 13
"""Length of the longest blur kernel, up to a standard deviation of 2.4 pixels."""

_COSINES = np.cos(2 * np.pi / BLUR_TAPS * np.outer(*[np.arange(BLUR_TAPS) - BLUR_TAPS // 2] * 2))

_NO_TAP = 1e-9
"""Below this a tap of a blur kernel is what rounding left of 0."""

# cv2 rounds where Pillow cuts off: less than a half, so that whole numbers stay what they are.
_CUT_OFF = -0.4995


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
    max_blur_sigma: Annotated[float, Field(le=2.4)] = 2.0
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
    """Each patch changed by its own draws: jitter, grey, blur, as Pillow does them."""
    changed = np.empty_like(patches)
    kernels = blur_kernels(draws.blur_sigma)
    for number, patch in enumerate(patches):
        if draws.jitter[number]:
            patch = _jitter(patch, draws, number)
        if draws.grey[number]:
            patch = to_grey(patch)
        if draws.blur_sigma[number] > 0:
            patch = blur(patch, kernels[number])
        changed[number] = patch
    return changed


def change_brightness(
    patch: UInt8[np.ndarray, "side side 3"], factor: float
) -> UInt8[np.ndarray, "side side 3"]:
    """Pillow's ImageEnhance.Brightness, to the level."""
    return _away_from_level(patch, 0, factor)


def change_contrast(
    patch: UInt8[np.ndarray, "side side 3"], factor: float
) -> UInt8[np.ndarray, "side side 3"]:
    """Pillow's ImageEnhance.Contrast, within 1 level."""
    mean = cv2.mean(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY))[0]
    return _away_from_level(patch, int(mean + 0.5), factor)


def change_saturation(
    patch: UInt8[np.ndarray, "side side 3"], factor: float
) -> UInt8[np.ndarray, "side side 3"]:
    """Pillow's ImageEnhance.Color, within 1 level."""
    return cv2.addWeighted(patch, factor, to_grey(patch), 1 - factor, _CUT_OFF)


def turn_hue(
    patch: UInt8[np.ndarray, "side side 3"], turn: float
) -> UInt8[np.ndarray, "side side 3"]:
    """torchvision's adjust_hue on Pillow pictures, 0.003 levels off on average (measured).

    Through Pillow's 8-bit HSV, which cuts off where cv2's rounds: cv2's own 8 bits would be 0.24
    levels off at 5/8 of the time (measured).
    """
    to_pillow, from_pillow = _hsv_scales(patch.shape[1])
    floats = cv2.cvtColor(patch.astype(np.float32), cv2.COLOR_RGB2HSV)
    rows = floats.reshape(len(patch), -1)
    rows *= to_pillow
    hsv = rows.astype(np.uint8)
    hsv += np.tile(np.array([hue_shift(turn), 0, 0], np.uint8), patch.shape[1])  # wraps around
    np.multiply(hsv, from_pillow, out=rows)
    return cv2.convertScaleAbs(cv2.cvtColor(floats, cv2.COLOR_HSV2RGB))


def to_grey(patch: UInt8[np.ndarray, "side side 3"]) -> UInt8[np.ndarray, "side side 3"]:
    """Pillow's convert("L") in three channels, within 1 level."""
    return cv2.cvtColor(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(
    patch: UInt8[np.ndarray, "side side 3"], kernel: Float32[np.ndarray, " taps"]
) -> UInt8[np.ndarray, "side side 3"]:
    """Pillow's GaussianBlur, 0.3 levels off on average (measured), most of it at the edges.

    Up to a standard deviation of 1.4 pixels 7 taps hold all of the kernel, at half the cost.
    """
    taps = kernel if kernel[2] > _NO_TAP else kernel[3:-3]
    return cv2.sepFilter2D(patch, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)


def hue_shift(hue: float) -> int:
    """A turn of the colour circle in Pillow's 8-bit hue, cut off towards 0 as by torchvision."""
    return int(hue * 255) % 256


def blur_kernels(
    sigma: Float32[np.ndarray, " patches"],
) -> Float32[np.ndarray, "patches taps"]:
    """Pillow's GaussianBlur as one kernel per patch: a box of fractional width, three times over.

    The box's width is Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended
    box filtering" (SSVM 2011): it has a third of the Gaussian's variance.
    """
    variance = sigma.astype(np.float64) ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) ** 2)
    distance = np.abs(np.arange(BLUR_TAPS) - BLUR_TAPS // 2)
    box = np.clip((whole + part)[:, None] + 1 - distance, 0, 1)
    # A symmetric kernel's Fourier transform is a sum of cosines; its cube is the box three times.
    spectrum = (box @ _COSINES) / box.sum(axis=1, keepdims=True)
    half = np.maximum(spectrum**3 @ _COSINES[:, : BLUR_TAPS // 2 + 1] / BLUR_TAPS, 0)
    return np.concatenate([half, half[:, -2::-1]], axis=1).astype(np.float32)


def _jitter(
    patch: UInt8[np.ndarray, "side side 3"], draws: ColourDraws, number: int
) -> UInt8[np.ndarray, "side side 3"]:
    brightness, contrast, saturation = draws.factors[number].tolist()
    for step in map(JitterStep, draws.order[number].tolist()):
        match step:
            case JitterStep.BRIGHTNESS:
                patch = change_brightness(patch, brightness)
            case JitterStep.CONTRAST:
                patch = change_contrast(patch, contrast)
            case JitterStep.SATURATION:
                patch = change_saturation(patch, saturation)
            case JitterStep.HUE:
                patch = turn_hue(patch, float(draws.hue[number]))
            case _:
                assert_never(step)
    return patch


def _away_from_level(
    patch: UInt8[np.ndarray, "side side 3"], level: int, factor: float
) -> UInt8[np.ndarray, "side side 3"]:
    """Pillow's blend of one grey level with a picture: level + factor * (patch - level)."""
    return cv2.addWeighted(patch, factor, patch, 0, level * (1 - factor) + _CUT_OFF)


@lru_cache
def _hsv_scales(
    width: int,
) -> tuple[Float32[np.ndarray, " _"], Float32[np.ndarray, " _"]]:
    """Factors of a row of HSV: cv2's degrees and shares to Pillow's 0..255, and back.

    Whole rows, because numpy is slow where the last axis is 3 (measured).
    """
    to_pillow = np.tile(np.array([255 / 360, 255, 1], np.float32), width)
    return to_pillow, 1 / to_pillow
