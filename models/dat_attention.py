"""Deformable attention of DAT: all queries share keys that are read at moved points of the map.

Xia et al., CVPR 2022, section 3.2, and DAT++ (arXiv 2309.01430). An offset network says from the
queries how far each point of a uniform grid moves; keys and values are made of what is read there;
the bias of a query and a key is read out of a table at their displacement, which is a real number.
Everything between points is bilinear.

The public code mixes two conventions: points are placed as if -1 and 1 were the edges of the map
(v1) or half a cell further (DAT++), and read as if they were the middles of its first and last
cell. Points that do not move are thus read up to half a cell beside their own place. Published
weights were trained so, hence `grid="published"`; `aligned` reads unmoved points where they are.

With stride 1 as in v1 every cell is a key: N cells cost N * N logits per head. The bias is made and
used for as many queries at once as BIAS_VALUES allows, and made again in the backward pass.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ReferenceGrid = Literal["published", "aligned"]
"""Where points lie that do not move: where published weights expect them, or where they belong."""

BIAS_VALUES = 2**24
"""Biases (pictures * heads * queries * keys) that are in memory at once: 64 MiB in float32."""


@dataclass(frozen=True)
class DeformableKind:
    """What is particular to the attention of one stage."""

    channels: int
    heads: int
    groups: int
    """Parts of the channels, and of the heads, with points of their own."""
    kernel: int
    """Of the offset network's convolution, in cells of the map."""
    stride: int
    """Cells of the map along each axis for one point."""
    offset_range: float | None
    """How far points move at most: times 2 / (points along the axis) of [-1, 1]. None: anywhere,
    points are then held within the map (DAT++).
    """
    table_side: int
    """Of the square table of biases: 2 * (cells along an axis of the map in training) - 1."""


@dataclass(frozen=True)
class Points:
    """Where the keys of a map are read, in (y, x); -1 and 1 are its first and last cell."""

    moved: Float[Tensor, "batch groups rows columns 2"]
    reference: Float[Tensor, "rows columns 2"]
    """Where they lie before they move."""


