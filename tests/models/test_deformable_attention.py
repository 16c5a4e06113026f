"""Deformable attention with its projections, and where cells and queries look from."""

import pytest
import torch
from torch import Tensor, nn

from models.deformable_attention import DeformableAttention, cell_centres, in_every_level
from models.initialise import initialise

SHAPES = ((2, 3), (1, 2))


def attention(dim: int = 16, heads: int = 8, levels: int = 2, points: int = 3) -> nn.Module:
    built = DeformableAttention(dim, heads, levels, points)
    initialise(built, torch.Generator().manual_seed(0))
    return built


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))


def test_every_head_begins_with_a_direction_of_its_own_and_points_at_1_2_3_cells() -> None:
    """Deformable DETR, A.3 (acceptance check 9.2): the same on every level, weights all zero."""
    built = attention()
    directions = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    offsets = built.sampling_offsets.bias.view(8, 2, 3, 2)
    for level in range(2):
        for point in range(3):
            wanted = torch.tensor(directions, dtype=torch.float32) * (point + 1)
            torch.testing.assert_close(offsets[:, level, point], wanted)
    assert not built.sampling_offsets.weight.any()
    assert not built.attention_weights.weight.any()
    assert not built.attention_weights.bias.any()
    assert not built.value_proj.bias.any()
    assert not built.output_proj.bias.any()
    bound = (6 / (16 + 16)) ** 0.5
    assert 0.8 * bound < float(built.value_proj.weight.detach().abs().max()) <= bound


def test_at_first_a_head_gives_the_mean_of_its_samples() -> None:
    """Acceptance check 9.2: on a ramp of columns, samples 1 to 4 cells off are 2.5 off on average.

    So the head that looks right reads 2.5 columns more, the one that looks left 2.5 less.
    """
    built = attention(dim=8, heads=8, levels=1, points=4)
    ramp = torch.arange(13.0).expand(12, 13).reshape(1, 12 * 13, 1, 1).expand(-1, -1, 8, 1)
    nn.init.eye_(built.output_proj.weight)
    references = torch.tensor([6.5 / 13, 5.5 / 12]).view(1, 1, 1, 2)
    (read,) = built(normal(1, 1, 8), references, ramp.contiguous(), ((12, 13),))[0]
    wanted = [8.5, 8.5, 6.0, 3.5, 3.5, 3.5, 6.0, 8.5]
    torch.testing.assert_close(read, torch.tensor(wanted))


def test_samples_of_a_box_begin_within_it() -> None:
    """With a box the last of the points is at its edge: offset / points * size / 2 (4.1, A.4)."""
    built = attention(dim=8, heads=4, levels=1, points=2)
    box = torch.tensor([0.4, 0.5, 0.2, 0.1]).view(1, 1, 1, 4)
    (looked,) = built.looked_at(normal(1, 1, 8), box, ((5, 6),)).locations[0]
    wanted = [
        [[0.45, 0.5], [0.5, 0.5]],
        [[0.4, 0.525], [0.4, 0.55]],
        [[0.35, 0.5], [0.3, 0.5]],
        [[0.4, 0.475], [0.4, 0.45]],
    ]
    torch.testing.assert_close(looked[:, 0], torch.tensor(wanted))


def test_padding_is_zero_after_the_projection_and_its_bias() -> None:
    built = attention()
    nn.init.ones_(built.value_proj.bias)
    padding = torch.tensor([[False, True, False], [True, False, False]])
    values = built.project_values(normal(2, 3, 16), padding)
    assert values.shape == (2, 3, 8, 2)
    assert not values[padding].any()
    assert values[~padding].all()


