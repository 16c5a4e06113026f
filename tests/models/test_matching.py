"""Matching queries with targets."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.ops import generalized_box_iou

from models.boxes import cxcywh_to_xyxy
from models.matching import Candidates, MatchingCosts, UnmatchableError, match, match_all
from models.structures import Targets

COSTS = MatchingCosts()


def predictions(layers: int, batch: int, queries: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, batch, queries, 4, generator=generator)
    boxes = 0.1 + 0.4 * torch.rand(layers, batch, queries, 4, generator=generator)
    return logits, boxes


def targets(*counts: int) -> Targets:
    generator = torch.Generator().manual_seed(1)
    boxes = [0.1 + 0.4 * torch.rand(count, 4, generator=generator) for count in counts]
    labels = [torch.randint(0, 3, (count,), generator=generator) for count in counts]
    return Targets(tuple(boxes), tuple(labels))


def plain_cost(logits: Tensor, boxes: Tensor, of: Targets, picture: int) -> Tensor:
    """Section 3.1 for one layer and picture: 5 L1 - probability - 2 GIoU."""
    wanted, labels = of.boxes_cxcywh[picture], of.labels[picture]
    distance = torch.cdist(boxes, wanted, p=1)
    overlap = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return 5 * distance - logits.softmax(-1)[:, labels] - 2 * overlap


def cheapest(cost: Tensor) -> set[tuple[int, int]]:
    """The cheapest assignment by trying all of them; every target gets a query."""
    queries, count = cost.shape
    choices = itertools.permutations(range(queries), count)
    best = min(choices, key=lambda chosen: sum(float(cost[q, t]) for t, q in enumerate(chosen)))
    return {(query, target) for target, query in enumerate(best)}


def test_every_layer_and_picture_gets_its_cheapest_assignment() -> None:
    logits, boxes = predictions(2, 3, 5)
    of = targets(3, 0, 2)
    found = match(logits, boxes, of, COSTS)
    assert found.pairs_per_layer == 5
    for layer, picture in itertools.product(range(2), range(3)):
        here = (found.layer == layer) & (found.picture == picture)
        pairs = set(zip(found.query[here].tolist(), found.target[here].tolist(), strict=True))
        cost = plain_cost(logits[layer, picture], boxes[layer, picture], of, picture)
        assert pairs == cheapest(cost)


def test_each_weight_decides_alone_where_the_others_are_zero() -> None:
    logits = torch.tensor([[[[9.0, 0, 0], [0, 9.0, 0], [0, 0, 0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.4, 0.5, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]]])
    wide = Targets((torch.tensor([[0.55, 0.5, 0.5, 0.2]]),), (torch.tensor([1]),))
    by_class = match(logits, boxes, wide, MatchingCosts(classes=1, boxes_l1=0, giou=0))
    by_distance = match(logits, boxes, wide, MatchingCosts(classes=0, boxes_l1=1, giou=0))
    assert by_class.query.tolist() == [1]
    assert by_distance.query.tolist() == [0]


def test_of_more_targets_than_queries_each_query_gets_one() -> None:
    logits, boxes = predictions(1, 1, 2)
    found = match(logits, boxes, targets(5), COSTS)
    assert found.query.tolist() == [0, 1]
    assert len(set(found.target.tolist())) == 2


def test_a_batch_without_targets_has_no_pairs() -> None:
    logits, boxes = predictions(2, 2, 3)
    found = match(logits, boxes, targets(0, 0), COSTS)
    assert found.pairs_per_layer == 0
    assert found.by_layer(torch.empty(0)).tolist() == [0, 0]


def test_costs_are_float32_under_autocast() -> None:
    logits, boxes = predictions(1, 2, 5)
    plain = match(logits, boxes, targets(3, 2), COSTS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = match(logits, boxes, targets(3, 2), COSTS)
    assert torch.equal(plain.query, mixed.query)


def test_a_prediction_that_is_not_a_number_is_named_with_layer_and_picture() -> None:
    """Peers' bug 6: a cost that is not a number is never replaced, by whatever maximum."""
    logits, boxes = predictions(2, 3, 4)
    boxes[1, 2, 3, 0] = torch.nan
    with pytest.raises(UnmatchableError, match=r"decoder layer 1, picture 2 .* query 3 .*nan"):
        match(logits, boxes, targets(1, 1, 1), COSTS)


def test_a_picture_without_targets_hides_no_other_one() -> None:
    logits, boxes = predictions(1, 2, 4)
    boxes[0, 0] = torch.nan
    assert match(logits, boxes, targets(0, 2), COSTS).pairs_per_layer == 2


@pytest.mark.parametrize("label", [3, 17, -1])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    """Label 3 of 3 classes is "no object" to the public code, which trains it without a word."""
    logits, boxes = predictions(1, 2, 4)
    of = targets(1, 2)
    of.labels[1][0] = label
    with pytest.raises(
        UnmatchableError, match=rf"target 0 of picture 1 .* label {label}, .*0 to 2"
    ):
        match(logits, boxes, of, COSTS)


