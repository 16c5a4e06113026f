"""Where a token stands in its picture, as a vector (DETR, appendix A.4)."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

PositionCode = Literal["sine", "learned"]

LEARNED_CELLS = 50
"""Rows and columns with learned codes, as in DETR: at stride 32, pictures up to 1600 pixels."""

TEMPERATURE = 10000.0
"""The longest period, in turns, of DETR's codes."""
_EPSILON = 1e-6


def sine_positions(
    padding: Bool[Tensor, "batch rows columns"],
    dim: int,
    *,
    at_centres: bool = False,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "batch rows columns {dim}"]:
    """Sines and cosines of the row (first half of dim) and of the column.

    The unpadded picture spans 2 pi in either direction; a cell counts at its far edge (DETR), or at
    its centre, half a cell earlier (Deformable DETR).
    """
    valid = ~padding
    shift = 0.5 if at_centres else 0.0
    rows = valid.cumsum(1, dtype=torch.float32)
    columns = valid.cumsum(2, dtype=torch.float32)
    rows = (rows - shift) / (rows[:, -1:, :] + _EPSILON) * (2 * math.pi)
    columns = (columns - shift) / (columns[:, :, -1:] + _EPSILON) * (2 * math.pi)
    halves = (waves(rows, dim // 2, temperature), waves(columns, dim // 2, temperature))
    return torch.cat(halves, dim=-1)


def waves(
    angle: Float[Tensor, "*any"], dim: int, temperature: float = TEMPERATURE
) -> Float[Tensor, "*any {dim}"]:
    """Sine and cosine in turn, at frequencies falling from 1 to 1/temperature over the channels."""
    channel = torch.arange(dim, dtype=torch.float32, device=angle.device)
    period = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / dim)
    phase = angle[..., None] / period
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)


class LearnedPositions(nn.Module):
    """One trained vector per column (first half of dim) and per row, for up to 50 of each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(LEARNED_CELLS, dim // 2)
        self.columns = nn.Embedding(LEARNED_CELLS, dim // 2)

    def forward(
        self, padding: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch rows columns dim"]:
        """The codes of every cell; ValueError where there are more than 50 rows or columns."""
        batch, num_rows, num_columns = padding.shape
        if max(num_rows, num_columns) > LEARNED_CELLS:
            raise ValueError(
                f"learned positions exist for {LEARNED_CELLS} x {LEARNED_CELLS} cells, the feature "
                f"map has {num_rows} x {num_columns}; use smaller pictures, or position=sine"
            )
        rows = self.rows.weight[:num_rows, None, :].expand(-1, num_columns, -1)
        columns = self.columns.weight[None, :num_columns, :].expand(num_rows, -1, -1)
        return torch.cat((columns, rows), dim=-1).expand(batch, -1, -1, -1)
