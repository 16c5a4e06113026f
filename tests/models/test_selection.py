"""Which tokens a sparse encoder updates."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.initialise import initialise
from models.selection import TokenScorer, chance, select_tokens


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))


def padded(*valid: int, tokens: int = 10) -> Tensor:
    return torch.arange(tokens) >= torch.tensor(valid)[:, None]


def scorer(dim: int = 8) -> TokenScorer:
    built = TokenScorer(dim)
    initialise(built, torch.Generator().manual_seed(0))
    return built


@pytest.mark.parametrize(
    ("rho", "counts"),
    [(0.1, (2, 1)), (0.3, (4, 2)), (0.5, (6, 3)), (0.95, (10, 4)), (1.0, (10, 4))],
)
def test_a_picture_of_v_tokens_keeps_rho_v_of_them_rounded_down_plus_one(
    rho: float, counts: tuple[int, int]
) -> None:
    """Sparse DETR's code (acceptance check 9.7), but v at the most: public bug 7.2.2."""
    padding = padded(10, 4)
    selection = select_tokens(normal(2, 10), padding, rho)
    assert tuple(selection.kept.sum(1).tolist()) == counts
    assert selection.indices.shape == (2, counts[0])


def test_the_kept_tokens_are_the_best_of_the_picture_in_ascending_order() -> None:
    ranking = torch.tensor([[0.3, 2.0, -1.0, 9.0, 9.0], [5.0, 1.0, 2.0, 3.0, 0.0]])
    selection = select_tokens(ranking, padded(3, 5, tokens=5), 0.5)
    assert selection.indices.shape == (2, 3)
    assert selection.indices[0][selection.kept[0]].tolist() == [0, 1]
    assert selection.indices[1].tolist() == [0, 2, 3]
    assert (selection.indices.diff(dim=1) > 0).all()


def test_padding_is_never_kept_however_good_its_rank() -> None:
    padding = padded(1, 7, 10)
    for rho in (0.01, 0.5, 1.0):
        selection = select_tokens(padding * 100.0, padding, rho)
        kept = torch.zeros_like(padding).scatter(1, selection.indices, selection.kept)
        assert not (kept & padding).any()


def test_the_released_code_keeps_a_token_of_padding_at_rho_1() -> None:
    """Public bug 7.2.2: int(v) + 1 tokens."""
    selection = select_tokens(normal(2, 10), padded(6, 4), 1.0, beyond_valid=True)
    assert selection.kept.sum(1).tolist() == [7, 5]


def test_a_pictures_selection_does_not_depend_on_the_others_of_its_batch() -> None:
    """Public bug 7.2.3: only what fills up the row does."""
    ranking, padding = normal(3, 10), padded(10, 6, 3)
    together = select_tokens(ranking, padding, 0.4)
    for number in range(3):
        alone = select_tokens(ranking[number : number + 1], padding[number : number + 1], 0.4)
        kept = together.indices[number][together.kept[number]]
        assert torch.equal(kept, alone.indices[0][alone.kept[0]])
        assert alone.kept.all()


def test_an_empty_picture_keeps_nothing() -> None:
    selection = select_tokens(normal(2, 10), padded(0, 5), 0.3)
    assert selection.kept.sum(1).tolist() == [0, 2]


def test_the_scoring_network_sees_a_token_and_the_mean_of_its_picture() -> None:
    """Section 3.3 and appendix, written out for one picture of 3 tokens."""
    built, features = scorer(), normal(1, 3, 8)
    first, second, third, last = built.layers
    mixed = functional.gelu(first(functional.layer_norm(features, (8,))))
    both = torch.cat((mixed[..., :4], mixed[..., 4:].mean(1, keepdim=True).expand(1, 3, 4)), -1)
    wanted = last(functional.gelu(third(functional.gelu(second(both)))))[..., 0]
    torch.testing.assert_close(built(features, None), wanted)
    assert [tuple(layer.weight.shape) for layer in built.layers] == [(8, 8), (4, 8), (2, 4), (1, 2)]


def test_the_scoring_network_of_the_paper_has_107521_parameters() -> None:
    assert sum(weight.numel() for weight in TokenScorer(256).parameters()) == 107_521


def test_scores_of_a_picture_do_not_depend_on_padding() -> None:
    """Public bug 7.2.10: the mean over padding; `left_out=None` is the released code."""
    built, features = scorer(), normal(1, 4, 8)
    beside = torch.cat((features, normal(1, 3, 8, seed=1)), dim=1)
    alone = built(features, torch.zeros(1, 4, dtype=torch.bool))
    torch.testing.assert_close(built(beside, padded(4, tokens=7))[:, :4], alone)
    assert not torch.allclose(built(beside, None)[:, :4], alone)


def test_scores_are_float32_under_autocast() -> None:
    built, features = scorer(), normal(1, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = built(features, None)
    assert torch.equal(scores, built(features.float(), None))


def test_chance_is_drawn_anew_in_training_and_fixed_otherwise() -> None:
    padding = padded(10, 4)
    assert not torch.equal(chance(padding, True), chance(padding, True))
    assert torch.equal(chance(padding, False), chance(padding, False))
