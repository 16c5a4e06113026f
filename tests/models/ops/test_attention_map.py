"""How much attention meets a token: the operator's own shares of values."""

import pytest
import torch

from models.ops.attention_map import token_mass
from models.ops.reference import deformable_attention

SHAPES = ((3, 5), (2, 1))


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    locations = torch.rand(2, 4, 3, 2, 2, 2, generator=generator) * 1.6 - 0.3
    locations[0, 0, 0, 0, 0] = torch.nan
    return locations, torch.rand(2, 4, 3, 2, 2, generator=generator)


def test_the_mass_of_a_token_is_what_its_value_counts_for_in_all_outputs() -> None:
    locations, weights = samples()
    values = torch.zeros(2, 17, 3, 1, requires_grad=True)
    deformable_attention(values, SHAPES, locations, weights).sum().backward()
    assert values.grad is not None
    mass = token_mass(SHAPES, locations, weights)
    torch.testing.assert_close(mass, values.grad.sum((2, 3)))


@pytest.mark.parametrize(
    ("legacy", "wanted"), [(False, [[0, 1, 0], [0, 0, 0]]), (True, [[0, 1, 1], [0, 1, 1]])]
)
def test_the_released_map_is_half_a_cell_too_far_right_and_down(
    legacy: bool, wanted: list[list[int]]
) -> None:
    """A sample at the centre of a cell (Sparse DETR's public code forgets the half)."""
    where = torch.tensor([1.5 / 3, 0.5 / 2]).view(1, 1, 1, 1, 1, 2)
    mass = token_mass(((2, 3),), where, torch.ones(1, 1, 1, 1, 1), legacy_dam=legacy)
    share = 4.0 if legacy else 1.0
    torch.testing.assert_close(mass.view(2, 3) * share, torch.tensor(wanted).float())


def test_layers_add_up() -> None:
    locations, weights = samples()
    once = token_mass(SHAPES, locations, weights)
    other = token_mass(SHAPES, 1 - locations, weights)
    together = token_mass(
        SHAPES, torch.stack((locations, 1 - locations)), torch.stack((weights, weights))
    )
    torch.testing.assert_close(together, once + other)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_map_is_the_sum_over_samples_of_their_bilinear_shares(legacy: bool) -> None:
    """Written out cell by cell; the released map has no half in it."""
    locations, weights = samples()
    shift = 0.0 if legacy else 0.5
    levels = []
    for level, (rows, columns) in enumerate(SHAPES):
        x = locations[:, :, :, level, :, 0].flatten(1) * columns - shift
        y = locations[:, :, :, level, :, 1].flatten(1) * rows - shift
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        near_x = (1 - (x[..., None, None] - column).abs()).clamp(min=0).nan_to_num(0)
        near_y = (1 - (y[..., None, None] - row).abs()).clamp(min=0).nan_to_num(0)
        share = weights[:, :, :, level].flatten(1)[..., None, None]
        levels.append((near_x * near_y * share).sum(1).flatten(1))
    mass = token_mass(SHAPES, locations, weights, legacy_dam=legacy)
    torch.testing.assert_close(mass, torch.cat(levels, 1))
