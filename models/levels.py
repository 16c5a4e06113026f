"""Feature maps of several strides as one row of tokens (Deformable DETR, section 4.1, A.2).

Each level of the backbone is projected by a 1x1 convolution and group normalisation; further levels
come from 3x3 convolutions of stride 2, the first on the backbone's last map itself. A learned
vector per level is added to the positions, since equal places of two levels have equal codes.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.backbone import feature_padding

_GROUPS = 32


class InputLevel(nn.Module):
    """One level: a convolution to the transformer's channels and group normalisation."""

    def __init__(self, channels: int, dim: int, *, halves: bool = False) -> None:
        super().__init__()
        kernel, stride, margin = (3, 2, 1) if halves else (1, 1, 0)
        self.convolution = nn.Conv2d(channels, dim, kernel, stride=stride, padding=margin)
        # Two channels a group at the least: a map of one cell still has something to compare.
        self.norm = nn.GroupNorm(math.gcd(_GROUPS, dim // 2), dim)

    def forward(
        self, features: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch dim _ _"]:
        """The level's map."""
        convolved = self.convolution(features.to(self.convolution.weight.dtype))
        projected: Tensor = self.norm(convolved)
        return projected


def input_levels(channels: tuple[int, ...], dim: int, num_levels: int) -> nn.ModuleList:
    """The projections of maps of these channels, and those of the levels beyond them."""
    levels = [InputLevel(depth, dim) for depth in channels]
    for level in range(len(channels), num_levels):
        depth = channels[-1] if level == len(channels) else dim
        levels.append(InputLevel(depth, dim, halves=True))
    return nn.ModuleList(levels)


def project_levels(
    levels: nn.ModuleList, features: tuple[Float[Tensor, "batch _ _ _"], ...]
) -> tuple[Float[Tensor, "batch dim _ _"], ...]:
    """The maps of all levels, finest first."""
    given = len(features)
    maps = [level(one) for level, one in zip(levels[:given], features, strict=True)]
    source = features[-1]
    for level in levels[given:]:
        maps.append(level(source))
        source = maps[-1]
    return tuple(maps)


def level_paddings(
    padding: Bool[Tensor, "batch height width"], maps: tuple[Float[Tensor, "batch _ _ _"], ...]
) -> tuple[Bool[Tensor, "batch _ _"], ...]:
    """The padding mask at the size of each map."""
    return tuple(feature_padding(padding, *one.shape[-2:]) for one in maps)


def valid_ratios(
    paddings: tuple[Bool[Tensor, "batch _ _"], ...],
) -> Float[Tensor, "batch levels 2"]:
    """Share of each level's rows and columns that is not padding; one cell at the least."""
    ratios = []
    for padding in paddings:
        valid = ~padding
        rows = valid[:, :, 0].float().mean(1).clamp(min=1 / padding.shape[1])
        columns = valid[:, 0, :].float().mean(1).clamp(min=1 / padding.shape[2])
        ratios.append(torch.stack((rows, columns), dim=-1))
    return torch.stack(ratios, dim=1)
