"""Multi-scale deformable attention with its projections (Deformable DETR, section 4.1, equation 3).

Every query samples a few points per head and level around its reference point, wherever it likes.
The softmax and the sampling are one operator (`models.ops.deformable`); its cost grows with the
queries, not with the tokens, of which only the projection of the values is paid.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.ops.deformable import fused_deformable_attention
from models.ops.reference import locations_and_weights
from models.structures import SampledAttention


class DeformableAttention(nn.Module):
    """Queries sample the values of the memory; the heads share `dim` channels evenly."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def project_values(
        self, tokens: Float[Tensor, "batch tokens dim"], padding: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens heads head_dim"]:
        """What is sampled; zeros on padding, after the projection and its bias."""
        # In place: a copy of all tokens would cost a twentieth of their projection.
        values: Tensor = self.value_proj(tokens).masked_fill_(padding[..., None], 0.0)
        return values.view(*values.shape[:2], self.num_heads, -1)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        references: Float[Tensor, "batch queries levels coordinates"],
        values: Float[Tensor, "batch tokens heads head_dim"],
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Float[Tensor, "batch queries dim"]:
        """The mixtures of the sampled values, projected.

        References are (x, y), or (cx, cy, w, h), normalised to each padded level.
        """
        offsets, logits = self._looks(queries)
        sampled = fused_deformable_attention(values, spatial_shapes, references, offsets, logits)
        projected: Tensor = self.output_proj(sampled)
        return projected

    def looked_at(
        self,
        queries: Float[Tensor, "batch queries dim"],
        references: Float[Tensor, "batch queries levels coordinates"],
        spatial_shapes: tuple[tuple[int, int], ...],
        *,
        keep_graph: bool = False,
    ) -> SampledAttention:
        """Where these queries look, float32; without a graph unless it is asked for."""
        with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()):
            offsets, logits = self._looks(queries)
            looked = locations_and_weights(spatial_shapes, references, offsets, logits)
        return SampledAttention(*looked)

    def _looks(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets in cells (heads, levels, points, 2) and logits (heads, levels, points)."""
        per_query = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*per_query, 2))
        return offsets, self.attention_weights(queries).unflatten(-1, per_query)


def cell_centres(
    spatial_shapes: tuple[tuple[int, int], ...], valid_ratios: Float[Tensor, "batch levels 2"]
) -> Float[Tensor, "batch tokens levels 2"]:
    """The centre (x, y) of every token's cell as a reference point in each level.

    A centre is a share of the unpadded part of its own level, then taken to the same share of the
    unpadded part of the level that is sampled. Ratios are (height, width), as in `Memory`.
    """
    ratios = valid_ratios.flip(-1)
    centres = []
    for level, (rows, columns) in enumerate(spatial_shapes):
        y = (torch.arange(rows, device=ratios.device, dtype=ratios.dtype) + 0.5) / rows
        x = (torch.arange(columns, device=ratios.device, dtype=ratios.dtype) + 0.5) / columns
        grid = torch.stack((x.expand(rows, columns), y[:, None].expand(rows, columns)), dim=-1)
        centres.append(grid.flatten(0, 1) / ratios[:, level, None])
    return torch.cat(centres, dim=1)[:, :, None] * ratios[:, None]


def in_every_level(
    reference: Float[Tensor, "batch queries coordinates"],
    valid_ratios: Float[Tensor, "batch levels 2"],
) -> Float[Tensor, "batch queries levels coordinates"]:
    """Points or boxes of unpadded pictures as references in each padded level."""
    ratios = valid_ratios.flip(-1).repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]
