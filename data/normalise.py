"""Pictures of a packed batch on the training device: normalised by ImageNet's mean and deviation.

Pictures travel as bytes, height x width x 3: a quarter of their size as floats, and channels-last
for the network without a copy.
"""

from functools import lru_cache

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from models.structures import Images, padding_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalised_images(
    pictures: UInt8[Tensor, "batch height width 3"], sizes: Int64[Tensor, "batch 2"]
) -> Images:
    """Pictures padded at the bottom and the right, normalised; padding is 0 after it.

    `sizes` are (height, width) before padding. Pixels come out channels-last.
    """
    padding = padding_of(sizes, pictures.shape[1], pictures.shape[2])
    pixels = normalised(pictures.permute(0, 3, 1, 2).to(torch.float32))
    pixels.masked_fill_(padding[:, None], 0.0)
    return Images(pixels, padding, sizes)


def normalised(
    levels: Float32[Tensor, "batch 3 height width"],
) -> Float32[Tensor, "batch 3 height width"]:
    """Levels 0..255 in place to ImageNet's mean 0 and deviation 1, by the reference's own steps."""
    mean, std = _mean_and_std(levels.device)
    return levels.div_(255).sub_(mean).div_(std)


@lru_cache
def _mean_and_std(
    device: torch.device,
) -> tuple[Float32[Tensor, "3 1 1"], Float32[Tensor, "3 1 1"]]:
    """Made once per device: making them there anew would wait for the device each time."""
    mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
    return mean, torch.tensor(IMAGENET_STD, device=device)[:, None, None]
