"""Matching: which query answers for which target, all layers and pictures at once (DETR, 3.1).

The costs of a query with the targets of its own picture are made on the device in float32, for all
layers in one go (the public code makes the product of all pictures, of which it uses one part in
the batch size), and copied to the host once, whatever is matched; the assignment itself is scipy's,
about 0.2 ms per layer of 32 pictures with 10 targets. Class costs of sigmoid scores: Deformable
DETR's (Zhu et al., ICLR 2021, 4.2), the focal loss of yes less that of no.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, assert_never

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.boxes import cxcywh_to_xyxy, generalized_iou
from models.focal import focal_costs
from models.settings import Settings
from models.structures import Targets

ClassScores = Literal["softmax", "sigmoid"]
"""What logits say: one choice among the classes and "no object", the last logit (DETR); or yes or
no for each class by itself, without a logit of "no object" (Deformable DETR).
"""

_NEVER = 1e6
"""A cost above all others, in the place of infinity, which the assignment takes for an error."""

_NO_TARGET = torch.iinfo(torch.int64).min


class MatchingCosts(Settings):
    """How much each term of the matching cost counts."""

    classes: float = Field(default=1.0, ge=0)
    """Weight of minus the probability of the target's class; of focal costs with sigmoid scores."""
    boxes_l1: float = Field(default=5.0, ge=0)
    """Weight of the L1 distance of normalised cxcywh boxes."""
    giou: float = Field(default=2.0, ge=0)
    """Weight of minus the generalized IoU."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.classes or self.boxes_l1 or self.giou):
            raise ValueError(
                "classes=0, boxes_l1=0 and giou=0 match at random; give one of them a weight, "
                "e.g. classes=1"
            )
        return self


class UnmatchableError(ValueError):
    """Predictions or targets that no matching can be made of, such as NaN boxes."""


@dataclass(frozen=True)
class PaddedTargets:
    """The targets of a batch, every picture filled up to the number of the fullest one."""

    labels: Int64[Tensor, "batch targets"]
    boxes_cxcywh: Float[Tensor, "batch targets 4"]
    present: Bool[Tensor, "batch targets"]


@dataclass(frozen=True)
class Matching:
    """The matched pairs, as many in every layer, sorted by layer, then picture, then query."""

    layer: Int64[Tensor, " pairs"]
    picture: Int64[Tensor, " pairs"]
    query: Int64[Tensor, " pairs"]
    target: Int64[Tensor, " pairs"]
    """Position of the target among those of its picture."""
    num_layers: int

    @property
    def pairs_per_layer(self) -> int:
        """Pairs of each layer, over all pictures."""
        return len(self.layer) // self.num_layers

    def by_layer(self, values: Float[Tensor, " pairs"]) -> Float[Tensor, " layers"]:
        """The sum of one value per pair over the pairs of each layer."""
        return values.view(self.num_layers, self.pairs_per_layer).sum(1)


def with_layers(matching: Matching, others: Mapping[int, Matching]) -> Matching:
    """The same with the pairs of some layers replaced by those of matchings of one layer each.

    These must have as many pairs, as they do for as many queries and the same targets.
    """
    columns = torch.stack((matching.picture, matching.query, matching.target))
    parts = list(columns.view(3, matching.num_layers, matching.pairs_per_layer).unbind(1))
    for layer, other in others.items():
        if other.pairs_per_layer:
            parts[layer] = torch.stack((other.picture, other.query, other.target))
    picture, query, target = torch.cat(parts, dim=1)
    return replace(matching, picture=picture, query=query, target=target)


@dataclass(frozen=True)
class Candidates:
    """Predictions of one kind, layer by layer, and the targets that they are matched with."""

    places: tuple[str, ...]
    """What says each layer, for messages, e.g. "decoder layer 5"."""
    logits: Float[Tensor, "layers batch queries classes"]
    boxes_cxcywh: Float[Tensor, "layers batch queries 4"]
    targets: Targets
    counted: Bool[Tensor, "batch queries"] | None = None
    """False for queries that only fill up a batch: they get no target. None counts all."""


def match(
    logits: Float[Tensor, "layers batch queries classes"],
    boxes_cxcywh: Float[Tensor, "layers batch queries 4"],
    targets: Targets,
    costs: MatchingCosts,
    class_scores: ClassScores = "softmax",
) -> Matching:
    """The pairs of least total cost, per decoder layer and picture; see `match_all`."""
    places = decoder_places(len(logits))
    candidates = Candidates(places, logits, boxes_cxcywh, targets)
    (matching,) = match_all((candidates,), costs, class_scores)
    return matching


def decoder_places(num_layers: int) -> tuple[str, ...]:
    """What decoder layers are called in messages."""
    return tuple(f"decoder layer {layer}" for layer in range(num_layers))


@torch.no_grad()
def match_all(
    candidates: Sequence[Candidates], costs: MatchingCosts, class_scores: ClassScores
) -> tuple[Matching, ...]:
    """The pairs of least total cost, per layer and picture: min(counted queries, targets) of them.

    UnmatchableError names the layer and the picture of a cost that is not finite, or the label that
    is not a class. One copy from the device to the host, and one back, for all candidates.
    """
    on_device = [_own_costs(each, costs, class_scores) for each in candidates]
    on_host = torch.cat(on_device).cpu().numpy()
    if not np.isfinite(on_host).all():
        raise UnmatchableError(_first_complaint(candidates, on_device, costs, class_scores))
    ends = np.cumsum([len(each) for each in on_device])
    found = [
        _assign(each, part)
        for each, part in zip(candidates, np.split(on_host, ends[:-1]), strict=True)
    ]
    device = candidates[0].logits.device
    indices = torch.from_numpy(np.concatenate(found, axis=1)).to(device, non_blocking=True)
    parts = torch.split(indices, [pairs.shape[1] for pairs in found], dim=1)
    return tuple(
        Matching(pairs[0], pairs[1], pairs[2], pairs[3], num_layers=len(each.logits))
        for each, pairs in zip(candidates, parts, strict=True)
    )


def pad_targets(targets: Targets) -> PaddedTargets:
    """The targets of all pictures as one tensor, without a copy between host and device."""
    labels = pad_sequence(list(targets.labels), batch_first=True, padding_value=_NO_TARGET)
    boxes = pad_sequence([boxes.float() for boxes in targets.boxes_cxcywh], batch_first=True)
    return PaddedTargets(labels, boxes, present=labels != _NO_TARGET)


def num_classes_of(num_logits: int, class_scores: ClassScores) -> int:
    """The classes that so many logits speak of."""
    match class_scores:
        case "softmax":
            return num_logits - 1
        case "sigmoid":
            return num_logits
        case _:
            assert_never(class_scores)


def _own_costs(
    candidates: Candidates, costs: MatchingCosts, class_scores: ClassScores
) -> Float[Tensor, " entries"]:
    """The costs of each picture's own targets, (layers, queries, targets) picture by picture."""
    padded = _costs(candidates, pad_targets(candidates.targets), costs, class_scores)
    counts = [len(labels) for labels in candidates.targets.labels]
    return torch.cat(
        [padded[:, picture, :, :count].flatten() for picture, count in enumerate(counts)]
    )


