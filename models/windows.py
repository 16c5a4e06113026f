"""Attention within windows, shifted or not, of maps of any size (Liu et al., ICCV 2021, 3.2).

Maps are channels last. They are padded with zeros to whole windows; tokens that fill windows up are
keys like any other, as in the Swin of detectors.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each square window, with a bias by displacement.

    With a `shift`, the windows lie that many rows and columns further down and to the right; those
    cut off at one edge wrap around to the other, where tokens of different edges do not meet. An
    axis that one window covers is shifted too, unless `shifts_covering` is turned off.
    """

    displacement_index: Tensor

    def __init__(self, channels: int, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.shift = shift
        self.shifts_covering = True
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, num_heads)
        )
        self.register_buffer(
            "displacement_index", relative_position_index(window), persistent=False
        )

    def forward(
        self, features: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """A map of the same size; tokens that fill up windows are keys like any other."""
        batch, rows, columns, _ = features.shape
        padded = F.pad(features, (0, 0, 0, -columns % self.window, 0, -rows % self.window))
        height, width = padded.shape[1:3]
        down, right = self._shift_of(height), self._shift_of(width)
        shifted = padded.roll((-down, -right), (1, 2))
        looked = self._look(_windows(shifted, self.window), self._bias(height, width, batch))
        whole = _without_windows(looked, self.window, height, width)
        return whole.roll((down, right), (1, 2))[:, :rows, :columns]

    def _look(
        self, tokens: Float[Tensor, "windows tokens channels"], bias: Tensor
    ) -> Float[Tensor, "windows tokens channels"]:
        split = (len(tokens), self.window**2, 3, self.num_heads, -1)
        queries, keys, values = self.qkv(tokens).view(split).permute(2, 0, 3, 1, 4)
        looked = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        projected: Tensor = self.projection(looked.transpose(1, 2).flatten(2))
        return projected

    def _bias(self, height: int, width: int, batch: int) -> Float[Tensor, "windows heads q k"]:
        """What is added to the logits; of all windows, or of one where they are alike."""
        table = self.relative_position_bias_table
        bias = table[self.displacement_index].permute(2, 0, 1)[None]
        down, right = self._shift_of(height), self._shift_of(width)
        if down or right:
            bands = (_bands(height, self.window, down), _bands(width, self.window, right))
            regions = _windows(_regions(*bands).to(table.device), self.window).flatten(1)
            apart = regions[:, None, :, None] != regions[:, None, None, :]
            bias = bias.masked_fill(apart, -math.inf).repeat(batch, 1, 1, 1)
        return bias

    def _shift_of(self, length: int) -> int:
        """Along an axis of so many cells."""
        return self.shift if self.shifts_covering or length > self.window else 0


def relative_position_index(window: int) -> Int64[Tensor, "tokens tokens"]:
    """The row of the bias table for each pair of tokens in a window: their displacement."""
    tokens = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    displacement = tokens[:, None] - tokens[None, :] + window - 1
    return displacement[..., 0] * (2 * window - 1) + displacement[..., 1]


def _regions(
    row: Int64[Tensor, " height"], column: Int64[Tensor, " width"]
) -> Int64[Tensor, "1 height width 1"]:
    """A number for each part of the shifted map whose tokens were neighbours before the shift."""
    return (3 * row[:, None] + column[None, :])[None, :, :, None]


def _bands(length: int, window: int, shift: int) -> Int64[Tensor, " length"]:
    """0, then 1 for the start of the last window, then 2 for what was wrapped around."""
    position = torch.arange(length)
    return (position >= length - window).long() + (position >= length - shift).long()


def _windows(
    features: Float[Tensor, "batch height width channels"]
    | Int64[Tensor, "batch height width channels"],
    window: int,
) -> Tensor:
    """The tokens of each window, (batch * windows, window * window, channels)."""
    batch, height, width, channels = features.shape
    grid = (batch, height // window, window, width // window, window, channels)
    return features.reshape(grid).transpose(2, 3).reshape(-1, window**2, channels)


def _without_windows(
    tokens: Float[Tensor, "windows tokens channels"], window: int, height: int, width: int
) -> Float[Tensor, "batch height width channels"]:
    """The map that was cut into windows."""
    grid = (-1, height // window, width // window, window, window, tokens.shape[-1])
    return tokens.view(grid).transpose(2, 3).reshape(-1, height, width, tokens.shape[-1])
