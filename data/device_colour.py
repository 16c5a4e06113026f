"""Colour changes of query patches on the training device: `data.colour`, batched.

Every patch has its own draws and its own order of steps, and Pillow's 8-bit arithmetic is followed
step by step. Who gets which step is decided on the CPU from the draws, so that the device is never
waited for: a blend at each of the four slots for all patches, and a turn of the hue, the loss of
colour and the blur for those that have it.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from data.colour import BLUR_TAPS, JitterStep, blur_kernels, hue_shift, unpack_draws


def colour_on_device(
    patches: UInt8[Tensor, "patches 3 side side"], draws: Float32[Tensor, "patches 8"]
) -> Float32[Tensor, "patches 3 side side"]:
    """Each patch changed by its own draws, in levels 0..255, not yet normalised.

    `patches` lie on the device in any memory layout; `draws` (`data.colour.pack_draws`, one row
    per patch) lie on the CPU.
    """
    plan = unpack_draws(draws.numpy())
    levels = patches.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for slot in range(4):
        steps = plan.order[:, slot]
        levels = _blend(levels, steps, _factors(plan.factors, steps, plan.jitter))
        _turn_hue(levels, plan.jitter & (steps == JitterStep.HUE), plan.hue)
    _lose_colour(levels, plan.grey)
    _blur(levels, plan.blur_sigma)
    return levels


def _factors(
    factors: Float32[np.ndarray, "patches 3"],
    steps: Int64[np.ndarray, " patches"],
    jitter: Bool[np.ndarray, " patches"],
) -> Float32[np.ndarray, " patches"]:
    """Each patch's factor for its step at a slot; 1, which changes nothing, for other steps."""
    own = np.take_along_axis(factors, np.minimum(steps, 2)[:, None], axis=1)[:, 0]
    return np.where(jitter & (steps != JitterStep.HUE), own, np.float32(1))


def _blend(
    levels: Float32[Tensor, "patches 3 side side"],
    steps: Int64[np.ndarray, " patches"],
    factors: Float32[np.ndarray, " patches"],
) -> Float32[Tensor, "patches 3 side side"]:
    """Away from, or towards, black (brightness), mean grey (contrast), own grey (saturation)."""
    luma = _luma(levels)
    mean = (luma.mean(dim=(2, 3), keepdim=True) + 0.5).floor()
    to_mean = _beside(levels, steps == JitterStep.CONTRAST)
    to_own = _beside(levels, steps == JitterStep.SATURATION)
    grey = torch.where(to_mean, mean, torch.where(to_own, luma, 0))
    return (grey + (levels - grey) * _beside(levels, factors)).clamp_(0, 255).floor_()


def _turn_hue(
    levels: Float32[Tensor, "patches 3 side side"],
    turned: Bool[np.ndarray, " patches"],
    hue: Float32[np.ndarray, " patches"],
) -> None:
    """In place, for the turned patches: to Pillow's 8-bit HSV, another hue, and back."""
    where = _places(levels, turned)
    shift = np.array([hue_shift(turn) for turn in hue[turned].tolist()], np.float32)
    chosen = levels[where]
    red, green, blue = chosen[:, 0:1], chosen[:, 1:2], chosen[:, 2:3]
    top, low = chosen.amax(1, keepdim=True), chosen.amin(1, keepdim=True)
    spread = (top - low).clamp_(min=1)  # at least 1 wherever the hue means anything
    from_green = torch.where(green == top, 2 + (blue - red) / spread, 4 + (red - green) / spread)
    sector = torch.where(red == top, (green - blue) / spread, from_green)
    angle = ((sector / 6 + 1).frac_() * 255).floor_()
    saturation = ((top - low) / top.clamp(min=1) * 255).floor_()
    sector = (angle + _beside(levels, shift)).remainder_(256) * (6 / 255)
    channels = torch.arange(5, 0, -2, device=levels.device)[:, None, None]
    position = (channels + sector).remainder_(6)
    share = torch.minimum(position, 4 - position).clamp_(0, 1)
    levels.index_copy_(0, where, (top - top * saturation / 255 * share).round_())


def _lose_colour(
    levels: Float32[Tensor, "patches 3 side side"], grey: Bool[np.ndarray, " patches"]
) -> None:
    """In place, for the grey patches."""
    where = _places(levels, grey)
    chosen = levels[where]
    levels.index_copy_(0, where, _luma(chosen).expand_as(chosen))


def _blur(
    levels: Float32[Tensor, "patches 3 side side"], sigma: Float32[np.ndarray, " patches"]
) -> None:
    """In place, for the patches with a blur: rows, then columns, the edge repeated outwards."""
    blurred = sigma > 0
    if not blurred.any():
        return  # no convolution has 0 groups
    where = _places(levels, blurred)
    planes = levels[where].flatten(0, 1)[None]
    kernels = torch.from_numpy(blur_kernels(sigma[blurred])).to(levels.device, non_blocking=True)
    taps = kernels.repeat_interleave(3, dim=0)[:, None, None, :]
    with torch.autocast(levels.device.type, enabled=False):
        padded = F.pad(planes, [BLUR_TAPS // 2] * 4, mode="replicate")
        rows = F.conv2d(padded, taps, groups=len(taps))
        planes = F.conv2d(rows, taps.transpose(2, 3), groups=len(taps))
    levels.index_copy_(0, where, planes[0].round_().view(-1, *levels.shape[1:]))


def _luma(levels: Float32[Tensor, "patches 3 side side"]) -> Float32[Tensor, "patches 1 side side"]:
    """Pillow's "L" of whole levels; the sum stays below 2^24, so float32 is exact."""
    red, green, blue = levels[:, 0:1], levels[:, 1:2], levels[:, 2:3]
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_()


def _beside(
    levels: Float32[Tensor, "_ 3 _ _"], values: Shaped[np.ndarray, " patches"]
) -> Shaped[Tensor, "patches 1 1 1"]:
    """One value per patch, on the device of the levels."""
    return torch.from_numpy(values)[:, None, None, None].to(levels.device, non_blocking=True)


def _places(
    levels: Float32[Tensor, "_ 3 _ _"], chosen: Bool[np.ndarray, " patches"]
) -> Int64[Tensor, " chosen"]:
    """The numbers of the chosen patches, on the device of the levels."""
    return torch.from_numpy(np.flatnonzero(chosen)).to(levels.device, non_blocking=True)
