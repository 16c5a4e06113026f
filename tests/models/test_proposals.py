"""Boxes that tokens propose, and the queries made of them."""

import math

import pytest
import torch
from torch import Tensor

from models.heads import BoxHead
from models.initialise import initialise
from models.proposals import (
    ProposalQueries,
    ProposalTokens,
    best_proposals,
    first_boxes,
    predict_tokens,
    queries_of,
)
from models.structures import TokenPredictions

SHAPES = ((2, 3), (1, 2))


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))


def nothing_padded(shapes: tuple[tuple[int, int], ...], batch: int = 1) -> Tensor:
    return torch.zeros(batch, sum(rows * columns for rows, columns in shapes), dtype=torch.bool)


def test_a_cell_proposes_a_box_around_itself_that_doubles_from_level_to_level() -> None:
    """Deformable DETR, A.4 (acceptance check 9.5): side 0.05 * 2^level."""
    found = first_boxes(nothing_padded(SHAPES), SHAPES)
    wanted = [[(x + 0.5) / 3, y, 0.05, 0.05] for y in (0.25, 0.75) for x in range(3)]
    wanted += [[0.25, 0.5, 0.1, 0.1], [0.75, 0.5, 0.1, 0.1]]
    torch.testing.assert_close(found.logits.sigmoid()[0], torch.tensor(wanted))
    assert found.usable.all()


def test_cells_on_padding_propose_nothing_and_the_others_within_the_picture() -> None:
    padding = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 1]]).bool()
    found = first_boxes(padding, SHAPES)
    assert torch.equal(found.usable, ~padding)
    assert torch.equal(found.logits.isinf().all(-1), padding)
    wanted = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5]]
    boxes = found.logits.sigmoid()[found.usable]
    torch.testing.assert_close(boxes[:, :2], torch.tensor(wanted))
    assert torch.equal(found.logits.sigmoid()[padding], torch.ones(3, 4))


def test_cells_closer_than_a_hundredth_to_the_border_propose_nothing() -> None:
    """Acceptance check 9.5: of 60 columns the first and the last are at 0.0083 and 0.9917."""
    usable = first_boxes(nothing_padded(((3, 60),)), ((3, 60),)).usable.view(3, 60)
    assert not usable[:, 0].any()
    assert not usable[:, -1].any()
    assert usable[:, 1:-1].all()


def test_boxes_larger_than_the_picture_are_not_proposed() -> None:
    """Level 4 begins with 0.8, level 5 would with 1.6: no logit, no NaN."""
    shapes = ((1, 1),) * 6
    found = first_boxes(nothing_padded(shapes), shapes)
    assert found.usable[0].tolist() == [True] * 5 + [False]
    torch.testing.assert_close(found.logits[0, 4, 2:].sigmoid(), torch.tensor([0.8, 0.8]))
    assert found.logits[0, 5].isposinf().all()


def test_a_token_that_must_not_propose_says_a_constant_whatever_it_holds() -> None:
    """Its features are zeroed before the projection; its box is all ones, without a gradient."""
    tokens = normal(2, 8, 12).requires_grad_()
    usable = torch.ones(2, 8, dtype=torch.bool)
    usable[0, 3] = usable[1, 5] = False
    features = _coded(ProposalTokens(12))(tokens, usable)
    torch.testing.assert_close(features[0, 3], features[1, 5])
    first = normal(2, 8, 4, seed=1).masked_fill(~usable[..., None], torch.inf)
    head = _coded(BoxHead(12))
    said = predict_tokens(features, first, torch.nn.Linear(12, 3), head)
    assert torch.equal(said.boxes[~usable], torch.ones(2, 4))
    (gradient,) = torch.autograd.grad(said.boxes.sum(), tokens)
    assert gradient.isfinite().all()
    assert not gradient[~usable].any()
    assert gradient[usable].any(-1).all()


def test_the_best_proposals_come_first_and_are_never_more_than_the_tokens() -> None:
    """Public bug 7.1.2: fewer tokens than queries."""
    scores = torch.tensor([[0.1, 3.0, -1.0, 2.0]])
    assert best_proposals(scores, 3).tolist() == [[1, 3, 0]]
    assert best_proposals(scores, 300).tolist() == [[1, 3, 0, 2]]


def test_a_box_is_coded_by_sines_of_its_four_coordinates() -> None:
    """Deformable DETR, A.4: x, y, w, h in this order, 2 pi for the whole picture."""
    coder = ProposalQueries(4, 8)
    torch.nn.init.eye_(coder.projection.weight)
    torch.nn.init.zeros_(coder.projection.bias)
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    wanted = [each for share in box.tolist() for each in _sine_cosine(share)]
    wanted = torch.nn.functional.layer_norm(torch.tensor(wanted), (8,))
    torch.testing.assert_close(coder(box.view(1, 1, 4))[0, 0], wanted)


@pytest.mark.parametrize("keeps_token", [False, True])
def test_a_proposals_box_is_where_its_query_looks_first(keeps_token: bool) -> None:
    """Content: the second half of the code (Deformable DETR), or the token (Efficient DETR).

    A token is taken with its gradient, a box without.
    """
    tokens, boxes = normal(2, 8, 12).requires_grad_(), normal(2, 8, 4).sigmoid().requires_grad_()
    coder = _coded(ProposalQueries(12, 12 if keeps_token else 24))
    best = torch.tensor([[2, 0, 7], [1, 3, 4]])
    group = queries_of(best, TokenPredictions(normal(2, 8, 3), boxes), tokens, coder)
    assert torch.equal(group.reference[1], boxes.detach()[1, [1, 3, 4]])
    code = coder(group.reference)
    torch.testing.assert_close(group.position, code[..., :12])
    content = tokens[[[0], [1]], best] if keeps_token else code[..., 12:]
    torch.testing.assert_close(group.content, content)
    total = group.content.sum() + group.position.square().sum()
    of_tokens, of_boxes = torch.autograd.grad(total, (tokens, boxes), allow_unused=True)
    assert of_boxes is None
    assert (of_tokens is not None) == keeps_token


def _coded(part: torch.nn.Module) -> torch.nn.Module:
    initialise(part, torch.Generator().manual_seed(0))
    return part


def _sine_cosine(share: float) -> tuple[float, float]:
    return math.sin(2 * math.pi * share), math.cos(2 * math.pi * share)