def test_recorded_attention_is_that_of_the_forward_pass() -> None:
    """The recorded locations and weights, put into equation 3, give what `forward` gave."""
    built = attention(dim=4, heads=2, levels=2, points=3)
    for part in built.parameters():
        nn.init.normal_(part, generator=torch.Generator().manual_seed(1))
    queries, references = normal(2, 5, 4), normal(2, 5, 2, 2, seed=2).sigmoid()
    values = built.project_values(normal(2, 8, 4), torch.zeros(2, 8, dtype=torch.bool))
    found = built(queries, references, values, SHAPES)
    seen = built.looked_at(queries, references, SHAPES)
    torch.testing.assert_close(seen.weights.sum((-2, -1)), torch.ones(2, 5, 2))
    sampled = []
    for level, (begin, rows, columns) in enumerate(((0, 2, 3), (6, 1, 2))):
        plane = values[:, begin : begin + rows * columns].permute(0, 2, 3, 1)
        plane = plane.reshape(4, 2, rows, columns)
        grid = 2 * seen.locations[:, :, :, level].transpose(1, 2).reshape(4, 5, 3, 2) - 1
        share = seen.weights[:, :, :, level].transpose(1, 2).reshape(4, 1, 5, 3)
        bilinear = nn.functional.grid_sample(plane, grid, align_corners=False)
        sampled.append((bilinear * share).sum(-1))
    mixed = sum(sampled).view(2, 4, 5).transpose(1, 2)
    torch.testing.assert_close(found, built.output_proj(mixed))


def test_cells_of_an_unpadded_picture_look_from_their_centres_in_every_level() -> None:
    """Deformable DETR, A.2: 2x3 and 1x2 cells, written out."""
    found = cell_centres(SHAPES, torch.ones(1, 2, 2))
    x = [1 / 6, 1 / 2, 5 / 6]
    wanted = [[x[0], 0.25], [x[1], 0.25], [x[2], 0.25], [x[0], 0.75], [x[1], 0.75], [x[2], 0.75]]
    wanted += [[0.25, 0.5], [0.75, 0.5]]
    for level in range(2):
        torch.testing.assert_close(found[0, :, level], torch.tensor(wanted))


def test_cells_of_a_padded_picture_look_at_the_same_place_of_the_picture_in_every_level() -> None:
    """The picture fills 2 of 3 columns of the first level and 1 of 2 of the second."""
    ratios = torch.tensor([[[1.0, 2 / 3], [1.0, 1 / 2]]])
    found = cell_centres(SHAPES, ratios)
    of_picture = [
        [0.25, 0.25],
        [0.75, 0.25],
        [1.25, 0.25],
        [0.25, 0.75],
        [0.75, 0.75],
        [1.25, 0.75],
    ]
    of_picture += [[0.5, 0.5], [1.5, 0.5]]
    for level, share in enumerate((2 / 3, 1 / 2)):
        wanted = torch.tensor(of_picture) * torch.tensor([share, 1.0])
        torch.testing.assert_close(found[0, :, level], wanted)


def test_queries_look_at_the_unpadded_part_of_each_level() -> None:
    """Points and boxes (x, y, w, h) shrink by (width, height) ratios, never the other way round."""
    ratios = torch.tensor([[[1 / 2, 1 / 4], [1.0, 1 / 5]]])
    point = torch.tensor([[[0.4, 0.6]]])
    wanted = torch.tensor([[0.1, 0.3], [0.08, 0.6]])
    torch.testing.assert_close(in_every_level(point, ratios)[0, 0], wanted)
    box = torch.tensor([[[0.4, 0.6, 0.2, 0.8]]])
    wanted = torch.tensor([[0.1, 0.3, 0.05, 0.4], [0.08, 0.6, 0.04, 0.8]])
    torch.testing.assert_close(in_every_level(box, ratios)[0, 0], wanted)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_query_is_answered_whatever_the_others_ask(coordinates: int) -> None:
    built = attention(dim=4, heads=2)
    queries, references = normal(1, 5, 4), normal(1, 5, 2, coordinates, seed=2).sigmoid()
    values = normal(1, 8, 2, 2, seed=3)
    order = [3, 0, 4, 1, 2]
    found = built(queries, references, values, SHAPES)
    turned = built(queries[:, order], references[:, order], values, SHAPES)
    torch.testing.assert_close(turned, found[:, order])
