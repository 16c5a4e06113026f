"""Boxes and their overlaps."""

import torch
from torchvision.ops import box_iou, generalized_box_iou

from models.boxes import (
    cxcywh_to_xyxy,
    generalized_iou,
    generalized_iou_pairs,
    iou,
    xyxy_to_cxcywh,
)


def test_the_two_frames_of_a_box() -> None:
    corners = torch.tensor([[1.0, 2.0, 5.0, 10.0]])
    centre = torch.tensor([[3.0, 6.0, 4.0, 8.0]])
    assert torch.equal(cxcywh_to_xyxy(centre), corners)
    assert torch.equal(xyxy_to_cxcywh(corners), centre)


def test_generalized_iou_of_boxes_apart_is_minus_the_empty_share_of_their_hull() -> None:
    """Equation 1 of Rezatofighi et al.: union 2, hull 4, so 0 / 2 - (4 - 2) / 4."""
    left, right = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[3.0, 0, 4, 1]])
    assert generalized_iou(left, right).tolist() == [[-0.5]]
    assert generalized_iou_pairs(left, right).tolist() == [-0.5]
    assert iou(left, right).tolist() == [[0.0]]


def test_overlaps_equal_torchvisions_forward_and_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = cxcywh_to_xyxy(torch.rand(5, 4, generator=generator)).requires_grad_()
    others = cxcywh_to_xyxy(torch.rand(3, 4, generator=generator))
    ours, theirs = generalized_iou(boxes, others), generalized_box_iou(boxes, others)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(iou(boxes, others), box_iou(boxes, others))
    (our_gradient,) = torch.autograd.grad(ours.square().sum(), boxes)
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), boxes)
    torch.testing.assert_close(our_gradient, their_gradient)


def test_pairs_are_the_diagonal_of_all_with_all() -> None:
    boxes = cxcywh_to_xyxy(torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)))
    others = boxes.flip(1)
    every = generalized_iou(boxes, others)
    torch.testing.assert_close(generalized_iou_pairs(boxes, others), every.diagonal(dim1=1, dim2=2))


def test_the_iou_of_empty_boxes_is_zero() -> None:
    nothing = torch.zeros(1, 4)
    assert iou(nothing, nothing).tolist() == [[0.0]]
