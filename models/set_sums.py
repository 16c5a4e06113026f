"""Sums of the set criterion over queries and over matched pairs, by layer; nothing is divided.

Classes: cross-entropy with "no object" (DETR, section 3.1) or the focal loss (Deformable DETR);
boxes: L1 distance and 1 - generalized IoU. Everything is given, and computed, in float32.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, generalized_iou_pairs
from models.focal import focal_losses
from models.matching import Candidates, Matching, PaddedTargets, pad_targets


@dataclass(frozen=True)
class CrossEntropy:
    """Classes and "no object" exclude each other."""

    no_object: float | Literal["paper"]
    """Weight of "no object"; "paper" is targets per query (UP-DETR, section 3.2)."""


@dataclass(frozen=True)
class Focal:
    """Each class is a question of its own."""

    alpha: float
    gamma: float


ClassLoss = CrossEntropy | Focal


@dataclass(frozen=True)
class LayerSums:
    """The sums over one rank's pictures."""

    classes: Float[Tensor, " layers"]
    class_weight: Float[Tensor, " layers"] | None
    """What `classes` is divided by; None where that is the number of targets."""
    distance: Float[Tensor, " layers"]
    giou: Float[Tensor, " layers"]


def layer_sums(candidates: Candidates, matching: Matching, class_loss: ClassLoss) -> LayerSums:
    """The sums of all layers."""
    padded = pad_targets(candidates.targets)
    distance, giou = _box_losses(candidates.boxes_cxcywh, padded, matching)
    counted = candidates.counted
    match class_loss:
        case CrossEntropy(no_object):
            if no_object == "paper":
                batch, queries = candidates.logits.shape[1:3]
                no_object = sum(map(len, candidates.targets.labels)) / (batch * queries)
            entropy, weight = _cross_entropy(
                candidates.logits, padded, matching, no_object, counted
            )
            return LayerSums(entropy, weight, distance, giou)
        case Focal(alpha, gamma):
            focal = _focal_loss(candidates.logits, padded, matching, alpha, gamma, counted)
            return LayerSums(focal, None, distance, giou)
        case _:
            assert_never(class_loss)


@torch.no_grad()
def last_layer_errors(candidates: Candidates, matching: Matching) -> dict[str, Tensor]:
    """Terms for the log alone, of the last layer.

    The percentage of the matched queries that miss their class (100 where nothing is matched, as in
    the public code), and the targets without a query.
    """
    logits, targets = candidates.logits, pad_targets(candidates.targets)
    first = len(matching.layer) - matching.pairs_per_layer
    picture, query, target = (
        axis[first:] for axis in (matching.picture, matching.query, matching.target)
    )
    right = logits[-1, picture, query].argmax(-1) == targets.labels[picture, target]
    error = 100 - 100 * right.float().mean() if len(right) else logits.new_full((), 100.0)
    unmatched = (targets.present.sum(1) - logits.shape[2]).clamp(min=0).sum().float()
    return {"class_error": error, "unmatched_targets": unmatched}


@torch.no_grad()
def cardinality_error(candidates: Candidates) -> Float[Tensor, " layers"]:
    """Mean difference of the numbers of found and of true objects, for the log alone.

    Found is where the last logit is not the largest. That means something with softmax scores only;
    the public code counts so with sigmoid scores too.
    """
    num_true = pad_targets(candidates.targets).present.sum(1)
    last = candidates.logits.shape[-1] - 1
    found = candidates.logits.argmax(-1) != last
    if candidates.counted is not None:
        found = found & candidates.counted
    num_found = found.sum(-1)
    return (num_found - num_true).abs().float().mean(1)


def _cross_entropy(
    logits: Float[Tensor, "layers batch queries classes"],
    targets: PaddedTargets,
    matching: Matching,
    no_object: float,
    counted: Bool[Tensor, "batch queries"] | None,
) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """Weighted sum of the cross-entropies of all queries and the sum of their weights, by layer."""
    last = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:-1], last, dtype=torch.int64, device=logits.device)
    places = (matching.layer, matching.picture, matching.query)
    wanted = wanted.index_put(places, targets.labels[matching.picture, matching.target])
    entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    weight = torch.where(wanted == last, no_object, 1.0)
    if counted is not None:
        weight = weight * counted
    return (entropy.view_as(weight) * weight).sum((1, 2)), weight.sum((1, 2))


def _focal_loss(
    logits: Float[Tensor, "layers batch queries classes"],
    targets: PaddedTargets,
    matching: Matching,
    alpha: float,
    gamma: float,
    counted: Bool[Tensor, "batch queries"] | None,
) -> Float[Tensor, " layers"]:
    """Sum of the focal losses of all queries and classes, by layer; there is no "no object"."""
    label = targets.labels[matching.picture, matching.target]
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    places = (matching.layer, matching.picture, matching.query, label)
    wanted = wanted.index_put(places, torch.ones_like(label, dtype=torch.bool))
    losses = focal_losses(logits, wanted, alpha, gamma).sum(-1)
    if counted is not None:
        losses = losses.masked_fill(~counted, 0.0)
    return losses.sum((1, 2))


def _box_losses(
    boxes_cxcywh: Float[Tensor, "layers batch queries 4"],
    targets: PaddedTargets,
    matching: Matching,
) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """Sums over matched pairs of the L1 distance and of 1 - GIoU, by layer."""
    found = boxes_cxcywh[matching.layer, matching.picture, matching.query]
    wanted = targets.boxes_cxcywh[matching.picture, matching.target]
    overlap = generalized_iou_pairs(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    return matching.by_layer((found - wanted).abs().sum(-1)), matching.by_layer(1 - overlap)
