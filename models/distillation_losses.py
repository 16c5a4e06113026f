"""What a student's decoder learns from its teacher's (D3ETR, Chen et al., IJCAI 2024, section 4).

Predictions, self-attention and cross-attention of every layer, of the student's own queries with
the partners that were matched to them (group `main`), and of the teacher's queries in the student's
decoder with themselves (group `aux`). Terms are named kd/GROUP/TERM/layerL, L = 0 the first, and
are shares of the means over the pictures of the whole batch (`models.shares`). Everything is
float32 whatever the autocast. Distances and weights are our reading (docs/distillation.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from models.attention_distances import (
    AttentionDistance,
    among_partners,
    of_partners,
    resampled,
    row_distances,
    token_shares,
)
from models.boxes import cxcywh_to_xyxy, generalized_iou_pairs
from models.matching import ClassScores
from models.settings import Settings
from models.shares import Share
from models.soft_labels import divergences
from models.structures import GroupOutput, LayerOutput, Memory, SampledAttention
from models.teacher_matching import SoftAnswers

DistilledGroup = Literal["main", "aux"]
"""The student's own queries, or the teacher's in its decoder."""

_USUAL_SELF = {"mse": 33.0, "kl": 1.0}
_USUAL_CROSS = {"mse": 1.0, "kl": 1.0}


class PredictionWeights(Settings):
    """How much the distance from what the teacher says counts, in every layer."""

    classes: float = Field(default=1.0, ge=0)
    """Weight of KL(teacher, student) of the classes, mean over the queries."""
    boxes_l1: float = Field(default=5.0, ge=0)
    """Weight of the L1 distance of normalised cxcywh boxes, mean over the queries."""
    giou: float = Field(default=2.0, ge=0)
    """Weight of 1 - generalized IoU, mean over the queries."""
    queries: Literal["alike", "confidence"] = "alike"
    """All queries count alike (the paper, as far as is known), or by the teacher's best class."""


class AttentionWeights(Settings):
    """How much the distance from where the teacher looks counts, in every layer."""

    weight: Annotated[float, Field(ge=0)] | None = None
    """0 records and compares nothing; null is 33 (self-attention) or 1 for mse, and 1 for kl."""
    distance: AttentionDistance = "mse"
    """Of two rows: sum of squares, or Kullback-Leibler divergence; mean over queries and heads."""


class DistillationWeights(Settings):
    """How much each part of what a teacher shows counts."""

    prediction: PredictionWeights = PredictionWeights()
    """What it says."""
    self_attention: AttentionWeights = AttentionWeights()
    """How its queries look at each other."""
    cross_attention: AttentionWeights = AttentionWeights()
    """Where in the picture they look."""

    @property
    def of_self(self) -> float:
        """Weight of self-attention."""
        return _weight(self.self_attention, _USUAL_SELF)

    @property
    def of_cross(self) -> float:
        """Weight of cross-attention."""
        return _weight(self.cross_attention, _USUAL_CROSS)

    @property
    def records(self) -> bool:
        """Whether attention has to be recorded."""
        return self.of_self > 0 or self.of_cross > 0


@dataclass(frozen=True)
class Shown:
    """What a teacher shows of a batch."""

    answers: SoftAnswers
    """In the student's classes; one layer for each of the student's."""
    layers: tuple[LayerOutput, ...]
    """The teacher's layers that these are of, with their attention where it is recorded."""
    memory: Memory


@dataclass(frozen=True)
class Distilled:
    """The weighted sum that is differentiated, and the terms by name, unweighted."""

    total: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]]


def layer_pairs(
    students: int, teachers: int, layer_map: Literal["aligned"] | Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """For each of the student's layers the teacher's that it learns from, counted from 0.

    Aligned: last from last, and the others at the same share of the depth. ValueError where a map
    leaves out a layer of the student, or names one that is not there.
    """
    match layer_map:
        case "aligned":
            return tuple(
                max(0, round((layer + 1) * teachers / students) - 1) for layer in range(students)
            )
        case pairs:
            found = dict(pairs)
            if sorted(found) != list(range(students)) or len(found) != len(pairs):
                raise ValueError(
                    f"distill.layer_map={[list(pair) for pair in pairs]} must name each of the "
                    f"student's decoder layers 0 to {students - 1} once, as [student, teacher]"
                )
            if not all(0 <= layer < teachers for layer in found.values()):
                raise ValueError(
                    f"distill.layer_map={[list(pair) for pair in pairs]} names decoder layers that "
                    f"the teacher has not: its layers are 0 to {teachers - 1}"
                )
            return tuple(found[layer] for layer in range(students))


def distillation_losses(
    group: DistilledGroup,
    student: GroupOutput,
    memory: Memory,
    shown: Shown,
    partners: Int64[Tensor, "layers batch queries"] | None,
    weights: DistillationWeights,
    class_scores: ClassScores,
    share: Share,
    *,
    blank: bool = False,
) -> Distilled:
    """The distance of one group from the teacher, in all layers.

    `partners` are the teacher's queries for the student's; None where query n's partner is n. A
    `blank` part adds nothing, though its graph is complete.
    """
    weighted: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    counted = 0.0 if blank else 1.0
    with torch.autocast(student.layers[0].logits.device.type, enabled=False):
        for number, layer in enumerate(student.layers):
            chosen = None if partners is None else partners[number]
            said = _prediction(layer, shown.answers, number, chosen, weights, class_scores)
            looked = _attention(layer, memory, shown, number, chosen, weights)
            for name, (weight, by_picture) in (said | looked).items():
                term = share.of_pictures(counted * by_picture.sum())
                weighted.append(weight * term)
                terms[f"kd/{group}/{name}/layer{number}"] = term.detach()
    return Distilled(torch.stack(weighted).sum(), terms)


_Terms = dict[str, tuple[float, Float[Tensor, " batch"]]]
"""Weight and value of each picture, by the name of the term."""


def _prediction(
    layer: LayerOutput,
    answers: SoftAnswers,
    number: int,
    partners: Int64[Tensor, "batch queries"] | None,
    weights: DistillationWeights,
    class_scores: ClassScores,
) -> _Terms:
    wanted, boxes = answers.probabilities[number], answers.boxes_cxcywh[number].float()
    if partners is not None:
        wanted, boxes = _taken(wanted, partners), _taken(boxes, partners)
    found = layer.boxes.float()
    counts = _query_weights(wanted, weights.prediction, class_scores)
    overlap = generalized_iou_pairs(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))
    own = weights.prediction
    return {
        "pred_cls": (
            own.classes,
            (counts * divergences(layer.logits.float(), wanted, class_scores)).mean(1),
        ),
        "pred_l1": (own.boxes_l1, (counts * (found - boxes).abs().sum(-1)).mean(1)),
        "pred_giou": (own.giou, (counts * (1 - overlap)).mean(1)),
    }


