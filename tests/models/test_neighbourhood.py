"""Neighbourhood attention against its definition, one cell at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.neighbourhood import NeighbourhoodAttention


def attention(kernel: int) -> NeighbourhoodAttention:
    torch.manual_seed(0)
    part = NeighbourhoodAttention(6, 2, kernel)
    torch.nn.init.normal_(part.bias_table)
    return part.double()


def one_cell_at_a_time(part: NeighbourhoodAttention, given: Tensor) -> Tensor:
    """CVPR 2023, section 3.1: the nearest square within the map, biases by displacement."""
    batch, rows, columns, _ = given.shape
    split = part.qkv(given).view(batch, rows, columns, 3, 2, 3)
    looked = torch.zeros(batch, rows, columns, 2, 3, dtype=given.dtype)
    for row in range(rows):
        for column in range(columns):
            top = min(max(row - part.kernel // 2, 0), rows - part.kernel)
            left = min(max(column - part.kernel // 2, 0), columns - part.kernel)
            near = [
                (r, c)
                for r in range(top, top + part.kernel)
                for c in range(left, left + part.kernel)
            ]
            keys = torch.stack([split[:, r, c, 1] for r, c in near], 1)
            values = torch.stack([split[:, r, c, 2] for r, c in near], 1)
            last = part.kernel - 1
            bias = torch.stack(
                [part.bias_table[:, r - row + last, c - column + last] for r, c in near]
            )
            logits = torch.einsum("bhd,bkhd->bkh", split[:, row, column, 0], keys) / math.sqrt(3)
            looked[:, row, column] = torch.einsum(
                "bkh,bkhd->bhd", (logits + bias).softmax(1), values
            )
    return part.projection(looked.flatten(3))


def test_squares_stay_within_the_map_at_its_borders() -> None:
    part, given = attention(3), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(part(given), one_cell_at_a_time(part, given))


def test_squares_reach_over_the_borders_of_tiles() -> None:
    part, given = attention(3), torch.randn(1, 10, 17, 6, dtype=torch.float64)
    assert torch.allclose(part(given), one_cell_at_a_time(part, given))


@pytest.mark.parametrize("size", [(3, 7), (7, 2), (1, 1)])
def test_maps_below_the_square_are_filled_up_with_zeros(size: tuple[int, int]) -> None:
    part, given = attention(5), torch.randn(1, *size, 6, dtype=torch.float64)
    rows, columns = size
    padded = F.pad(given, (0, 0, 0, max(5 - columns, 0), 0, max(5 - rows, 0)))
    wanted = one_cell_at_a_time(part, padded)[:, :rows, :columns]
    assert torch.allclose(part(given), wanted)


def test_every_weight_gets_a_gradient() -> None:
    part = attention(3)
    part(torch.randn(1, 4, 5, 6, dtype=torch.float64)).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in part.parameters())
