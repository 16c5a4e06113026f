"""The set criterion (DETR, section 3.1) and feature reconstruction (UP-DETR, section 3.3).

Every decoder layer is matched and supervised for itself; all layers are computed in one go. Terms
have the names of the public code: the last layer bare (`loss_ce`), layer l with the suffix `_l`.
Everything is float32 whatever the autocast.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, generalized_iou_pairs
from models.matching import Matching, MatchingCosts, PaddedTargets, match, pad_targets
from models.settings import Settings
from models.structures import GroupOutput, Losses, Targets


class LossWeights(Settings):
    """How much each term of the loss counts, in every decoder layer."""

    classes: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy over the classes and "no object"."""
    boxes_l1: float = Field(default=5.0, ge=0)
    """Weight of the L1 distance of matched boxes, normalised cxcywh."""
    giou: float = Field(default=2.0, ge=0)
    """Weight of 1 - generalized IoU of matched boxes."""
    features: float = Field(default=1.0, ge=0)
    """Weight of the squared distance (0 to 4) of normalised features, reconstructed and true."""
    no_object: Annotated[float, Field(ge=0)] | Literal["paper"] = 0.1
    """Weight of "no object" in the cross-entropy; "paper" is targets per query (M/N)."""


@dataclass(frozen=True)
class Reconstruction:
    """Patch features as the queries reconstruct them, beside the true ones."""

    predicted: Float[Tensor, "layers batch queries channels"]
    true: Float[Tensor, "batch patches channels"]
    """One per target, in the order of the targets."""


def set_losses(
    group: GroupOutput,
    targets: Targets,
    weights: LossWeights,
    costs: MatchingCosts,
    *,
    reconstruction: Reconstruction | None = None,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
    world_size: int = 1,
    blank: bool = False,
) -> Losses:
    """The loss of one query group, and every term by name.

    Sums over matched pairs are divided by the number of targets (at least 1), the cross-entropy by
    the sum of its weights. Over several ranks both divisors are those of all ranks (`reduce_sum`)
    over `world_size`, so that averaged gradients are those of one process with the whole batch. A
    `blank` batch adds nothing to any sum, though its graph is complete. `class_error` (percent),
    `cardinality_error` and `unmatched_targets` (those beyond the number of queries) are logged
    only, for this rank. UnmatchableError as in `match`.
    """
    counted = 0.0 if blank else 1.0
    with torch.autocast(group.layers[0].logits.device.type, enabled=False):
        logits = torch.stack([layer.logits.float() for layer in group.layers])
        boxes = torch.stack([layer.boxes.float() for layer in group.layers])
        matching = match(logits, boxes, targets, costs)
        padded = pad_targets(targets)
        num_targets = sum(len(labels) for labels in targets.labels)

        no_object = _no_object_weight(weights, num_targets, logits)
        entropy, entropy_weight = _cross_entropy(logits, padded, matching, no_object)
        divisors = torch.cat((entropy_weight, entropy.new_full((1,), num_targets))) * counted
        if reduce_sum is not None:
            divisors = reduce_sum(divisors)
        by_weight = (divisors[:-1] / world_size).clamp(min=torch.finfo(torch.float32).tiny)
        by_targets = divisors[-1].clamp(min=1) / world_size

        distance, giou = _box_losses(boxes, padded, matching)
        terms = {
            "loss_ce": counted * entropy / by_weight,
            "loss_bbox": counted * distance / by_targets,
            "loss_giou": counted * giou / by_targets,
        }
        if reconstruction is not None:
            feature = _feature_loss(reconstruction, matching)
            terms["loss_feature"] = counted * feature / by_targets
        weight_of = {
            "loss_ce": weights.classes,
            "loss_bbox": weights.boxes_l1,
            "loss_giou": weights.giou,
            "loss_feature": weights.features,
        }
        total = torch.stack([weight_of[name] * term.sum() for name, term in terms.items()]).sum()
        detached = {name: term.detach() for name, term in terms.items()}
    return Losses(total, _named_by_layer(detached) | _logged_terms(logits, padded, matching))


def unmatched_losses(
    group: GroupOutput,
    *,
    others: Sequence[Tensor] = (),
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """What stands in for `set_losses` where nothing can be matched (UnmatchableError).

    A total of NaN that reaches every parameter behind the group and `others`, and this rank's part
    in the ranks' sum: the loop then leaves the step out on all ranks alike, where an exception
    would end one of them and leave the others waiting.
    """
    if reduce_sum is not None:
        counts = torch.zeros(len(group.layers) + 1, device=group.layers[0].logits.device)
        reduce_sum(counts)
    said = [tensor for layer in group.layers for tensor in (layer.logits, layer.boxes)]
    return Losses(torch.stack([t.float().sum() for t in (*said, *others)]).sum() * torch.nan)


def _no_object_weight(weights: LossWeights, num_targets: int, logits: Tensor) -> float:
    if weights.no_object != "paper":
        return weights.no_object
    batch, queries = logits.shape[1:3]
    return num_targets / (batch * queries)


def _cross_entropy(
    logits: Float[Tensor, "layers batch queries classes"],
    targets: PaddedTargets,
    matching: Matching,
    no_object: float,
) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """Weighted sum of the cross-entropies of all queries and the sum of their weights, by layer."""
    last = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:-1], last, dtype=torch.int64, device=logits.device)
    places = (matching.layer, matching.picture, matching.query)
    wanted = wanted.index_put(places, targets.labels[matching.picture, matching.target])
    entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    weight = torch.where(wanted == last, no_object, 1.0)
    return (entropy.view_as(weight) * weight).sum((1, 2)), weight.sum((1, 2))


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


def _feature_loss(reconstruction: Reconstruction, matching: Matching) -> Float[Tensor, " layers"]:
    """Sums over matched pairs of |p / |p| - t / |t||^2, by layer."""
    predicted = reconstruction.predicted[matching.layer, matching.picture, matching.query]
    true = reconstruction.true[matching.picture, matching.target]
    difference = F.normalize(predicted.float(), dim=-1) - F.normalize(true.float(), dim=-1)
    return matching.by_layer(difference.square().sum(-1))


@torch.no_grad()
def _logged_terms(
    logits: Float[Tensor, "layers batch queries classes"],
    targets: PaddedTargets,
    matching: Matching,
) -> dict[str, Tensor]:
    """Terms for the log alone.

    The percentage of the last layer's matched queries that miss their class (100 where nothing is
    matched, as in the public code), the mean difference of the numbers of found and of true
    objects, and the targets without a query.
    """
    first = len(matching.layer) - matching.pairs_per_layer
    picture, query, target = (
        axis[first:] for axis in (matching.picture, matching.query, matching.target)
    )
    right = logits[-1, picture, query].argmax(-1) == targets.labels[picture, target]
    error = 100 - 100 * right.float().mean() if len(right) else logits.new_full((), 100.0)

    num_true = targets.present.sum(1)
    num_found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    cardinality = (num_found - num_true).abs().float().mean(1)
    unmatched = (num_true - logits.shape[2]).clamp(min=0).sum().float()
    return {
        "class_error": error,
        "unmatched_targets": unmatched,
        **_named_by_layer({"cardinality_error": cardinality}),
    }


def _named_by_layer(terms: Mapping[str, Float[Tensor, " layers"]]) -> dict[str, Tensor]:
    """The last layer's value under the bare name, layer l's with the suffix `_l`."""
    named: dict[str, Tensor] = {}
    for name, values in terms.items():
        *others, last = values.unbind(0)
        named[name] = last
        named |= {f"{name}_{layer}": value for layer, value in enumerate(others)}
    return named
