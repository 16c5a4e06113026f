"""Deformable attention in plain gathers, for runtimes that know no operator of ours (ONNX).

The same numbers as `models.ops.reference`, without `grid_sample`, whose ONNX form some runtimes
lack or compute otherwise. Every size may be unknown while exporting.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from models.ops.reference import locations_and_weights

_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(row, column) from the first cell of a sample."""
_FAR = 10.0
"""In sizes of a level: farther than any corner that counts."""


def deformable_attention(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """Each query's weighted samples of its locations (x, y), head after head, in value's dtype."""
    precise = torch.promote_types(value.dtype, torch.float32)
    batch, _, heads, channels = value.shape
    # One row for each image, head and token.
    table = value.to(precise).transpose(1, 2)
    images = torch.arange(batch, device=value.device)[:, None, None, None] * heads
    head = torch.arange(heads, device=value.device)[:, None]
    slab = images + head  # batch 1 heads 1
    out = value.new_zeros((batch, locations.shape[1], heads, channels), dtype=precise)
    first = 0
    for level, (rows, columns) in enumerate(spatial_shapes):
        rows_of_level = table[:, :, first : first + rows * columns].reshape(-1, channels)
        cells, shares = _corners(rows, columns, locations[:, :, :, level].to(precise))
        shares = shares * weights[:, :, :, level, :, None].to(precise)
        places = (slab * (rows * columns)).unsqueeze(-1) + cells
        sampled = rows_of_level[places.flatten()].view(*places.shape, channels)
        out = out + (sampled * shares[..., None]).sum((3, 4))
        first += rows * columns
    return out.flatten(2).to(value.dtype)


def fused_deformable_attention(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    references: Float[Tensor, "batch queries levels coordinates"],
    offsets: Float[Tensor, "batch queries heads levels points 2"],
    logits: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """The same from reference points, raw offsets and logits."""
    locations, weights = locations_and_weights(spatial_shapes, references, offsets, logits)
    return deformable_attention(value, spatial_shapes, locations, weights)


def _corners(
    rows: int, columns: int, where: Float[Tensor, "batch queries heads points 2"]
) -> tuple[Tensor, Tensor]:
    """The cells of the four corners of each sample, and their shares, 0 outside of the level."""
    where = torch.where(where.isnan(), torch.full_like(where, -_FAR), where).clamp(-_FAR, _FAR)
    x, y = where[..., 0] * columns - 0.5, where[..., 1] * rows - 0.5
    left, top = x.floor(), y.floor()
    cells, shares = [], []
    for down, right in _CORNERS:
        row, column = top + down, left + right
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        shares.append(share * inside)
        cells.append((row * columns + column).long() * inside)
    return torch.stack(cells, -1), torch.stack(shares, -1)