def _query_weights(
    probabilities: Float[Tensor, "batch queries classes"],
    weights: PredictionWeights,
    class_scores: ClassScores,
) -> Float[Tensor, "batch #queries"]:
    """Of each query; their mean over a picture is 1."""
    match weights.queries:
        case "alike":
            return probabilities.new_ones((len(probabilities), 1))
        case "confidence":
            known = probabilities[..., :-1] if class_scores == "softmax" else probabilities
            best = known.amax(-1)
            return best / best.mean(1, keepdim=True).clamp(min=torch.finfo(best.dtype).tiny)
        case _:
            assert_never(weights.queries)


def _attention(
    layer: LayerOutput,
    memory: Memory,
    shown: Shown,
    number: int,
    partners: Int64[Tensor, "batch queries"] | None,
    weights: DistillationWeights,
) -> _Terms:
    theirs, terms = shown.layers[number], _Terms()
    if weights.of_self > 0:
        assert layer.self_attention is not None
        assert theirs.self_attention is not None
        wanted = theirs.self_attention
        if partners is not None:
            wanted = among_partners(wanted, partners)
        distance = weights.self_attention.distance
        terms["self"] = (weights.of_self, row_distances(layer.self_attention, wanted, distance))
    if weights.of_cross > 0:
        ours, wanted = _cross_maps(layer, memory, theirs, shown.memory, partners)
        distance = weights.cross_attention.distance
        terms["cross"] = (weights.of_cross, row_distances(ours, wanted, distance))
    return terms


def _cross_maps(
    layer: LayerOutput,
    memory: Memory,
    theirs: LayerOutput,
    their_memory: Memory,
    partners: Int64[Tensor, "batch queries"] | None,
) -> tuple[Float[Tensor, "batch heads rows tokens"], Float[Tensor, "batch others rows tokens"]]:
    """Both maps with the same rows over the same tokens; of sampled attention one row for all."""
    match layer.cross_attention, theirs.cross_attention:
        case SampledAttention() as ours, SampledAttention() as their_points:
            if memory.spatial_shapes != their_memory.spatial_shapes:
                raise ValueError(
                    f"the teacher's feature maps are {their_memory.spatial_shapes} for the same "
                    f"pictures, the student's {memory.spatial_shapes}: where deformable attention "
                    "looks can only be compared on equal maps; use distill.cross_attention.weight=0"
                )
            if partners is not None:
                their_points = _chosen(their_points, partners)
            shares = [token_shares(each, memory.spatial_shapes) for each in (ours, their_points)]
            return shares[0][:, :, None], shares[1][:, :, None]
        case Tensor() as our_map, Tensor() as wanted:
            if partners is not None:
                wanted = of_partners(wanted, partners)
            (from_shape,), (to_shape,) = their_memory.spatial_shapes, memory.spatial_shapes
            return our_map, resampled(wanted, from_shape, to_shape, memory.padding)
        case _:
            raise AssertionError("checked by finetune.teacher before")


def _chosen(
    sampled: SampledAttention, partners: Int64[Tensor, "batch queries"]
) -> SampledAttention:
    return SampledAttention(
        locations=_taken(sampled.locations, partners), weights=_taken(sampled.weights, partners)
    )


def _taken(
    values: Float[Tensor, "batch teachers *rest"], partners: Int64[Tensor, "batch queries"]
) -> Float[Tensor, "batch queries *rest"]:
    """The values of the partners."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, partners]


def _weight(weights: AttentionWeights, usual: Mapping[str, float]) -> float:
    return usual[weights.distance] if weights.weight is None else weights.weight
