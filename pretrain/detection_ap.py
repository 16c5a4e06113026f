"""Class-agnostic average precision, as COCO counts it: the measure of patch detection.

COCO's definition (Lin et al., 2014; `COCOeval` with one class, no crowds, all areas): detections of
a picture are taken by falling score, each claims the unclaimed box that it overlaps most, at IoU
thresholds 0.50:0.05:0.95; precision is made monotone and read at 101 recalls. Vectorised over the
thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

THRESHOLDS: Float[np.ndarray, " thresholds"] = np.linspace(0.5, 0.95, 10)
RECALLS: Float[np.ndarray, " recalls"] = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class PictureDetections:
    """The detections of one picture against its boxes."""

    scores: Float[np.ndarray, " detections"]
    iou: Float[np.ndarray, "detections boxes"]


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision in 0..1; NaN where there was no box to find."""

    ap: float
    """Mean over the IoU thresholds 0.50:0.05:0.95."""
    ap50: float
    ap75: float


def average_precision(
    pictures: Sequence[PictureDetections], max_detections: int = 100
) -> AveragePrecision:
    """COCO's AP of all pictures, from the `max_detections` highest scores of each."""
    num_boxes = sum(picture.iou.shape[1] for picture in pictures)
    if num_boxes == 0:
        return AveragePrecision(float("nan"), float("nan"), float("nan"))
    taken = [_highest(picture, max_detections) for picture in pictures]
    scores = np.concatenate([picture.scores for picture in taken])
    hits = np.concatenate([true_positives(picture.iou) for picture in taken], axis=1)
    order = np.argsort(-scores, kind="stable")
    by_threshold = [_interpolated_precision(row[order], num_boxes) for row in hits]
    return AveragePrecision(float(np.mean(by_threshold)), by_threshold[0], by_threshold[5])


def true_positives(
    iou: Float[np.ndarray, "detections boxes"],
) -> Bool[np.ndarray, "thresholds detections"]:
    """Which detections (by falling score) claim a box of their picture, at each of `THRESHOLDS`."""
    hits = np.zeros((len(THRESHOLDS), iou.shape[0]), dtype=bool)
    if iou.shape[1] == 0:
        return hits
    free = np.ones((len(THRESHOLDS), iou.shape[1]), dtype=bool)
    rows = np.arange(len(THRESHOLDS))
    for detection, overlaps in enumerate(iou):
        candidates = np.where(free, overlaps[None, :], -1.0)
        # COCOeval scans the boxes in order and lets a later one of equal overlap win.
        best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
        hit = candidates[rows, best] >= np.minimum(THRESHOLDS, 1 - 1e-10)
        hits[:, detection] = hit
        free[rows[hit], best[hit]] = False
    return hits


def _highest(picture: PictureDetections, count: int) -> PictureDetections:
    order = np.argsort(-picture.scores, kind="stable")[:count]
    return PictureDetections(picture.scores[order], picture.iou[order])


def _interpolated_precision(hits: Bool[np.ndarray, " detections"], num_boxes: int) -> float:
    """Mean of the monotone precision at the 101 recalls; 0 beyond the highest recall reached."""
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / num_boxes, RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())
