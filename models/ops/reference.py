"""Multi-scale deformable attention in plain PyTorch: what the kernels must compute.

Deformable DETR (Zhu et al., ICLR 2021), section 4.1, equation 3, without the projections. A level
of H x W cells spans [0, 1] x [0, 1]; the centre of the cell in row i, column j is at
((j + 0.5) / W, (i + 0.5) / H). Samples are bilinear; corners outside a level count as zeros, and a
location that is not finite samples nothing. Everything is computed in float32 (float64 for float64
values): `grid_sample` in half precision reads out of bounds on the CPU (torch 2.11 to 2.15).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_FAR = 10.0
"""In sizes of a level: far enough outside that no corner lies inside."""


def deformable_attention(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """Each query's weighted samples of its locations (x, y), head after head, in value's dtype."""
    precise = torch.promote_types(value.dtype, torch.float32)
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sizes = [rows * columns for rows, columns in spatial_shapes]
    maps = torch.split(value.to(precise), sizes, dim=1)
    where = locations.to(precise).nan_to_num(nan=-_FAR).clamp(-_FAR, _FAR)
    grid = (2 * where - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    # batch * heads, levels, queries, points
    share = weights.to(precise).permute(0, 2, 3, 1, 4).flatten(0, 1)
    out = value.new_zeros((batch * heads, channels, queries), dtype=precise)
    for level, (rows, columns) in enumerate(spatial_shapes):
        if rows * columns * points * queries == 0:
            continue
        plane = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, rows, columns)
        sampled = F.grid_sample(plane, grid[level], padding_mode="zeros", align_corners=False)
        out = out + (sampled * share[:, level, None]).sum(-1)
    return out.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


def fused_deformable_attention(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    references: Float[Tensor, "batch queries levels coordinates"],
    offsets: Float[Tensor, "batch queries heads levels points 2"],
    logits: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """The same from reference points, raw offsets and logits, as `locations_and_weights` says."""
    locations, weights = locations_and_weights(spatial_shapes, references, offsets, logits)
    return deformable_attention(value, spatial_shapes, locations, weights)


def locations_and_weights(
    spatial_shapes: Sequence[tuple[int, int]],
    references: Float[Tensor, "batch queries levels coordinates"],
    offsets: Float[Tensor, "batch queries heads levels points 2"],
    logits: Float[Tensor, "batch queries heads levels points"],
) -> tuple[
    Float[Tensor, "batch queries heads levels points 2"],
    Float[Tensor, "batch queries heads levels points"],
]:
    """Where a query samples, and how much each sample counts; float32 at least.

    A reference point (x, y) is moved by offsets in cells of each level, a reference box
    (cx, cy, w, h) by offsets of which `points` reach from its centre to its edge. The softmax goes
    over the levels and points of a head.
    """
    precise = torch.promote_types(references.dtype, torch.float32)
    references, offsets = references.to(precise), offsets.to(precise)
    centre = references[:, :, None, :, None, :2]
    if references.shape[-1] == 4:
        half_size = 0.5 * references[:, :, None, :, None, 2:]
        locations = centre + offsets / offsets.shape[4] * half_size
    else:
        # No tensor of numbers: while exporting, sizes are symbols that it would turn into numbers.
        sizes = [
            offsets.new_full((), max(length, 1))
            for rows, columns in spatial_shapes
            for length in (columns, rows)
        ]
        locations = centre + offsets / torch.stack(sizes).view(-1, 1, 2)
    weights = logits.to(precise).flatten(3).softmax(-1).view(logits.shape)
    return locations, weights
