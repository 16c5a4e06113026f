"""The decoder's attention map, what it teaches, and how well the selection follows it."""

import math

import pytest
import torch
from torch import Tensor

from models.selection_losses import (
    correlation,
    decoder_attention_map,
    most_read,
    scoring_losses,
    selection_correlation,
)
from models.structures import (
    DetectorOutput,
    GroupOutput,
    LayerOutput,
    Memory,
    SampledAttention,
    TokenSelection,
)

SHAPES = ((1, 3), (1, 2))
"""Five tokens: three of level 0, two of level 1."""


def memory(padding: Tensor, selection: TokenSelection | None = None) -> Memory:
    tokens = torch.zeros(*padding.shape, 4)
    ratios = torch.ones(len(padding), 2, 2)
    return Memory(tokens, tokens, padding, SHAPES, ratios, selection)


def selected(*rows: list[int], kept: list[int], scores: Tensor | None = None) -> TokenSelection:
    """Rows of tokens, of which the first `kept` count."""
    indices = torch.tensor(rows)
    counts = torch.arange(indices.shape[1]) < torch.tensor(kept)[:, None]
    return TokenSelection(indices, counts, scores)


def answer(attention: Tensor | SampledAttention | None, queries: int) -> LayerOutput:
    said = torch.zeros(1, queries, 4)
    return LayerOutput(said, said, said, cross_attention=attention)


def no_padding(batch: int = 1) -> Tensor:
    return torch.zeros(batch, 5, dtype=torch.bool)


def test_dam_of_dense_attention_sums_layers_heads_and_queries_of_all_groups() -> None:
    """Section 3.2: sums, not means: 2 + 2 layers, 2 heads, 3 and 1 queries."""
    weights = torch.rand(4, 1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    groups = (
        GroupOutput("queries", (answer(weights[0], 3), answer(weights[1], 3))),
        GroupOutput("more", (answer(weights[2, :, :, :1], 1), answer(weights[3, :, :, :1], 1))),
    )
    found = decoder_attention_map(DetectorOutput(groups, memory(no_padding())))
    expected = weights[:2].sum((0, 2, 3)) + weights[2:, :, :, :1].sum((0, 2, 3))
    torch.testing.assert_close(found, expected)


def sampled() -> DetectorOutput:
    """One query and head looks at the middle cell of level 0 and between both cells of level 1."""
    locations = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2, 1)
    layers = (answer(SampledAttention(locations, weights), 1),) * 2
    return DetectorOutput((GroupOutput("queries", layers),), memory(no_padding()))


def test_dam_of_sampled_attention_shares_a_sample_among_the_cells_around_it() -> None:
    found = decoder_attention_map(sampled())
    torch.testing.assert_close(found, torch.tensor([[0, 1.5, 0, 0.25, 0.25]]))


def test_legacy_dam_is_half_a_cell_off() -> None:
    """Peers' bug 7.2.2: half a cell right and, out of the only row, down."""
    found = decoder_attention_map(sampled(), legacy_dam=True)
    torch.testing.assert_close(found, torch.tensor([[0, 0.375, 0.375, 0, 0.25]]))


def test_there_is_no_dam_where_no_attention_is_recorded() -> None:
    output = DetectorOutput((GroupOutput("queries", (answer(None, 2),)),), memory(no_padding()))
    assert decoder_attention_map(output) is None
    assert selection_correlation(output) == {}


def test_the_most_read_tokens_are_as_many_as_each_picture_keeps() -> None:
    """Section 3.2, the binarised DAM; padding comes last, however much it is read."""
    dam = torch.tensor([[5.0, 1, 4, 2, 3], [9.0, 8, 1, 7, 2]])
    padding = no_padding(2)
    padding[1, :2] = True
    selection = selected([0, 1, 2], [0, 1, 2], kept=[3, 2])
    assert most_read(dam, padding, selection).int().tolist() == [[1, 0, 1, 0, 1], [0, 0, 0, 1, 1]]


LN3 = math.log(3)


def test_equation_4_is_the_mean_cross_entropy_over_the_tokens_of_each_picture() -> None:
    """log(4/3) where 3/4 is right, log 4 where it is wrong; the second picture has two tokens."""
    scores = torch.tensor([[LN3, LN3, -LN3, -LN3, LN3], [LN3, -LN3, 7.0, -9.0, -torch.inf]])
    wanted = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]]).bool()
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    right, wrong = math.log(4 / 3), math.log(4)
    expected = torch.tensor([(3 * right + 2 * wrong) / 5, (right + wrong) / 2])
    torch.testing.assert_close(scoring_losses(scores, wanted, padding), expected)


