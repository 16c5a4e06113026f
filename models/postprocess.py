"""From the last decoder layer to boxes in pixels: no threshold, no suppression (DETR, 3.1)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.boxes import cxcywh_to_xyxy
from models.structures import LayerOutput


@dataclass(frozen=True)
class Detections:
    """One box per object query, in the order of the queries."""

    scores: Float[Tensor, "batch queries"]
    """Probability of the likeliest class; "no object" counts in the softmax, not as a choice."""
    labels: Int64[Tensor, "batch queries"]
    boxes_xyxy: Float[Tensor, "batch queries 4"]
    """Pixels of the picture of the given size; not clipped to it."""


@torch.no_grad()
def detections(layer: LayerOutput, sizes: Int64[Tensor, "batch 2"]) -> Detections:
    """The boxes of a layer in pixels of pictures of the given (height, width), float32."""
    probability = layer.logits.float().softmax(-1)
    scores, labels = probability[..., :-1].max(-1)
    width_height = sizes.flip(1).to(torch.float32)
    scale = width_height.repeat(1, 2)[:, None, :]
    return Detections(scores, labels, cxcywh_to_xyxy(layer.boxes.float()) * scale)
