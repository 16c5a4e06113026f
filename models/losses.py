"""The set criterion (DETR, section 3.1) and feature reconstruction (UP-DETR, section 3.3).

Every decoder layer is matched and supervised for itself; all layers are computed in one go. Terms
have the names of the public code: the last layer bare (`loss_ce`), layer l with the suffix `_l`.
With sigmoid scores the class term is the focal loss over the number of targets (Deformable DETR).
Everything is float32 whatever the autocast. What tokens say: `models.detection_losses`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from models.matching import (
    Candidates,
    ClassScores,
    Matching,
    MatchingCosts,
    decoder_places,
    match_all,
    with_layers,
)
from models.set_sums import (
    ClassLoss,
    CrossEntropy,
    Focal,
    LayerSums,
    cardinality_error,
    last_layer_errors,
    layer_sums,
)
from models.settings import Settings
from models.shares import Share, counts_of
from models.structures import GroupOutput, Losses, Targets


class LossWeights(Settings):
    """How much each term of the loss counts, in every decoder layer."""

    classes: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy over the classes and "no object", or of the focal loss."""
    boxes_l1: float = Field(default=5.0, ge=0)
    """Weight of the L1 distance of matched boxes, normalised cxcywh."""
    giou: float = Field(default=2.0, ge=0)
    """Weight of 1 - generalized IoU of matched boxes."""
    features: float = Field(default=1.0, ge=0)
    """Weight of the squared distance (0 to 4) of normalised features, reconstructed and true."""
    no_object: Annotated[float, Field(ge=0)] | Literal["paper"] = 0.1
    """Weight of "no object" in the cross-entropy; "paper" is targets per query (M/N)."""
    focal_alpha: float = Field(default=0.25, ge=0, le=1)
    """Sigmoid scores: weight of the true class in the focal loss; the others have 1 - alpha."""
    focal_gamma: float = Field(default=2.0, ge=1)
    """Sigmoid scores: how fast an answer counts less as it gets right, (1 - probability)^gamma."""
    selection: float = Field(default=1.0, ge=0)
    """Weight of the scoring network's loss (Sparse DETR): which tokens will the decoder read?"""

    def class_loss(self, class_scores: ClassScores) -> ClassLoss:
        """What wrong classes cost, for logits of this meaning."""
        match class_scores:
            case "softmax":
                return CrossEntropy(self.no_object)
            case "sigmoid":
                return Focal(self.focal_alpha, self.focal_gamma)
            case _:
                assert_never(class_scores)


@dataclass(frozen=True)
class Reconstruction:
    """Patch features as the queries reconstruct them, beside the true ones."""

    predicted: Float[Tensor, "layers batch queries channels"]
    true: Float[Tensor, "batch patches channels"]
    """One per target, in the order of the targets."""


@dataclass(frozen=True)
class Supervised:
    """Predictions of one kind, layer by layer, and what they are held against; all float32."""

    suffixes: tuple[str, ...]
    """What the names of each layer's terms end in."""
    candidates: Candidates
    reconstruction: Reconstruction | None = None

    @property
    def num_queries(self) -> int:
        """Queries, or tokens, of each picture."""
        return self.candidates.logits.shape[2]


def set_losses(
    group: GroupOutput,
    targets: Targets,
    weights: LossWeights,
    costs: MatchingCosts,
    *,
    class_scores: ClassScores = "softmax",
    reconstruction: Reconstruction | None = None,
    share: Share | None = None,
    blank: bool = False,
    assigned: Mapping[int, Matching] | None = None,
) -> Losses:
    """The loss of one query group, and every term by name.

    Sums over matched pairs and the focal loss are divided by the number of targets (at least 1),
    the cross-entropy by the sum of its weights. Where the pictures are a part of a batch, `share`
    says of what: all terms are then this part's shares of those of the whole batch. A `blank` part
    adds nothing to any of them, though its graph is complete. `class_error` (percent),
    `cardinality_error` and `unmatched_targets` (those beyond the number of queries) are logged
    only. `assigned` are the pairs of layers, each a matching of one layer, that are not matched for
    themselves. UnmatchableError as in `match`.
    """
    decoder = decoder_layers(group, targets, reconstruction)
    share = share or Share(counts_of(targets, decoder.num_queries, blank=blank))
    return supervised_losses(
        (decoder,), targets, weights, costs, class_scores, share, blank=blank, assigned=assigned
    )


