"""From the last decoder layer to boxes in pixels: no threshold, no suppression (DETR, 3.1).

Softmax scores: one box per object query, of its likeliest class. Sigmoid scores: the surest pairs
of a query and a class, so that a query may say several classes (Deformable DETR's public code).
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.boxes import cxcywh_to_xyxy
from models.matching import ClassScores
from models.structures import LayerOutput

MAX_PAIRS = 100
"""Pairs of a query and a class that are taken from a picture, as in the public code."""
MAX_PAIRS_OF_ANCHORS = 300
"""The same of DAB-DETR; COCO's AP counts the best 100 of them."""


@dataclass(frozen=True)
class Detections:
    """Equally many boxes for each picture.

    Softmax scores: one per object query, in the order of the queries. Sigmoid scores: surest first.
    """

    scores: Float[Tensor, "batch boxes"]
    """Probability of the class; "no object" counts in the softmax, not as a choice."""
    labels: Int64[Tensor, "batch boxes"]
    boxes_xyxy: Float[Tensor, "batch boxes 4"]
    """Pixels of the picture of the given size; not clipped to it."""


def query_scores(
    logits: Float[Tensor, "batch queries classes"], class_scores: ClassScores
) -> Float[Tensor, "batch queries"]:
    """Probability of the likeliest class of each query, float32."""
    return _classes(logits.float(), class_scores).amax(-1)


@torch.no_grad()
def detections(
    layer: LayerOutput,
    sizes: Int64[Tensor, "batch 2"],
    class_scores: ClassScores = "softmax",
    max_pairs: int = MAX_PAIRS,
) -> Detections:
    """The boxes of a layer in pixels of pictures of the given (height, width), float32.

    With sigmoid scores `max_pairs` of them, or as many as there are queries times classes.
    """
    probability, boxes = _classes(layer.logits.float(), class_scores), layer.boxes.float()
    match class_scores:
        case "softmax":
            scores, labels = probability.max(-1)
        case "sigmoid":
            pairs, num_classes = probability.flatten(1), probability.shape[-1]
            scores, places = pairs.topk(min(max_pairs, pairs.shape[1]), dim=1)
            labels = places % num_classes
            query = places.div(num_classes, rounding_mode="floor")
            boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        case _:
            assert_never(class_scores)
    width_height = sizes.flip(1).to(torch.float32)
    scale = width_height.repeat(1, 2)[:, None, :]
    return Detections(scores, labels, cxcywh_to_xyxy(boxes) * scale)


def _classes(
    logits: Float[Tensor, "batch queries logits"], class_scores: ClassScores
) -> Float[Tensor, "batch queries classes"]:
    """The probability of each class."""
    match class_scores:
        case "softmax":
            return logits.softmax(-1)[..., :-1]
        case "sigmoid":
            return logits.sigmoid()
        case _:
            assert_never(class_scores)
