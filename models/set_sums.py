"""Sums of the set criterion over queries and over matched pairs, by layer, and class weights.

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
from models.shares import Share


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
    """The sums over the pictures of one part of a batch; nothing is divided."""

    classes: Float[Tensor, " layers"]
    class_weight: Float[Tensor, ""] | None
    """What `classes` is divided by, of the whole batch; None where that is the number of targets.
    """
    distance: Float[Tensor, " layers"]
    giou: Float[Tensor, " layers"]


def layer_sums(
    candidates: Candidates,
    matching: Matching,
    matched: Float[Tensor, ""],
    class_loss: ClassLoss,
    share: Share,
) -> LayerSums:
    """The sums of all layers; `matched` are the pairs per layer of the whole batch."""
    padded = pad_targets(candidates.targets)
    distance, giou = _box_losses(candidates.boxes_cxcywh, padded, matching)
    counted = candidates.counted
    match class_loss:
        case CrossEntropy(no_object):
            queries = share.pictures.clamp(min=1) * candidates.logits.shape[2]
            weight = share.targets / queries if no_object == "paper" else no_object
            entropy = _cross_entropy(candidates.logits, padded, matching, weight, counted)
            heard = _queries_per_picture(candidates) * share.pictures
            return LayerSums(entropy, matched + weight * (heard - matched), distance, giou)
        case Focal(alpha, gamma):
            focal = _focal_loss(candidates.logits, padded, matching, alpha, gamma, counted)
            return LayerSums(focal, None, distance, giou)
        case _:
            assert_never(class_loss)


@torch.no_grad()
def last_layer_errors(
    candidates: Candidates, matching: Matching, share: Share
) -> dict[str, Tensor]:
    """Terms for the log alone, of the last layer, as shares of those of the whole batch.

    The percentage of the matched queries that miss their class (100 where nothing is matched, as in
    the public code), and the targets without a query.
    """
    logits, targets = candidates.logits, pad_targets(candidates.targets)
    first = len(matching.layer) - matching.pairs_per_layer
    picture, query, target = (
        axis[first:] for axis in (matching.picture, matching.query, matching.target)
    )
    wrong = logits[-1, picture, query].argmax(-1) != targets.labels[picture, target]
    of_matched = wrong.sum() * share.workers / share.matched.clamp(min=1)
    of_pictures = share.of_pictures(logits.new_full((), logits.shape[1]))
    unmatched = (targets.present.sum(1) - logits.shape[2]).clamp(min=0).sum().float()
    return {
        "class_error": 100 * torch.where(share.matched > 0, of_matched, of_pictures),
        "unmatched_targets": share.workers * unmatched,
    }


@torch.no_grad()
def cardinality_error(candidates: Candidates, share: Share) -> Float[Tensor, " layers"]:
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
    return share.of_pictures((num_found - num_true).abs().float().sum(1))


def _cross_entropy(
    logits: Float[Tensor, "layers batch queries classes"],
    targets: PaddedTargets,
    matching: Matching,
    no_object: float | Float[Tensor, ""],
    counted: Bool[Tensor, "batch queries"] | None,
) -> Float[Tensor, " layers"]:
    """Weighted sum of the cross-entropies of all queries, by layer."""
    last = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:-1], last, dtype=torch.int64, device=logits.device)
    places = (matching.layer, matching.picture, matching.query)
    wanted = wanted.index_put(places, targets.labels[matching.picture, matching.target])
    entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    weight = torch.where(wanted == last, no_object, 1.0)
    if counted is not None:
        weight = weight * counted
    return (entropy.view_as(weight) * weight).sum((1, 2))


def _queries_per_picture(candidates: Candidates) -> int | Float[Tensor, ""]:
    """As many in every picture; where pictures differ (selected tokens), the mean of this part."""
    if candidates.counted is None:
        return candidates.logits.shape[2]
    return candidates.counted.sum(1).float().mean()


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
