"""The losses of masks (DETR, section 4.4)."""

import math

import pytest
import torch

from models.mask_head import MatchedMasks
from models.mask_losses import (
    MaskLossWeights,
    dice_loss,
    focal_loss,
    mask_losses,
    true_masks,
)
from models.matching import Matching, MatchingCosts
from models.shares import Share
from models.structures import Losses
from tests.models.panoptic_small import panoptic_detector, some_targets, two_pictures


def test_focal_loss_by_hand() -> None:
    """Lin et al., ICCV 2017, equation 5: -alpha (1 - p)^2 log p, the mean over the pixels."""
    logits = torch.tensor([[[0.0, math.log(3)]]])
    wanted = torch.tensor([[[True, False]]])
    of_object = 0.25 * 0.5**2 * math.log(2)
    of_rest = 0.75 * 0.75**2 * -math.log(0.25)
    assert focal_loss(logits, wanted).tolist() == pytest.approx([(of_object + of_rest) / 2])


def test_dice_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3), 30.0]]])
    wanted = torch.tensor([[[True, False, True]]])
    # Found 0.5 + 0.75 + 1, of which 0.5 + 1 is right; 2 wanted; and 1 each against empty masks.
    assert dice_loss(logits, wanted).tolist() == pytest.approx([1 - (2 * 1.5 + 1) / (2.25 + 2 + 1)])


def test_a_perfect_mask_costs_next_to_nothing_and_an_empty_one_is_defined() -> None:
    wanted = torch.tensor([[[True, False]], [[False, False]]])
    logits = torch.where(wanted, 40.0, -40.0)
    assert focal_loss(logits, wanted).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert dice_loss(logits, wanted).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_true_masks_are_taken_by_picture_and_target() -> None:
    segments = torch.tensor([[[1, 2, 0]], [[2, 2, 1]]], dtype=torch.int16)
    masks = true_masks(_pairs((0, 1), (1, 0), (1, 1)), segments)
    assert masks.int().tolist() == [[[0, 1, 0]], [[0, 0, 1]], [[1, 1, 0]]]
    assert true_masks(_pairs(), segments).tolist() == [[[False, False, False]]]


def test_sums_are_divided_by_the_targets_of_all_workers() -> None:
    alone = _losses(num_targets=2)
    shared = _losses(num_targets=2, share=Share(torch.tensor([6.0, 6.0, 4.0]), workers=2))
    for name in ("loss_mask", "loss_dice"):
        assert float(shared.terms[name]) == pytest.approx(float(alone.terms[name]) * 2 * 2 / 6)


def test_terms_are_weighted_in_the_total_alone() -> None:
    weighted = _losses(num_targets=2, weights=MaskLossWeights(focal=20.0, dice=0.5))
    terms = weighted.terms
    total = 20 * float(terms["loss_mask"]) + 0.5 * float(terms["loss_dice"])
    assert float(weighted.total.detach()) == pytest.approx(total)


def test_targets_without_a_query_are_counted() -> None:
    model = panoptic_detector()
    found = model(two_pictures(), some_targets(9, 1), MatchingCosts())
    wanted = true_masks(found.matching, torch.zeros(2, 64, 96, dtype=torch.int16))
    losses = mask_losses(found, wanted, 10, MaskLossWeights())
    assert float(losses.terms["unmatched_targets"]) == 2


@pytest.mark.parametrize("blank", [False, True])
def test_nothing_to_match_adds_nothing_and_keeps_the_graph_whole(blank: bool) -> None:
    """Peers' bug 5: gradients are zeros, not None, so that no other worker waits for them."""
    model = panoptic_detector()
    found = model(two_pictures(), some_targets(0, 0), MatchingCosts())
    wanted = true_masks(found.matching, torch.zeros(2, 64, 96, dtype=torch.int16))
    losses = mask_losses(found, wanted, 0, MaskLossWeights(), blank=blank)
    torch.autograd.backward(losses.total)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert float(losses.total.detach()) == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def _losses(
    num_targets: int,
    share: Share | None = None,
    weights: MaskLossWeights | None = None,
) -> Losses:
    model = panoptic_detector()
    found: MatchedMasks = model(two_pictures(), some_targets(1, 1), MatchingCosts())
    segments = torch.ones(2, 64, 96, dtype=torch.int16)
    return mask_losses(
        found,
        true_masks(found.matching, segments),
        num_targets,
        weights or MaskLossWeights(),
        share=share,
    )


def _pairs(*pairs: tuple[int, int]) -> Matching:
    """Of (picture, target), one layer."""
    pictures, targets = (torch.tensor([pair[n] for pair in pairs]).long() for n in (0, 1))
    zeros = torch.zeros_like(pictures)
    return Matching(zeros, pictures, zeros, targets, num_layers=1)
