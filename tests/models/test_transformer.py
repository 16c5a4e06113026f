"""Attention, encoder and decoder."""

import pytest
import torch
from torch import Tensor, nn

from models.attention import Attention, attention_weights
from models.decoder import Decoder
from models.initialise import initialise
from models.structures import Memory, QueryGroup
from models.transformer import Cells, Encoder, TransformerShape


def shape(pre_norm: bool = False, dropout: float = 0.0) -> TransformerShape:
    return TransformerShape(
        dim=12, num_heads=3, feedforward_dim=20, dropout=dropout, pre_norm=pre_norm
    )


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))


def memory(batch: int = 2, tokens: int = 5) -> Memory:
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[0, -2:] = True
    return Memory(
        tokens=normal(batch, tokens, 12, seed=1),
        position=normal(batch, tokens, 12, seed=2),
        padding=padding,
        spatial_shapes=((1, tokens),),
        valid_ratios=torch.ones(batch, 1, 2),
    )


def cells(of: Memory, tokens: Tensor) -> Cells:
    return Cells(
        tokens, of.position, of.padding, of.spatial_shapes, of.valid_ratios, references=None
    )


def group(name: str, queries: int, *, masked: bool = False, seed: int = 3) -> QueryGroup:
    mask = torch.arange(queries)[:, None] // 2 != torch.arange(queries)[None] // 2
    return QueryGroup(
        name,
        content=torch.zeros(2, queries, 12),
        position=normal(2, queries, 12, seed=seed),
        intra_mask=mask if masked else None,
    )


def decoder(pre_norm: bool = False, layers: int = 2) -> Decoder:
    built = Decoder(shape(pre_norm), layers)
    initialise(built, torch.Generator().manual_seed(4))
    return built


def test_attention_equals_torchs_multihead_attention_forward_and_backward() -> None:
    ours = Attention(12, 3, dropout=0.0)
    initialise(ours, torch.Generator().manual_seed(0))
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    queries = normal(2, 4, 12).requires_grad_()
    tokens, position = normal(2, 5, 12, seed=1), normal(2, 5, 12, seed=2)
    hidden = memory().padding

    found = ours(
        ours.project_queries(queries),
        ours.project_keys(tokens + position),
        ours.project_values(tokens),
        hidden[:, None, None, :],
    )
    wanted, weights = theirs(
        queries, tokens + position, tokens, key_padding_mask=hidden, average_attn_weights=False
    )
    torch.testing.assert_close(found, wanted)
    (our_gradient,) = torch.autograd.grad(found.square().sum(), queries)
    (their_gradient,) = torch.autograd.grad(wanted.square().sum(), queries)
    torch.testing.assert_close(our_gradient, their_gradient)
    recorded = attention_weights(
        ours.project_queries(queries),
        ours.project_keys(tokens + position),
        hidden[:, None, None, :],
    )
    torch.testing.assert_close(recorded, weights)


def test_queries_and_keys_in_one_product_equal_two_products() -> None:
    attention = Attention(12, 3, dropout=0.0)
    initialise(attention, torch.Generator().manual_seed(0))
    queries, keys = attention.project_queries_and_keys(normal(2, 4, 12))
    torch.testing.assert_close(queries, attention.project_queries(normal(2, 4, 12)))
    torch.testing.assert_close(keys, attention.project_keys(normal(2, 4, 12)))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_padding_changes_no_token_of_the_picture(pre_norm: bool) -> None:
    encoder = Encoder(shape(pre_norm), 2)
    initialise(encoder, torch.Generator().manual_seed(0))
    of = memory()
    before = encoder(cells(of, of.tokens)).tokens
    changed = torch.where(of.padding[..., None], 100.0, of.tokens)
    after = encoder(cells(of, changed)).tokens
    torch.testing.assert_close(before[~of.padding], after[~of.padding])


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_group_decodes_the_same_alone_and_beside_others(pre_norm: bool) -> None:
    built = decoder(pre_norm)
    first, second = group("first", 4, masked=True), group("second", 3, seed=9)
    together = built(memory(), (first, second))
    for number, alone in enumerate((first, second)):
        (layers,) = built(memory(), (alone,))
        for beside, single in zip(together[number], layers, strict=True):
            assert torch.equal(beside.hidden, single.hidden)


def test_masked_queries_do_not_feel_each_other() -> None:
    built = decoder()
    masked = group("patches", 4, masked=True)
    moved = torch.cat((masked.position[:, :2], masked.position[:, 2:] + 1), dim=1)
    other = QueryGroup("patches", masked.content, moved, intra_mask=masked.intra_mask)
    (before,), (after,) = built(memory(), (masked,)), built(memory(), (other,))
    assert torch.equal(before[-1].hidden[:, :2], after[-1].hidden[:, :2])
    assert not torch.equal(before[-1].hidden[:, 2:], after[-1].hidden[:, 2:])


def test_recording_adds_attention_maps_and_changes_nothing_else() -> None:
    built, asked = decoder(), (group("queries", 4, masked=True),)
    (plain,), (recorded,) = built(memory(), asked), built(memory(), asked, record="all")
    for before, after in zip(plain, recorded, strict=True):
        assert before.cross_attention is None
        assert before.self_attention is None
        assert torch.equal(before.hidden, after.hidden)
        assert after.self_attention is not None
        assert after.cross_attention is not None
        assert after.cross_attention.shape == (2, 3, 4, 5)
        torch.testing.assert_close(after.cross_attention.sum(-1), torch.ones(2, 3, 4))
        assert after.cross_attention[0, ..., -2:].abs().max() == 0
        assert after.self_attention[..., :2, 2:].abs().max() == 0