class DatAttention(nn.Module):
    """Multi-head attention of every cell to keys at moved points; a map in, a map out."""

    def __init__(self, kind: DeformableKind, grid: ReferenceGrid) -> None:
        super().__init__()
        self.kind = kind
        self.grid = grid
        self.query = nn.Linear(kind.channels, kind.channels)
        self.key = nn.Linear(kind.channels, kind.channels)
        self.value = nn.Linear(kind.channels, kind.channels)
        self.projection = nn.Linear(kind.channels, kind.channels)
        self.offsets = OffsetNetwork(kind.channels // kind.groups, kind.kernel, kind.stride)
        self.bias_table = nn.Parameter(torch.zeros(kind.heads, kind.table_side, kind.table_side))

    def forward(
        self, features: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """A map of the same size, whatever that is."""
        size = (features.shape[1], features.shape[2])
        queries = self.query(features)
        points = self._points(queries)
        read = _read(features, points.moved)
        keys, values = (self._heads(part(read)) for part in (self.key, self.value))
        placed = self._query_grid(size, features.device)
        asked = self._heads(queries.flatten(1, 2))
        looked = self._look(asked, keys, values, placed, points.moved.flatten(2, 3))
        whole = torch.unflatten(looked.transpose(1, 2).flatten(2), 1, size)
        projected: Tensor = self.projection(whole)
        return projected

    def points(self, features: Float[Tensor, "batch rows columns channels"]) -> Points:
        """Where a map's keys are read."""
        return self._points(self.query(features))

    def attention(
        self,
        features: Float[Tensor, "batch rows columns channels"],
        chosen: Int64[Tensor, " cells"],
    ) -> Float[Tensor, "batch heads cells keys"]:
        """How strongly chosen cells, by row * columns + column, look at each key, in float32."""
        size = (features.shape[1], features.shape[2])
        queries = self.query(features)
        moved = self._points(queries).moved
        keys = self._heads(self.key(_read(features, moved))).float()
        asked = self._heads(queries.flatten(1, 2))[:, :, chosen].float()
        placed = self._query_grid(size, features.device)[chosen.to(features.device)]
        bias = self._bias(placed, moved.flatten(2, 3))
        return (asked @ keys.mT / math.sqrt(asked.shape[-1]) + bias).softmax(-1)

    def _points(self, queries: Float[Tensor, "batch rows columns channels"]) -> Points:
        size = (queries.shape[1], queries.shape[2])
        grouped = torch.unflatten(queries.permute(0, 3, 1, 2), 1, (self.kind.groups, -1))
        offsets = self.offsets(grouped.flatten(0, 1)).float()
        offsets = torch.unflatten(offsets, 0, (-1, self.kind.groups)).permute(0, 1, 3, 4, 2)
        points = (offsets.shape[2], offsets.shape[3])
        reference = self._reference(points, size, queries.device)
        if self.kind.offset_range is None:
            return Points((reference + offsets).clamp(-1, 1), reference)
        reach = self.kind.offset_range / torch.tensor(points, device=queries.device)
        return Points(reference + offsets.tanh() * reach, reference)

    def _reference(
        self, points: tuple[int, int], size: tuple[int, int], device: torch.device
    ) -> Float[Tensor, "rows columns 2"]:
        match self.grid:
            case "aligned":
                axes = [_middles(n, cells, device) for n, cells in zip(points, size, strict=True)]
            case "published" if self._is_first_version:
                axes = [_between_edges(n, device) for n in points]
            case "published":
                axes = [_half_a_cell_on(n, device) for n in points]
            case _:
                assert_never(self.grid)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)

    def _query_grid(
        self, size: tuple[int, int], device: torch.device
    ) -> Float[Tensor, "queries 2"]:
        """Where the queries lie, as their biases see it."""
        if self.grid == "published" and self._is_first_version:
            axes = [_between_edges(n, device) for n in size]
        else:
            axes = [_middles(n, n, device) for n in size]
        return torch.cartesian_prod(*axes)

    @property
    def _is_first_version(self) -> bool:
        """Of DAT: there the range of points is bounded."""
        return self.kind.offset_range is not None

    def _look(
        self, queries: Tensor, keys: Tensor, values: Tensor, placed: Tensor, points: Tensor
    ) -> Float[Tensor, "batch heads queries depth"]:
        """For so many queries at once that their biases fit BIAS_VALUES."""
        for_one = len(queries) * self.kind.heads * keys.shape[2]
        at_once = max(1, BIAS_VALUES // for_one)
        if queries.shape[2] <= at_once:
            return self._look_of_some(queries, keys, values, placed, points)
        parts = [slice(start, start + at_once) for start in range(0, len(placed), at_once)]
        looked = [
            self._again_in_backward(queries[:, :, part], keys, values, placed[part], points)
            for part in parts
        ]
        return torch.cat(looked, 2)

    def _again_in_backward(self, *given: Tensor) -> Tensor:
        """Where there is a backward pass: biases are not kept for it."""
        if not torch.is_grad_enabled():
            return self._look_of_some(*given)
        looked: Tensor = checkpoint(
            self._look_of_some, *given, use_reentrant=False, preserve_rng_state=False
        )
        return looked

    def _look_of_some(
        self, queries: Tensor, keys: Tensor, values: Tensor, placed: Tensor, points: Tensor
    ) -> Float[Tensor, "batch heads queries depth"]:
        bias = self._bias(placed, points).to(queries.dtype)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)

    def _bias(
        self, placed: Float[Tensor, "queries 2"], points: Float[Tensor, "batch groups keys 2"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The table at each displacement of a query and a key (CVPR 2022, equation 9)."""
        batch, groups = points.shape[:2]
        # As complex numbers whole rows of keys are subtracted at once: 10 times as fast on the CPU.
        query, key = (torch.view_as_complex(yx.flip(-1) / 2) for yx in (placed, points))
        away_xy = torch.view_as_real(query[:, None] - key[:, :, None])
        tables = torch.unflatten(self.bias_table.float(), 0, (groups, -1))
        tables = tables.expand(batch, -1, -1, -1, -1).flatten(0, 1)
        bias = _bilinear(tables, away_xy.flatten(0, 1))
        return torch.unflatten(bias, 0, (batch, groups)).flatten(1, 2)

    def _heads(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch heads tokens depth"]:
        return torch.unflatten(tokens, 2, (self.kind.heads, -1)).transpose(1, 2)


class OffsetNetwork(nn.Module):
    """From a group's queries to the offsets of its points, (y, x) (CVPR 2022, section 3.2)."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            channels, channels, kernel, stride, padding=kernel // 2, groups=channels
        )
        self.norm = nn.LayerNorm(channels)
        self.offset = nn.Linear(channels, 2, bias=False)

    def forward(
        self, queries: Float[Tensor, "groups channels rows columns"]
    ) -> Float[Tensor, "groups 2 points_down points_across"]:
        """Before they are bounded."""
        seen = self.norm(self.convolution(queries).permute(0, 2, 3, 1))
        offsets: Tensor = self.offset(F.gelu(seen))
        return offsets.permute(0, 3, 1, 2)


def _read(
    features: Float[Tensor, "batch rows columns channels"],
    points: Float[Tensor, "batch groups points_down points_across 2"],
) -> Float[Tensor, "batch points channels"]:
    """Each group's channels at its points."""
    batch, groups = points.shape[:2]
    maps = torch.unflatten(features.permute(0, 3, 1, 2), 1, (groups, -1)).flatten(0, 1)
    read = _bilinear(maps.float(), points.flatten(0, 1).flip(-1)).to(features.dtype)
    return torch.unflatten(read, 0, (batch, groups)).flatten(3).permute(0, 3, 1, 2).flatten(2)


def _bilinear(
    maps: Float[Tensor, "maps channels rows columns"],
    points_xy: Float[Tensor, "maps down across 2"],
) -> Float[Tensor, "maps channels down across"]:
    """Values between cells, 0 beyond the map; -1 and 1 are the outermost cells."""
    return F.grid_sample(maps, points_xy, mode="bilinear", align_corners=True)


def _middles(points: int, cells: int, device: torch.device) -> Float[Tensor, " points"]:
    """The middles of equal parts of an axis of so many cells; each a cell where as many."""
    middle = (torch.arange(points, device=device) + 0.5) * (cells / points) - 0.5
    return middle * (2 / max(cells - 1, 1)) - 1


def _between_edges(points: int, device: torch.device) -> Float[Tensor, " points"]:
    """The same, were -1 and 1 the edges of the map and not the middles of its outer cells."""
    return (torch.arange(points, device=device) + 0.5) * (2 / points) - 1


def _half_a_cell_on(points: int, device: torch.device) -> Float[Tensor, " points"]:
    """Half a cell behind the middles of so many cells; the last lies beyond the map."""
    return (torch.arange(points, device=device) + 0.5) * (2 / max(points - 1, 1)) - 1
