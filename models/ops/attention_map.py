"""How much deformable attention meets each token (Sparse DETR, section 3.2).

What a sample weighs is split among the four cells around it as the operator mixes their values. So
the mass of a token is the gradient of the sum of all outputs with respect to its value, where the
values have one channel: the operator's own backward computes it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from models.ops.deformable import value_gradient


@torch.no_grad()
def token_mass(
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
    *,
    legacy_dam: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """Summed over queries and heads, levels one after the other; float32 and without a graph.

    Samples outside of a level, and such as are no numbers, meet nothing. `legacy_dam` takes a
    cell's centre for its corner, as the released Sparse DETR does: the map is half a cell too far
    right and down.
    """
    batch = len(locations)
    where = locations.float().flatten(1, 2)[:, :, None]
    if legacy_dam:
        halves = [(0.5 / max(columns, 1), 0.5 / max(rows, 1)) for rows, columns in spatial_shapes]
        where = where + where.new_tensor(halves)[:, None, :]
    share = weights.float().flatten(1, 2)[:, :, None]
    num_tokens = sum(rows * columns for rows, columns in spatial_shapes)
    one_channel = where.new_zeros(batch, num_tokens, 1, 1)
    ones = where.new_ones(batch, where.shape[1], 1)
    return value_gradient(ones, one_channel, spatial_shapes, where, share).flatten(1)
