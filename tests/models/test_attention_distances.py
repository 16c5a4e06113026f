"""Distances of attention: rows, partners, other grids, heads, and where samples fall."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from models.attention_distances import (
    among_partners,
    of_partners,
    resampled,
    row_distances,
    token_shares,
)
from models.ops.attention_map import token_mass
from models.structures import SampledAttention


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_mse_sums_over_a_row_and_is_the_mean_over_rows_and_heads() -> None:
    ours, theirs = rows(2, 3, 4, 5), rows(2, 3, 4, 5, seed=1)
    expected = sum(
        (ours[1, head, row, column] - theirs[1, head, row, column]) ** 2
        for head, row, column in itertools.product(range(3), range(4), range(5))
    ) / (3 * 4)
    torch.testing.assert_close(row_distances(ours, theirs, "mse")[1], expected)


def test_kl_makes_the_teachers_rows_sum_to_one_and_is_zero_where_they_agree() -> None:
    ours, theirs = rows(1, 2, 3, 4), rows(1, 2, 3, 4, seed=1)
    expected = (theirs * (theirs / ours).log()).sum(-1).mean()
    torch.testing.assert_close(row_distances(ours, 0.3 * theirs, "kl")[0], expected)
    assert row_distances(ours, ours, "kl")[0].abs() < 1e-6


def test_of_other_numbers_of_heads_the_means_are_compared() -> None:
    ours, theirs = rows(1, 2, 3, 4), rows(1, 6, 3, 4, seed=1)
    means = (ours.mean(1, keepdim=True) - theirs.mean(1, keepdim=True)).square().sum(-1).mean()
    torch.testing.assert_close(row_distances(ours, theirs, "mse")[0], means)


def test_both_axes_of_self_attention_are_permuted_by_the_partners() -> None:
    theirs, partners = rows(1, 2, 4, 4), torch.tensor([[2, 0, 3]])
    chosen = among_partners(theirs, partners)
    for head, i, j in itertools.product(range(2), range(3), range(3)):
        assert chosen[0, head, i, j] == theirs[0, head, partners[0, i], partners[0, j]]
    assert torch.equal(of_partners(theirs, partners), theirs[:, :, [2, 0, 3]])


def test_a_finer_grid_is_taken_to_the_students_and_keeps_its_mass_but_for_padding() -> None:
    theirs = rows(1, 2, 3, 4 * 6).contiguous()
    padding = torch.zeros(1, 2 * 3, dtype=torch.bool)
    whole = resampled(theirs, (4, 6), (2, 3), padding)
    blocks = theirs.view(1, 2, 3, 2, 2, 3, 2).sum((4, 6)).flatten(3)
    torch.testing.assert_close(whole, blocks)
    padding[0, 4:] = True
    cut = resampled(theirs, (4, 6), (2, 3), padding)
    assert (cut[..., 4:] == 0).all()
    torch.testing.assert_close(cut.sum(-1), torch.ones(1, 2, 3))
    assert resampled(theirs, (4, 6), (4, 6), torch.zeros(1, 24, dtype=torch.bool)) is theirs


SHAPES = ((3, 4), (2, 2))


def samples() -> SampledAttention:
    """Of one picture, two queries, two heads, three points; some fall outside."""
    generator = torch.Generator().manual_seed(5)
    locations = 1.3 * torch.rand(1, 2, 2, len(SHAPES), 3, 2, generator=generator) - 0.15
    weights = torch.rand(1, 2, 2, len(SHAPES), 3, generator=generator).flatten(3).softmax(-1)
    return SampledAttention(locations, weights.view(1, 2, 2, len(SHAPES), 3))


def test_10_token_shares_are_a_splat_onto_four_cells() -> None:
    given = samples()
    expected = torch.zeros(1, 2, 3 * 4 + 2 * 2)
    starts = (0, 12)
    for query, head, level, point in itertools.product(range(2), range(2), range(2), range(3)):
        height, width = SHAPES[level]
        x, y = given.locations[0, query, head, level, point].tolist()
        x, y = x * width - 0.5, y * height - 0.5
        weight = float(given.weights[0, query, head, level, point])
        for column, row in itertools.product(
            (math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)
        ):
            if 0 <= column < width and 0 <= row < height:
                part = weight * (1 - abs(x - column)) * (1 - abs(y - row))
                expected[0, head, starts[level] + row * width + column] += part / 2
    torch.testing.assert_close(token_shares(given, SHAPES), expected)


def test_10_token_shares_are_sparse_detrs_map_and_have_gradients() -> None:
    given = samples()
    locations = given.locations.clone().requires_grad_()
    weights = given.weights.clone().requires_grad_()
    shares = token_shares(SampledAttention(locations, weights), SHAPES)
    torch.testing.assert_close(
        2 * shares.sum(1), token_mass(SHAPES, given.locations, given.weights)
    )
    (shares.square().sum()).backward()
    for tensor in (locations, weights):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_10_all_of_what_falls_inside_is_counted() -> None:
    inside = SampledAttention(
        torch.full((1, 2, 2, 2, 3, 2), 0.5), torch.full((1, 2, 2, 2, 3), 1 / 6)
    )
    torch.testing.assert_close(token_shares(inside, SHAPES).sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_distances_have_finite_gradients_with_hidden_tokens(kind: str) -> None:
    scores = torch.zeros(1, 1, 2, 3, requires_grad=True)
    hidden = torch.tensor([False, False, True])
    ours = scores.masked_fill(hidden, -math.inf).softmax(-1)
    theirs = torch.tensor([[[[0.9, 0.1, 0.0], [1.0, 0.0, 0.0]]]])
    row_distances(ours, theirs, kind).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
