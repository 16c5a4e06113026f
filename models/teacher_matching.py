"""Which query of a teacher answers for which query of a student (D3ETR, adaptive matching).

Decoder outputs have no order, so that a student's query has no partner by its number. For every
picture and decoder layer the pairs of least total distance of soft classes and boxes are found
(Chen et al., IJCAI 2024, section 4; the class term is the Kullback-Leibler divergence, which is our
reading). Costs are made on the device in float32, layer by layer, and copied to the host once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, generalized_iou
from models.matching import ClassScores, UnmatchableError
from models.settings import Settings
from models.soft_labels import cross_entropies, entropies


class TeacherCosts(Settings):
    """How much each term counts between what a student and what its teacher say."""

    classes: float = Field(default=1.0, ge=0)
    """Weight of the divergence of the class probabilities, KL(teacher, student)."""
    boxes_l1: float = Field(default=5.0, ge=0)
    """Weight of the L1 distance of normalised cxcywh boxes."""
    giou: float = Field(default=2.0, ge=0)
    """Weight of 1 - generalized IoU."""


@dataclass(frozen=True)
class SoftAnswers:
    """What a teacher says of a batch, layer by layer, in the student's classes."""

    probabilities: Float[Tensor, "layers batch queries classes"]
    """Of each class by itself (sigmoid), or of the classes and "no object", the last (softmax)."""
    boxes_cxcywh: Float[Tensor, "layers batch queries 4"]


@torch.no_grad()
def match_teacher(
    logits: Float[Tensor, "layers batch students classes"],
    boxes_cxcywh: Float[Tensor, "layers batch students 4"],
    teacher: SoftAnswers,
    costs: TeacherCosts,
    class_scores: ClassScores,
) -> Int64[Tensor, "layers batch students"]:
    """The teacher's query for each query of the student, no one twice, for each layer by itself.

    A teacher may have more queries; those left over answer for nobody. ValueError where it has
    fewer; UnmatchableError names the layer and picture of costs that are not finite. One copy from
    the device to the host, and one back, for all layers.
    """
    layers, batch, students, _ = logits.shape
    teachers = teacher.boxes_cxcywh.shape[2]
    if teachers < students:
        raise ValueError(
            f"the teacher has {teachers} queries for {students} of the student; adaptive matching "
            "needs as many at least: use distill.adaptive=false, or model.num_queries="
            f"{teachers}"
        )
    on_device = logits.new_empty((layers, batch, students, teachers), dtype=torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        for layer in range(layers):
            on_device[layer] = _costs(
                logits[layer].float(),
                boxes_cxcywh[layer].float(),
                teacher.probabilities[layer].float(),
                teacher.boxes_cxcywh[layer].float(),
                costs,
                class_scores,
            )
    on_host = on_device.cpu().numpy()
    broken = np.argwhere(~np.isfinite(on_host))
    if len(broken):
        layer, picture, *_ = (int(axis) for axis in broken[0])
        raise UnmatchableError(
            f"no finite distance from the teacher in decoder layer {layer}, picture {picture} of "
            "the batch; the training diverged or weights are broken"
        )
    partners = np.empty((layers, batch, students), dtype=np.int64)
    for layer in range(layers):
        for picture in range(batch):
            _, partners[layer, picture] = linear_sum_assignment(on_host[layer, picture])
    return torch.from_numpy(partners).to(logits.device, non_blocking=True)


def _costs(
    logits: Float[Tensor, "batch students classes"],
    boxes: Float[Tensor, "batch students 4"],
    probabilities: Float[Tensor, "batch teachers classes"],
    teacher_boxes: Float[Tensor, "batch teachers 4"],
    costs: TeacherCosts,
    class_scores: ClassScores,
) -> Float[Tensor, "batch students teachers"]:
    divergence = cross_entropies(logits, probabilities, class_scores)
    # Not a constant where teachers outnumber students: without it sure ones would be cheaper.
    divergence = divergence - entropies(probabilities, class_scores)[:, None]
    distance = torch.cdist(boxes, teacher_boxes, p=1)
    overlap = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(teacher_boxes))
    return costs.classes * divergence + costs.boxes_l1 * distance + costs.giou * (1 - overlap)
