"""Feature maps of several strides as one row of tokens."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.initialise import initialise
from models.levels import InputLevel, input_levels, level_paddings, project_levels, valid_ratios
from models.position import sine_positions
from tests.models.deformable_small import DEFORMABLE, drawn, feature_maps


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))


def features() -> tuple[Tensor, ...]:
    return normal(2, 6, 10, 14), normal(2, 12, 5, 7, seed=1)


def levels(count: int) -> nn.ModuleList:
    built = input_levels((6, 12), 8, count)
    initialise(built, torch.Generator().manual_seed(0))
    return built


def test_levels_beyond_the_backbones_halve_the_sides_rounded_up() -> None:
    maps = project_levels(levels(4), features())
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 10, 14), (8, 5, 7), (8, 3, 4), (8, 2, 2)]


def test_the_first_further_level_is_made_of_the_raw_last_map() -> None:
    """Deformable DETR, A.2: of C5 itself, not of its projection; a second one of the first."""
    built = levels(4)
    before = project_levels(built, features())
    nn.init.zeros_(built[1].convolution.weight)
    after = project_levels(built, features())
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    nn.init.zeros_(built[2].convolution.weight)
    assert not torch.equal(before[3], project_levels(built, features())[3])
    assert built[2].convolution.in_channels == 12
    assert built[3].convolution.in_channels == 8


def test_projections_begin_xavier_uniform_with_zero_bias() -> None:
    for level in levels(3):
        weight = level.convolution.weight.detach()
        fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.8 * bound < float(weight.abs().max()) <= bound
        assert not level.convolution.bias.any()


@pytest.mark.parametrize(("dim", "groups"), [(256, 32), (64, 32), (16, 8), (12, 2)])
def test_a_map_of_one_cell_keeps_its_features(dim: int, groups: int) -> None:
    """The papers' 32 groups at 256 channels, never a group of one channel: it would be constant."""
    level = InputLevel(6, dim)
    assert level.norm.num_groups == groups
    assert level(normal(1, 6, 1, 1)).std() > 0.5


def test_paddings_and_ratios_of_each_level_are_those_of_the_picture() -> None:
    """8x12 pixels of which 5x6 are the picture: nearest pixels, first column and first row."""
    padding = torch.ones(1, 8, 12, dtype=torch.bool)
    padding[0, :5, :6] = False
    paddings = level_paddings(padding, (normal(1, 1, 4, 6), normal(1, 1, 2, 3)))
    assert paddings[0][0].int().tolist() == [[0, 0, 0, 1, 1, 1]] * 3 + [[1] * 6]
    assert paddings[1][0].int().tolist() == [[0, 0, 1]] * 2
    wanted = torch.tensor([[[3 / 4, 3 / 6], [2 / 2, 2 / 3]]])
    torch.testing.assert_close(valid_ratios(paddings), wanted)


def test_a_level_without_a_valid_first_row_or_column_counts_one_cell() -> None:
    """Public bug 7.1.11: a ratio of 0 divides the reference points."""
    padding = torch.ones(1, 4, 5, dtype=torch.bool)
    padding[0, 2:, 2:] = False
    torch.testing.assert_close(valid_ratios((padding,)), torch.tensor([[[1 / 4, 1 / 5]]]))


def test_a_cell_stands_half_a_cell_before_its_far_edge() -> None:
    """Acceptance check 9.3: first cell of an unpadded map 4 wide, 3 high; rows come first."""
    found = sine_positions(torch.zeros(1, 3, 4, dtype=torch.bool), 8, at_centres=True)[0, 0, 0]
    y, x = 0.5 / 3 * 2 * math.pi, 0.5 / 4 * 2 * math.pi
    wanted = [math.sin(y), math.cos(y), math.sin(y / 100), math.cos(y / 100)]
    wanted += [math.sin(x), math.cos(x), math.sin(x / 100), math.cos(x / 100)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)


def test_every_level_adds_a_vector_of_its_own_to_the_positions() -> None:
    """Section 4.1: N(0, 1) at first, much more than other embeddings; finest level first."""
    model = drawn(DEFORMABLE)
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    memory = model.encode_features(feature_maps(2, 3), padding)
    assert memory.spatial_shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    begin = 0
    for level, (rows, columns) in enumerate(memory.spatial_shapes):
        part = memory.position[0, begin : begin + rows * columns]
        code = sine_positions(torch.zeros(1, rows, columns).bool(), 16, at_centres=True)
        added = part - code.flatten(1, 2)[0]
        torch.testing.assert_close(added, model.level_embedding[level].expand_as(added))
        begin += rows * columns
    assert begin == memory.position.shape[1]
    assert 0.8 < float(model.level_embedding.detach().std()) < 1.2