def test_padding_learns_nothing_and_its_scores_change_nothing() -> None:
    """Peers' bug 7.2.2."""
    scores = torch.tensor([[0.5, -0.5, 1.0, -2.0, 3.0]], requires_grad=True)
    padding = torch.tensor([[0, 0, 0, 1, 1]]).bool()
    wanted = torch.tensor([[1, 0, 0, 0, 0]]).bool()
    loss = scoring_losses(scores, wanted, padding)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient[0, 3:].tolist() == [0, 0]
    assert bool((gradient[0, :3] != 0).all())
    other = scores.detach().masked_fill(padding, torch.nan).requires_grad_()
    masked = scoring_losses(other, wanted, padding)
    torch.testing.assert_close(masked, loss)
    torch.testing.assert_close(torch.autograd.grad(masked.sum(), other), (gradient,))


def test_legacy_padding_sends_the_gradients_of_padding_to_the_token_of_least_score() -> None:
    """The public code: the least score of the batch, with its gradient, in place of padding's."""
    scores = torch.tensor([[LN3, 0.0, -LN3, 5.0, 5.0]], requires_grad=True)
    padding = torch.tensor([[0, 0, 0, 1, 1]]).bool()
    wanted = torch.tensor([[1, 0, 0, 0, 0]]).bool()
    loss = scoring_losses(scores, wanted, padding, legacy_padding=True)
    right = math.log(4 / 3)
    torch.testing.assert_close(loss.detach(), torch.tensor([(4 * right + math.log(2)) / 5]))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    torch.testing.assert_close(gradient, torch.tensor([[-0.05, 0.1, 0.15, 0, 0]]))


def test_scoring_losses_are_float32_from_half_precision() -> None:
    """Peers' bug 7.1.12."""
    scores = torch.tensor([[0.5, -0.5, 1.0, -2.0, 3.0]]).bfloat16()
    wanted, padding = no_padding(), no_padding()
    with torch.autocast("cpu", torch.bfloat16):
        found = scoring_losses(scores, wanted, padding)
    assert found.dtype == torch.float32
    assert torch.equal(found, scoring_losses(scores.float(), wanted, padding))


DAM = torch.tensor([[1.0, 2, 3, 4, 0], [0.0, 1, 0, 0, 3]])


def test_equation_5_is_the_share_of_attention_that_meets_selected_tokens() -> None:
    """Corr: (1 + 4) / 10 and 3 / 4; by level 1 / 6 and 0 / 1, 4 / 4 and 3 / 3."""
    selection = selected([0, 3], [3, 4], kept=[2, 2])
    found = correlation(DAM, memory(no_padding(2)), selection)
    assert {name: round(float(value), 5) for name, value in found.items()} == {
        "corr_mask_attn_map_dec_all": 0.625,
        "corr_mask_attn_map_dec_0": 0.08333,
        "corr_mask_attn_map_dec_1": 1.0,
    }


def test_corr_is_one_where_every_token_is_selected() -> None:
    """Also in a padded batch: attention that padding gets is no loss of the selection."""
    padding = no_padding(2)
    padding[1, 2:] = True
    everything = selected([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], kept=[5, 2])
    found = correlation(DAM + 0.5, memory(padding, everything), everything)
    assert float(found["corr_mask_attn_map_dec_all"]) == 1.0
    assert float(found["corr_mask_attn_map_dec_0"]) == 1.0


@pytest.mark.parametrize(("legacy", "expected"), [(False, 0.3), (True, 0.4)])
def test_tokens_that_only_fill_up_a_picture_count_in_the_public_codes_corr_alone(
    legacy: bool, expected: float
) -> None:
    """Peers' bug 7.2.3: token 0 is selected for the sake of another picture."""
    selection = selected([2, 0], kept=[1])
    found = correlation(DAM[:1], memory(no_padding()), selection, legacy_padding=legacy)
    torch.testing.assert_close(found["corr_mask_attn_map_dec_all"], torch.tensor(expected))


def test_a_level_without_attention_is_left_out_of_the_mean() -> None:
    """The public code makes a NaN of it: 0 / 0 in the second picture."""
    dam = torch.tensor([[1.0, 2, 3, 4, 0], [0.0, 1, 0, 0, 0]])
    given = memory(no_padding(2))
    selection = selected([0, 4], [1, 4], kept=[2, 2])
    found = correlation(dam, given, selection)
    assert float(found["corr_mask_attn_map_dec_1"]) == 0.0
    selection = selected([0, 3], [1, 4], kept=[2, 2])
    assert float(correlation(dam, given, selection)["corr_mask_attn_map_dec_1"]) == 1.0
    public = correlation(dam, given, selection, legacy_padding=True)
    assert public["corr_mask_attn_map_dec_1"].isnan()
    nothing = correlation(torch.zeros(2, 5), given, selection)
    assert float(nothing["corr_mask_attn_map_dec_all"]) == 0.0