def _assign(
    candidates: Candidates, costs: Float32[np.ndarray, " entries"]
) -> Int64[np.ndarray, "4 pairs"]:
    """Layer, picture, query and target of each pair, sorted by layer, then picture, then query."""
    layers, _, queries, _ = candidates.logits.shape
    counts = [len(labels) for labels in candidates.targets.labels]
    ends = np.cumsum([layers * queries * count for count in counts])
    by_picture = [
        part.reshape(layers, queries, count)
        for part, count in zip(np.split(costs, ends[:-1]), counts, strict=True)
    ]
    pairs: list[np.ndarray] = [np.empty((4, 0), dtype=np.int64)]
    for layer in range(layers):
        for picture, of_picture in enumerate(by_picture):
            query, target = linear_sum_assignment(of_picture[layer])
            if candidates.counted is not None:
                heard = of_picture[layer, query, target] < _NEVER
                query, target = query[heard], target[heard]
            place = np.broadcast_to([[layer], [picture]], (2, len(query)))
            pairs.append(np.concatenate((place, query[None], target[None])))
    return np.concatenate(pairs, axis=1)


def _costs(
    candidates: Candidates,
    targets: PaddedTargets,
    costs: MatchingCosts,
    class_scores: ClassScores,
) -> Float[Tensor, "layers batch queries targets"]:
    """Costs of every query with the targets of its picture; 0 where there is no target."""
    logits, found = candidates.logits.float(), candidates.boxes_cxcywh.float()
    num_classes = num_classes_of(logits.shape[-1], class_scores)
    with torch.autocast(logits.device.type, enabled=False):
        labels = targets.labels.clamp(0, num_classes - 1)[None, :, None, :]
        class_cost = _class_costs(logits, labels.expand(*logits.shape[:-1], -1), class_scores)
        box_cost = (found[..., :, None, :] - targets.boxes_cxcywh[None, :, None]).abs().sum(-1)
        giou_cost = -generalized_iou(
            cxcywh_to_xyxy(found), cxcywh_to_xyxy(targets.boxes_cxcywh)[None]
        )
        cost = costs.boxes_l1 * box_cost + costs.classes * class_cost + costs.giou * giou_cost
    unknown = (targets.labels < 0) | (targets.labels >= num_classes)
    impossible = unknown | (targets.boxes_cxcywh[..., 2:] < 0).any(-1)
    cost = cost.masked_fill(impossible[:, None], torch.inf)
    if candidates.counted is not None:
        cost = cost.masked_fill(~candidates.counted[..., None], _NEVER)
    return cost.masked_fill(~targets.present[:, None], 0.0)