def decoder_layers(
    group: GroupOutput, targets: Targets, reconstruction: Reconstruction | None = None
) -> Supervised:
    """What the decoder layers say of a group's queries; the last layer's terms have bare names."""
    last = len(group.layers) - 1
    candidates = Candidates(
        places=decoder_places(last + 1),
        logits=torch.stack([layer.logits.float() for layer in group.layers]),
        boxes_cxcywh=torch.stack([layer.boxes.float() for layer in group.layers]),
        targets=targets,
    )
    suffixes = (*(f"_{layer}" for layer in range(last)), "")
    return Supervised(suffixes, candidates, reconstruction)


def supervised_losses(
    supervised: Sequence[Supervised],
    targets: Targets,
    weights: LossWeights,
    costs: MatchingCosts,
    class_scores: ClassScores,
    share: Share,
    *,
    blank: bool = False,
    scoring: Float[Tensor, " batch"] | None = None,
    assigned: Mapping[int, Matching] | None = None,
) -> Losses:
    """The weighted sum of all terms; the first of `supervised` is the decoder's.

    `scoring` is the loss of each picture's token scores (`models.selection_losses`), `assigned` as
    in `set_losses`.
    """
    decoder = supervised[0].candidates
    counted = 0.0 if blank else 1.0
    with torch.autocast(decoder.logits.device.type, enabled=False):
        own, *of_tokens = match_all([each.candidates for each in supervised], costs, class_scores)
        matchings = (with_layers(own, assigned or {}), *of_tokens)
        class_loss = weights.class_loss(class_scores)
        weight_of = _weights_by_name(weights)
        weighted: list[Tensor] = []
        errors = last_layer_errors(decoder, matchings[0], share)
        named = {name: counted * error for name, error in errors.items()}
        for number, (each, matching) in enumerate(zip(supervised, matchings, strict=True)):
            matched = share.matched if number == 0 else _matched_tokens(targets, matching, share)
            sums = layer_sums(each.candidates, matching, matched, class_loss, share)
            terms = _terms(sums, share, counted)
            if each.reconstruction is not None:
                feature = _feature_loss(each.reconstruction, matching)
                terms["loss_feature"] = share.of_targets(counted * feature)
            weighted += [weight_of[name] * term.sum() for name, term in terms.items()]
            terms["cardinality_error"] = counted * cardinality_error(each.candidates, share)
            named |= _named_by_layer(terms, each.suffixes)
        if scoring is not None:
            term = share.of_pictures(counted * scoring.float().sum())
            weighted.append(weights.selection * term)
            named["loss_mask_prediction"] = term.detach()
    return Losses(torch.stack(weighted).sum(), named)


def _matched_tokens(targets: Targets, matching: Matching, share: Share) -> Float[Tensor, ""]:
    """Targets of the whole batch that get a token: all but those that are left over here."""
    left_over = sum(len(labels) for labels in targets.labels) - matching.pairs_per_layer
    return share.targets - left_over


def _terms(sums: LayerSums, share: Share, counted: float) -> dict[str, Float[Tensor, " layers"]]:
    if sums.class_weight is None:
        classes = share.of_targets(counted * sums.classes)
    else:
        by_weight = (sums.class_weight / share.workers).clamp(min=torch.finfo(torch.float32).tiny)
        classes = counted * sums.classes / by_weight
    return {
        "loss_ce": classes,
        "loss_bbox": share.of_targets(counted * sums.distance),
        "loss_giou": share.of_targets(counted * sums.giou),
    }


def _weights_by_name(weights: LossWeights) -> dict[str, float]:
    return {
        "loss_ce": weights.classes,
        "loss_bbox": weights.boxes_l1,
        "loss_giou": weights.giou,
        "loss_feature": weights.features,
    }


def _feature_loss(reconstruction: Reconstruction, matching: Matching) -> Float[Tensor, " layers"]:
    """Sums over matched pairs of |p / |p| - t / |t||^2, by layer."""
    predicted = reconstruction.predicted[matching.layer, matching.picture, matching.query]
    true = reconstruction.true[matching.picture, matching.target]
    difference = F.normalize(predicted.float(), dim=-1) - F.normalize(true.float(), dim=-1)
    return matching.by_layer(difference.square().sum(-1))


def _named_by_layer(
    terms: Mapping[str, Float[Tensor, " layers"]], suffixes: Sequence[str]
) -> dict[str, Tensor]:
    """Each layer's value under the name with its suffix, without a graph."""
    return {
        name + suffix: value
        for name, values in terms.items()
        for suffix, value in zip(suffixes, values.detach().unbind(0), strict=True)
    }
