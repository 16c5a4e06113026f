"""Position codes."""

import math

import pytest
import torch

from models.position import LearnedPositions, sine_positions


def test_sine_codes_scale_the_unpadded_picture_to_two_pi() -> None:
    """DETR counts rows and columns from 1; 8 channels have periods 1, 1, 100, 100 per axis."""
    padding = torch.tensor([[[False, False, False, True], [True, True, True, True]]])
    code = sine_positions(padding, 8)
    row, column = 2 * math.pi, 2 * math.pi * 2 / 3
    wanted = [
        *(math.sin(row), math.cos(row), math.sin(row / 100), math.cos(row / 100)),
        *(math.sin(column), math.cos(column), math.sin(column / 100), math.cos(column / 100)),
    ]
    assert code.shape == (1, 2, 4, 8)
    torch.testing.assert_close(code[0, 0, 1], torch.tensor(wanted), rtol=0, atol=1e-5)


def test_learned_codes_hold_the_column_first_then_the_row() -> None:
    positions = LearnedPositions(4)
    code = positions(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert code.shape == (2, 3, 5, 4)
    assert torch.equal(code[1, 2, 4, :2], positions.columns.weight[4])
    assert torch.equal(code[1, 2, 4, 2:], positions.rows.weight[2])


def test_learned_codes_end_after_fifty_cells_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"51 x 3; use smaller pictures, or position=sine"):
        LearnedPositions(4)(torch.zeros(1, 51, 3, dtype=torch.bool))
