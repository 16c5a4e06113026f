"""Matching: which query answers for which target, all layers and pictures at once (DETR, 3.1).

The costs of a query with the targets of its own picture are made on the device in float32, for all
layers in one go (the public code makes the product of all pictures, of which it uses one part in
the batch size), and copied to the host once; the assignment itself is scipy's, about 0.2 ms per
layer of 32 pictures with 10 targets.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.boxes import cxcywh_to_xyxy, generalized_iou
from models.settings import Settings
from models.structures import Targets

_NO_TARGET = torch.iinfo(torch.int64).min


class MatchingCosts(Settings):
    """How much each term of the matching cost counts."""

    classes: float = Field(default=1.0, ge=0)
    """Weight of minus the probability of the target's class."""
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


@torch.no_grad()
def match(
    logits: Float[Tensor, "layers batch queries classes"],
    boxes_cxcywh: Float[Tensor, "layers batch queries 4"],
    targets: Targets,
    costs: MatchingCosts,
) -> Matching:
    """The pairs of least total cost, per layer and picture: min(queries, targets) of them.

    The last logit is "no object". UnmatchableError names the layer and the picture of a cost that
    is not finite, or the label that is not a class. One copy from the device to the host.
    """
    counts = [len(labels) for labels in targets.labels]
    cost = _costs(logits, boxes_cxcywh, pad_targets(targets), costs).cpu().numpy()
    if not np.isfinite(cost).all():
        raise UnmatchableError(_complaint(cost, logits, boxes_cxcywh, targets))
    pairs: list[np.ndarray] = [np.empty((4, 0), dtype=np.int64)]
    for layer, of_pictures in enumerate(cost):
        for picture, count in enumerate(counts):
            query, target = linear_sum_assignment(of_pictures[picture, :, :count])
            place = np.broadcast_to([[layer], [picture]], (2, len(query)))
            pairs.append(np.concatenate((place, query[None], target[None])))
    indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(logits.device, non_blocking=True)
    layer_of, picture_of, query_of, target_of = indices.unbind(0)
    return Matching(layer_of, picture_of, query_of, target_of, num_layers=len(logits))


def pad_targets(targets: Targets) -> PaddedTargets:
    """The targets of all pictures as one tensor, without a copy between host and device."""
    labels = pad_sequence(list(targets.labels), batch_first=True, padding_value=_NO_TARGET)
    boxes = pad_sequence([boxes.float() for boxes in targets.boxes_cxcywh], batch_first=True)
    return PaddedTargets(labels, boxes, present=labels != _NO_TARGET)


def _costs(
    logits: Tensor, boxes_cxcywh: Tensor, targets: PaddedTargets, costs: MatchingCosts
) -> Float[Tensor, "layers batch queries targets"]:
    """Costs of every query with the targets of its picture; 0 where there is no target."""
    num_classes = logits.shape[-1] - 1
    with torch.autocast(logits.device.type, enabled=False):
        probability = logits.float().softmax(-1)
        labels = targets.labels.clamp(0, num_classes - 1)[None, :, None, :]
        class_cost = -probability.gather(-1, labels.expand(*probability.shape[:-1], -1))
        found = boxes_cxcywh.float()
        box_cost = (found[..., :, None, :] - targets.boxes_cxcywh[None, :, None]).abs().sum(-1)
        giou_cost = -generalized_iou(
            cxcywh_to_xyxy(found), cxcywh_to_xyxy(targets.boxes_cxcywh)[None]
        )
        cost = costs.boxes_l1 * box_cost + costs.classes * class_cost + costs.giou * giou_cost
    unknown = (targets.labels < 0) | (targets.labels >= num_classes)
    impossible = unknown | (targets.boxes_cxcywh[..., 2:] < 0).any(-1)
    cost = cost.masked_fill(impossible[:, None], torch.inf)
    return cost.masked_fill(~targets.present[:, None], 0.0)


def _complaint(cost: np.ndarray, logits: Tensor, boxes: Tensor, targets: Targets) -> str:
    """What is wrong with the first cost that is not finite, in one line."""
    layer, picture, query, target = (int(axis[0]) for axis in np.nonzero(~np.isfinite(cost)))
    label = int(targets.labels[picture][target])
    wanted = targets.boxes_cxcywh[picture][target]
    place = f"target {target} of picture {picture} of the batch"
    num_classes = logits.shape[-1] - 1
    if not 0 <= label < num_classes:
        return (
            f"{place} has label {label}, the classes are 0 to {num_classes - 1}; "
            "correct the labels or raise num_classes"
        )
    if not bool(wanted.isfinite().all()) or bool((wanted[2:] < 0).any()):
        return f"{place} has the box {_numbers(wanted)} (cx, cy, w, h); correct the annotation"
    return (
        f"no finite matching cost in decoder layer {layer}, picture {picture} of the batch: query "
        f"{query} says box {_numbers(boxes[layer, picture, query])} and logits "
        f"{_numbers(logits[layer, picture, query])}; the training diverged or weights are broken"
    )


def _numbers(values: Tensor) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:4].tolist())
    return f"({shown}, ...)" if len(values) > 4 else f"({shown})"