def _class_costs(
    logits: Float[Tensor, "layers batch queries classes"],
    labels: Int64[Tensor, "layers batch queries targets"],
    class_scores: ClassScores,
) -> Float[Tensor, "layers batch queries targets"]:
    match class_scores:
        case "softmax":
            return -logits.softmax(-1).gather(-1, labels)
        case "sigmoid":
            return focal_costs(logits.gather(-1, labels))
        case _:
            assert_never(class_scores)


def _first_complaint(
    candidates: Sequence[Candidates],
    found: Sequence[Tensor],
    costs: MatchingCosts,
    class_scores: ClassScores,
) -> str:
    """What is wrong with the first cost that is not finite, in one line."""
    number = next(n for n, each in enumerate(found) if not bool(each.isfinite().all()))
    at = candidates[number]
    padded = _costs(at, pad_targets(at.targets), costs, class_scores)
    return _complaint(padded.cpu().numpy(), at, class_scores)


def _complaint(cost: np.ndarray, at: Candidates, class_scores: ClassScores) -> str:
    layer, picture, query, target = (int(axis[0]) for axis in np.nonzero(~np.isfinite(cost)))
    label = int(at.targets.labels[picture][target])
    wanted = at.targets.boxes_cxcywh[picture][target]
    place = f"target {target} of picture {picture} of the batch"
    num_classes = num_classes_of(at.logits.shape[-1], class_scores)
    if not 0 <= label < num_classes:
        return (
            f"{place} has label {label}, the classes are 0 to {num_classes - 1}; "
            "correct the labels or raise num_classes"
        )
    if not bool(wanted.isfinite().all()) or bool((wanted[2:] < 0).any()):
        return f"{place} has the box {_numbers(wanted)} (cx, cy, w, h); correct the annotation"
    return (
        f"no finite matching cost in {at.places[layer]}, picture {picture} of the batch: query "
        f"{query} says box {_numbers(at.boxes_cxcywh[layer, picture, query])} and logits "
        f"{_numbers(at.logits[layer, picture, query])}; the training diverged or weights are broken"
    )


def _numbers(values: Tensor) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:4].tolist())
    return f"({shown}, ...)" if len(values) > 4 else f"({shown})"
