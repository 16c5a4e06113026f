"""Neighbourhood attention: each cell looks at the square of cells around it (Hassani et al., 2023).

CVPR 2023, section 3.1. At a border the square stays within the map, so a cell near it is not in the
middle of its square. Plain torch: keys and values of all squares are gathered for one row of the
map at a time, which costs kernel * kernel copies of a row and no more.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


class NeighbourhoodAttention(nn.Module):
    """Multi-head attention of each cell to `kernel` x `kernel` cells, with a bias by displacement.

    A map below `kernel` rows or columns is filled up with zeros, which are keys like any other.
    """

    def __init__(self, channels: int, num_heads: int, kernel: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel = kernel
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.bias_table = nn.Parameter(torch.zeros(num_heads, 2 * kernel - 1, 2 * kernel - 1))

    def forward(
        self, features: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """A map of the same size."""
        rows, columns = features.shape[1:3]
        missing = (max(self.kernel - columns, 0), max(self.kernel - rows, 0))
        padded = F.pad(features, (0, 0, 0, missing[0], 0, missing[1]))
        split = self.qkv(padded).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = split.permute(3, 0, 1, 2, 4, 5)
        looked = self._look(queries, keys, values)
        projected: Tensor = self.projection(looked[:, :rows, :columns])
        return projected

    def _look(
        self, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Float[Tensor, "batch rows columns channels"]:
        """Queries, keys and values are (batch, rows, columns, heads, depth)."""
        height, width = queries.shape[1:3]
        device = queries.device
        across = torch.tensor(_starts(width, self.kernel), device=device)
        columns = across[:, None] + torch.arange(self.kernel, device=device)
        bias_columns = columns - torch.arange(width, device=device)[:, None] + self.kernel - 1
        rows = []
        for row, start in enumerate(_starts(height, self.kernel)):
            near = slice(start, start + self.kernel)
            bias_rows = slice(start - row + self.kernel - 1, start - row + 2 * self.kernel - 1)
            bias = self.bias_table[:, bias_rows][:, :, bias_columns].permute(2, 0, 1, 3)
            rows.append(
                _look_of_a_row(queries[:, row], keys[:, near], values[:, near], columns, bias)
            )
        return torch.stack(rows, 1)


def _look_of_a_row(
    queries: Float[Tensor, "batch columns heads depth"],
    keys: Float[Tensor, "batch kernel columns heads depth"],
    values: Float[Tensor, "batch kernel columns heads depth"],
    columns: Int64[Tensor, "columns kernel"],
    bias: Float[Tensor, "columns heads kernel kernel"],
) -> Float[Tensor, "batch columns channels"]:
    """Each query of a row with the keys of its square."""
    near_keys, near_values = (
        part[:, :, columns].permute(0, 2, 4, 1, 3, 5).flatten(3, 4) for part in (keys, values)
    )
    added = bias.flatten(2)[:, :, None].to(queries.dtype)
    looked = F.scaled_dot_product_attention(
        queries.unsqueeze(3), near_keys, near_values, attn_mask=added
    )
    return looked.flatten(2)


def _starts(length: int, kernel: int) -> list[int]:
    """Where the square of each cell begins along an axis."""
    return [min(max(cell - kernel // 2, 0), length - kernel) for cell in range(length)]
