"""Does it learn? Patch detection on held-out pictures, so that nobody need read it off a loss.

What one picture says is a `PictureResult`; `summarise` makes of them:

- `ap`, `ap50`, `ap75`: class-agnostic COCO AP of all queries' boxes against the patches' boxes.
- `mean_iou`, `recall50`: each patch's answer is the box of the query of its own group with the
  highest score (as the public notebook reads it); its IoU with the patch's box, and the share
  above 0.5.
- `own_patch`: share of the matched queries whose match is the patch of their own group. The
  matching knows no groups, so chance is 1 / num_patches at the start (measured for the public code:
  10 of 80).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, iou
from models.matching import ClassScores
from models.postprocess import query_scores
from models.structures import LayerOutput, Targets
from pretrain.detection_ap import PictureDetections, average_precision


@dataclass(frozen=True)
class PictureResult:
    """Patch detection in one picture."""

    detections: PictureDetections
    own_iou: Float[np.ndarray, " patches"]
    """IoU of each patch's box with the answer of its own query group."""
    own_matches: int
    """Matched queries whose match is the patch of their own group."""


def picture_results(
    layer: LayerOutput,
    targets: Targets,
    matched_queries: Sequence[Int64[Tensor, " patches"]],
    class_scores: ClassScores = "softmax",
) -> list[PictureResult]:
    """One result per picture; `matched_queries`: per picture, the query matched to each patch.

    The patches of all pictures are equally many, and share the queries evenly in their order.
    """
    boxes = torch.stack(targets.boxes_cxcywh)
    num_patches = boxes.shape[1]
    group_size = layer.boxes.shape[1] // num_patches
    scores = query_scores(layer.logits, class_scores)
    overlaps = iou(cxcywh_to_xyxy(layer.boxes.float()), cxcywh_to_xyxy(boxes))
    answers = own_answers(scores, num_patches)
    own_iou = overlaps.gather(1, answers[..., None].expand(-1, -1, num_patches)).diagonal(
        dim1=1, dim2=2
    )
    groups = [queries.cpu() // group_size for queries in matched_queries]
    own = [int((group == torch.arange(num_patches)).sum()) for group in groups]
    return [
        PictureResult(PictureDetections(*pair), each_iou, each_own)
        for *pair, each_iou, each_own in zip(
            scores.cpu().numpy(),
            overlaps.cpu().numpy(),
            own_iou.cpu().numpy(),
            own,
            strict=True,
        )
    ]


def own_answers(
    scores: Float[Tensor, "batch queries"], num_patches: int
) -> Int64[Tensor, "batch num_patches"]:
    """For each patch, the number of the query in its own group with the highest score."""
    batch, queries = scores.shape
    group_size = queries // num_patches
    best = scores.view(batch, num_patches, group_size).argmax(-1)
    return best + torch.arange(0, queries, group_size, device=scores.device)


def summarise(results: Sequence[PictureResult]) -> dict[str, float]:
    """The numbers of the journal, all in 0..1; empty where there is no result."""
    if not results:
        return {}
    ap = average_precision([result.detections for result in results])
    own_iou = np.concatenate([result.own_iou for result in results])
    return {
        "ap": ap.ap,
        "ap50": ap.ap50,
        "ap75": ap.ap75,
        "mean_iou": float(own_iou.mean()),
        "recall50": float((own_iou >= 0.5).mean()),
        "own_patch": sum(result.own_matches for result in results) / len(own_iou),
    }
