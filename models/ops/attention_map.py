"""How much deformable attention meets each token (Sparse DETR, section 3.2).

What a sample weighs is split among the four cells around it as the operator mixes their values: the
mass of a token is what its value counts for in the sum of all outputs of all heads. That is the
operator's gradient with respect to a value of one channel, which the kernels have already. Corners
outside of a level, and samples that are no numbers, meet nothing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from models.ops.deformable import value_gradient


@torch.no_grad()
def token_mass(
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "*layers batch queries heads levels points 2"],
    weights: Float[Tensor, "*layers batch queries heads levels points"],
    *,
    legacy_dam: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """Summed over queries and heads, and over layers where there is such an axis; float32 at
    least, levels one after the other, without a graph.

    `legacy_dam` takes a cell's centre for its corner, as the released Sparse DETR does: the map is
    half a cell too far right and down.
    """
    if locations.dim() == 7:
        locations, weights = (each.transpose(0, 1).flatten(1, 2) for each in (locations, weights))
    batch = len(locations)
    precise = torch.promote_types(weights.dtype, torch.float32)
    if legacy_dam:
        sizes = [(max(columns, 1), max(rows, 1)) for rows, columns in spatial_shapes]
        locations = locations + 0.5 / locations.new_tensor(sizes)[:, None]
    # A head of a query is as good as another query: all share the one channel.
    where, share = (each.flatten(1, 2).unsqueeze(2).to(precise) for each in (locations, weights))
    tokens = sum(rows * columns for rows, columns in spatial_shapes)
    value = share.new_zeros((batch, tokens, 1, 1))
    grad = share.new_ones((batch, where.shape[1], 1))
    return value_gradient(grad, value, spatial_shapes, where, share)[..., 0, 0]