@pytest.mark.parametrize("value", [torch.nan, -0.1])
def test_a_target_box_that_is_none_is_named(value: float) -> None:
    logits, boxes = predictions(1, 2, 4)
    of = targets(1, 2)
    of.boxes_cxcywh[1][1, 2] = value
    with pytest.raises(UnmatchableError, match=r"target 1 of picture 1 .* has the box"):
        match(logits, boxes, of, COSTS)


def test_costs_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValidationError, match="match at random"):
        MatchingCosts(classes=0, boxes_l1=0, giou=0)


def focal_cost(logits: Tensor, boxes: Tensor, of: Targets, picture: int) -> Tensor:
    """Deformable DETR's public code for one layer and picture, logarithms of probabilities."""
    wanted, labels = of.boxes_cxcywh[picture], of.labels[picture]
    probability = logits.sigmoid()[:, labels]
    yes = -0.25 * (1 - probability) ** 2 * (probability + 1e-8).log()
    no = -0.75 * probability**2 * (1 - probability + 1e-8).log()
    distance = torch.cdist(boxes, wanted, p=1)
    overlap = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return 5 * distance + 2 * (yes - no) - 2 * overlap


def test_sigmoid_scores_are_matched_by_focal_costs() -> None:
    logits, boxes = predictions(2, 3, 5)
    of = targets(3, 0, 2)
    found = match(3 * logits, boxes, of, MatchingCosts(classes=2), "sigmoid")
    for layer, picture in itertools.product(range(2), range(3)):
        here = (found.layer == layer) & (found.picture == picture)
        pairs = set(zip(found.query[here].tolist(), found.target[here].tolist(), strict=True))
        cost = focal_cost(3 * logits[layer, picture], boxes[layer, picture], of, picture)
        assert pairs == cheapest(cost)


def test_focal_costs_are_float32_under_autocast() -> None:
    """Peers' bug 7.1.12: costs in half precision tie, and match at random."""
    logits, boxes = (each.bfloat16() for each in predictions(2, 2, 60))
    by_class = MatchingCosts(classes=1, boxes_l1=0, giou=0)
    plain = match(logits.float(), boxes.float(), targets(30, 20), by_class, "sigmoid")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = match(logits, boxes, targets(30, 20), by_class, "sigmoid")
    assert torch.equal(plain.query, mixed.query)
    assert torch.equal(plain.target, mixed.target)


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_beyond_the_sigmoid_logits_is_named(label: int) -> None:
    """Peers' bug 7.1.7; there is no logit of "no object": label 3 of 4 is a class."""
    logits, boxes = predictions(1, 2, 4)
    of = targets(1, 2)
    of.labels[1][0] = 3
    assert match(logits, boxes, of, COSTS, "sigmoid").pairs_per_layer == 3
    of.labels[1][0] = label
    with pytest.raises(
        UnmatchableError, match=rf"target 0 of picture 1 .* label {label}, .*0 to 3"
    ):
        match(logits, boxes, of, COSTS, "sigmoid")


def test_candidates_of_several_kinds_are_matched_as_each_by_itself() -> None:
    decoder, tokens = predictions(2, 3, 5), predictions(1, 3, 11)
    of, others = targets(3, 0, 2), targets(1, 4, 0)
    both = (
        Candidates(("decoder layer 0", "decoder layer 1"), *decoder, of),
        Candidates(("the proposals",), *tokens, others),
    )
    together = match_all(both, COSTS, "sigmoid")
    alone = (match(*decoder, of, COSTS, "sigmoid"), match(*tokens, others, COSTS, "sigmoid"))
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.layer, theirs.layer)
        assert torch.equal(ours.picture, theirs.picture)
        assert torch.equal(ours.query, theirs.query)
        assert torch.equal(ours.target, theirs.target)


def test_a_token_that_says_no_number_is_named_with_its_place() -> None:
    decoder, tokens = predictions(2, 1, 5), predictions(1, 1, 7)
    tokens[1][0, 0, 6] = torch.nan
    of = targets(2)
    both = (
        Candidates(("decoder layer 0", "decoder layer 1"), *decoder, of),
        Candidates(("the proposals",), *tokens, of),
    )
    with pytest.raises(UnmatchableError, match=r"in the proposals, picture 0 .* query 6"):
        match_all(both, COSTS, "sigmoid")


def test_queries_that_do_not_count_get_no_target_even_where_targets_are_left() -> None:
    logits, boxes = predictions(2, 2, 4)
    of = targets(1, 3)
    boxes[:, 1, 1] = of.boxes_cxcywh[1][0]
    counted = torch.tensor([[True, True, True, True], [True, False, True, False]])
    candidates = Candidates(("encoder layer 0", "encoder layer 1"), logits, boxes, of, counted)
    (found,) = match_all((candidates,), COSTS, "softmax")
    assert found.pairs_per_layer == 3
    assert set(found.query[found.picture == 1].tolist()) == {0, 2}
