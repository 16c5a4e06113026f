"""Neighbourhood attention: each cell looks at the square of cells around it (Hassani et al., 2023).

CVPR 2023, section 3.1. At a border the square stays within the map, so a cell near it is not in the
middle of its square. Plain torch: TILE x TILE queries share the keys of all their squares, and what
is not in a query's own square is masked. With a square of 7 cells that is 14 x 14 keys, four times
the products of the definition, but dense ones; gathering every square for itself copies 49 keys for
each query and took 1.5 to 3 times as long (layers of DAT++-T at 224 and 800x1333 pixels, one CPU
thread). One row of tiles is computed at a time, so memory grows with the width of the map alone.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

TILE = 8
"""Rows and columns of queries that share keys."""


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
        looked = self._look(self.qkv(padded))[:, :rows, :columns]
        projected: Tensor = self.projection(looked)
        return projected

    def masked_products(self, rows: int, columns: int) -> int:
        """Multiply-adds of a map that are computed for nothing: of keys beyond a query's square."""
        pairs = math.prod(
            _tiles(n, self.kernel, torch.device("cpu")).count for n in (rows, columns)
        )
        needed = rows * columns * self.kernel**2
        return 2 * (pairs - needed) * self.projection.in_features

    def _look(
        self, qkv: Float[Tensor, "batch rows columns three_channels"]
    ) -> Float[Tensor, "batch _ _ channels"]:
        """Of a map with whole tiles, the last ones beyond the map."""
        queries, keys, values = qkv.chunk(3, -1)
        down = _tiles(qkv.shape[1], self.kernel, qkv.device)
        across = _tiles(qkv.shape[2], self.kernel, qkv.device)
        rows = [
            self._look_of_a_row(
                queries[:, down.queries[row]][:, :, across.queries],
                keys[:, down.keys[row]][:, :, across.keys],
                values[:, down.keys[row]][:, :, across.keys],
                self._bias(down.of(row), across).to(qkv.dtype),
            )
            for row in range(len(down.queries))
        ]
        return torch.cat(rows, 1)

    def _look_of_a_row(
        self,
        queries: Float[Tensor, "batch tile tiles tile channels"],
        keys: Float[Tensor, "batch near tiles near_columns channels"],
        values: Float[Tensor, "batch near tiles near_columns channels"],
        bias: Float[Tensor, "tiles heads queries keys"],
    ) -> Float[Tensor, "batch tile columns channels"]:
        batch, _, tiles = queries.shape[:3]
        looked = F.scaled_dot_product_attention(
            self._heads(queries),
            self._heads(keys),
            self._heads(values),
            attn_mask=bias.repeat(batch, 1, 1, 1),
        )
        whole = looked.transpose(1, 2).reshape(batch, tiles, TILE, TILE, -1)
        return whole.transpose(1, 2).flatten(2, 3)

    def _heads(
        self, tokens: Float[Tensor, "batch down tiles across channels"]
    ) -> Float[Tensor, "batch_tiles heads tokens depth"]:
        of_tiles = tokens.transpose(1, 2).flatten(0, 1).flatten(1, 2)
        return torch.unflatten(of_tiles, 2, (self.num_heads, -1)).transpose(1, 2)

    def _bias(self, down: "_Tiles", across: "_Tiles") -> Float[Tensor, "tiles heads queries keys"]:
        """Of one row of tiles: the table at each displacement, nothing beyond the squares."""
        entries = self.bias_table[:, down.displacements[0]][..., across.displacements]
        bias = entries.permute(3, 0, 1, 4, 2, 5)
        inside = down.inside[0][None, :, None, :, None] & across.inside[:, None, :, None, :]
        masked = bias.masked_fill(~inside[:, None], -math.inf)
        return masked.flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class _Tiles:
    """The tiles along an axis, and the keys that each needs."""

    queries: Int64[Tensor, "tiles tile"]
    """Cells; beyond the map its last one."""
    keys: Int64[Tensor, "tiles near"]
    displacements: Int64[Tensor, "tiles tile near"]
    """Row or column of the bias table."""
    inside: Bool[Tensor, "tiles tile near"]
    """Whether a key is in the square of a query."""

    @property
    def count(self) -> int:
        """Pairs of a query and a key, those that are masked included."""
        return self.displacements.numel()

    def of(self, tile: int) -> "_Tiles":
        """One of them."""
        one = slice(tile, tile + 1)
        return _Tiles(self.queries[one], self.keys[one], self.displacements[one], self.inside[one])


def _tiles(length: int, kernel: int, device: torch.device) -> _Tiles:
    num_near = min(TILE + kernel - 1, length)
    first = torch.arange(0, length, TILE, device=device)[:, None]
    queries = (first + torch.arange(TILE, device=device)).clamp(max=length - 1)
    near = (first - kernel // 2).clamp(0, length - num_near)
    keys = near + torch.arange(num_near, device=device)
    starts = (queries - kernel // 2).clamp(0, length - kernel)[:, :, None]
    inside = (keys[:, None] >= starts) & (keys[:, None] < starts + kernel)
    displacements = keys[:, None] - queries[:, :, None] + kernel - 1
    return _Tiles(queries, keys, displacements.clamp(0, 2 * kernel - 2), inside)
