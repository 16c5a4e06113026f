"""Boxes: their two frames and their overlaps (generalized IoU: Rezatofighi et al., CVPR 2019).

`cxcywh` is (centre x, centre y, width, height), `xyxy` is (left, top, right, bottom); the functions
take any unit and any leading axes, so one call serves all decoder layers and pictures at once.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def cxcywh_to_xyxy(boxes: Float[Tensor, "*boxes 4"]) -> Float[Tensor, "*boxes 4"]:
    """The corners of boxes given by centre and size, in the same unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*boxes 4"]) -> Float[Tensor, "*boxes 4"]:
    """Centre and size of boxes given by their corners, in the same unit."""
    corner, opposite = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((corner + opposite) / 2, opposite - corner), dim=-1)


def iou(
    boxes_xyxy: Float[Tensor, "*#batch boxes 4"], others_xyxy: Float[Tensor, "*#batch others 4"]
) -> Float[Tensor, "*#batch boxes others"]:
    """Intersection over union of each box (row) with each other (column); 0 if both are empty."""
    intersection, union = _overlap(boxes_xyxy[..., :, None, :], others_xyxy[..., None, :, :])
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(
    boxes_xyxy: Float[Tensor, "*#batch boxes 4"], others_xyxy: Float[Tensor, "*#batch others 4"]
) -> Float[Tensor, "*#batch boxes others"]:
    """Generalized IoU, -1..1, of each box (row) with each other (column); NaN if both are empty."""
    return _generalized(boxes_xyxy[..., :, None, :], others_xyxy[..., None, :, :])


def generalized_iou_pairs(
    boxes_xyxy: Float[Tensor, "*boxes 4"], others_xyxy: Float[Tensor, "*boxes 4"]
) -> Float[Tensor, " *boxes"]:
    """Generalized IoU, -1..1, of each box with the other at its place; NaN if both are empty."""
    return _generalized(boxes_xyxy, others_xyxy)


def _generalized(boxes: Tensor, others: Tensor) -> Tensor:
    intersection, union = _overlap(boxes, others)
    left_top = torch.minimum(boxes[..., :2], others[..., :2])
    right_bottom = torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = _area(left_top, right_bottom)
    return intersection / union - (hull - union) / hull


def _overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Area of the intersection and of the union; the axes before the last broadcast."""
    left_top = torch.maximum(boxes[..., :2], others[..., :2])
    right_bottom = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = _area(left_top, right_bottom)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    other_area = (others[..., 2:] - others[..., :2]).prod(-1)
    return intersection, area + other_area - intersection


def _area(left_top: Tensor, right_bottom: Tensor) -> Tensor:
    width, height = (right_bottom - left_top).clamp(min=0).unbind(-1)
    return width * height
