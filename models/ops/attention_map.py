"""How much deformable attention meets each token, in plain PyTorch (Sparse DETR, section 3.2).

What a sample weighs is split among the four cells around it as the operator mixes their values: the
mass of a token is what its value counts for in the sum of all outputs of all heads. Corners outside
of a level, and samples that are no numbers, meet nothing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, column) from the first cell of a sample."""


@torch.no_grad()
def token_mass(
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
    *,
    legacy_dam: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """Summed over queries and heads, levels one after the other; without a graph.

    `legacy_dam` takes a cell's centre for its corner, as the released Sparse DETR does: the map is
    half a cell too far right and down.
    """
    shift = 0.0 if legacy_dam else 0.5
    levels = [
        _level_mass(shape, locations[:, :, :, level], weights[:, :, :, level], shift)
        for level, shape in enumerate(spatial_shapes)
    ]
    return torch.cat(levels, dim=1)


def _level_mass(
    shape: tuple[int, int],
    locations: Float[Tensor, "batch queries heads points 2"],
    weights: Float[Tensor, "batch queries heads points"],
    shift: float,
) -> Float[Tensor, "batch cells"]:
    rows, columns = shape
    batch = len(locations)
    x = (locations[..., 0] * columns - shift).flatten(1)
    y = (locations[..., 1] * rows - shift).flatten(1)
    finite = x.isfinite() & y.isfinite()
    share = weights.flatten(1)
    left, top = x.nan_to_num(-2.0).floor(), y.nan_to_num(-2.0).floor()
    picture = torch.arange(batch, device=x.device)[:, None] * (rows * columns)
    mass = share.new_zeros(batch * rows * columns)
    for down, right in _CORNERS:
        row, column = top + down, left + right
        inside = finite & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        part = (1 - (x - column).abs()) * (1 - (y - row).abs()) * share
        cell = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
        place = (picture + cell.long())[inside]
        mass.index_add_(0, place, part[inside])
    return mass.view(batch, rows * columns)
