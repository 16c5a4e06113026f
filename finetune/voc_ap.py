"""VOC's average precision for each class (Everingham et al., 2010; the development kit's rules).

Detections of a class are taken by falling score, equal ones in the order of the pictures. Each
belongs to the object that it overlaps most, claimed or not. Where that overlap reaches the
threshold: on an object that is ignored (difficult, or a crowd) it counts as nothing, on one that a
better detection has claimed it is a mistake, else it is right. Elsewhere it is a mistake.

Two readings of the precision: VOC2007's mean of the highest precision at recalls of at least 0,
0.1 ... 1, and the area under the monotone precision (VOC2010 and later). The eleven recalls are
those of the public evaluators to the last bit: 3 * 0.1 is above 0.3 in floats, so a recall of 3 in
10 misses its point, there and here. An overlap of exactly the threshold counts, as in the
development kit (detectron2 wants more).

The kit's boxes name their first and their last pixel, so that widths are x1 - x0 + 1. Our boxes are
edges (data.annotations has moved VOC's), so x1 - x0 is the same width: `inclusive` is for boxes
that have not been moved.

Own numpy over all pictures and classes at once: the object of a detection does not depend on the
threshold, so ten thresholds cost little more than one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from finetune.scores import (
    ClassScores,
    DetectionArrays,
    Difficult,
    PictureDetections,
    PictureTruth,
    TruthArrays,
    together,
)
from models.structures import Classes

VocProtocol = Literal["voc07", "voc"]
"""11 points, as for VOC2007, or the area, as from VOC2010 on."""

THRESHOLDS: Float64[np.ndarray, " thresholds"] = np.linspace(0.5, 0.95, 10)
RECALLS_07: Float64[np.ndarray, " points"] = np.arange(0.0, 1.1, 0.1)
"""As the public evaluators write them; 0.3, 0.6 and 0.7 are a bit above."""


@dataclass(frozen=True)
class VocScores:
    """VOC's numbers, 0..1, means over the classes that have objects; NaN where none has."""

    protocol: VocProtocol
    ap: float
    """Mean over the IoU thresholds 0.50:0.05:0.95, which VOC itself does not know."""
    ap50: float
    """VOC's own number."""
    ap75: float
    per_class: tuple[ClassScores, ...]

    def numbers(self) -> dict[str, float]:
        """By name, the protocol first: `voc07_ap50`; NaN where one does not exist."""
        named = {"ap": self.ap, "ap50": self.ap50, "ap75": self.ap75}
        return {f"{self.protocol}_{name}": value for name, value in named.items()}


def score_voc(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    classes: Classes,
    protocol: VocProtocol = "voc",
    difficult: Difficult = "ignore",
    inclusive: bool = False,
) -> VocScores:
    """VOC's numbers of the pictures; `detections[n]` is of the picture of `truths[n]`.

    Raises:
        ValueError: not as many truths as detections.
    """
    truth, found = together(truths, detections, difficult)
    ignored = truth.difficult | truth.crowd
    order = np.lexsort((-found.scores, found.labels))
    overlap, objects = (part[order] for part in _best_objects(truth, found, inclusive))
    right, counts = _verdicts(overlap, objects, ignored)
    by_class = np.searchsorted(found.labels[order], np.arange(len(classes.names) + 1))
    num_objects = np.bincount(truth.labels[~ignored], minlength=len(classes.names)).tolist()
    tables = []
    for label, objects_to_find in enumerate(num_objects):
        part = slice(by_class[label], by_class[label + 1])
        tables.append(_class_ap(right[:, part], counts[:, part], objects_to_find, protocol))
    return _scores(np.array(tables).reshape(-1, len(THRESHOLDS)), num_objects, classes, protocol)


def _best_objects(
    truth: TruthArrays, found: DetectionArrays, inclusive: bool
) -> tuple[Float64[np.ndarray, " detections"], Int64[np.ndarray, " detections"]]:
    """Highest IoU with an object of its class and picture, and the first such; (-1, -1) if none."""
    overlap = np.full(len(found.labels), -1.0)
    objects = np.full(len(found.labels), -1)
    pair_detection, pair_object = _pairs(truth, found)
    if not len(pair_detection):
        return overlap, objects
    ious = _iou(
        found.boxes_xyxy[pair_detection], truth.boxes_xyxy[pair_object], 1.0 if inclusive else 0.0
    )
    starts = np.flatnonzero(np.diff(pair_detection, prepend=-1))
    lengths = np.diff(starts, append=len(pair_detection))
    highest = np.maximum.reduceat(ious, starts)
    places = np.where(ious == np.repeat(highest, lengths), np.arange(len(ious)), len(ious))
    first = np.minimum.reduceat(places, starts)
    overlap[pair_detection[starts]] = highest
    objects[pair_detection[starts]] = pair_object[first]
    return overlap, objects


def _pairs(
    truth: TruthArrays, found: DetectionArrays
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Every detection with every object of its class in its picture, detection by detection."""
    stride = 1 + max(truth.labels.max(initial=0), found.labels.max(initial=0))
    truth_place = truth.pictures * stride + truth.labels
    found_place = found.pictures * stride + found.labels
    by_place = np.argsort(truth_place, kind="stable")
    sorted_places = truth_place[by_place]
    low = np.searchsorted(sorted_places, found_place, side="left")
    counts = np.searchsorted(sorted_places, found_place, side="right") - low
    detection = np.repeat(np.arange(len(found_place)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return detection, by_place[low[detection] + within]


def _iou(
    first: Float64[np.ndarray, "pairs 4"], second: Float64[np.ndarray, "pairs 4"], pixel: float
) -> Float64[np.ndarray, " pairs"]:
    """IoU pair by pair; `pixel` is what a width is longer than the difference of its ends."""
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    shared = np.clip(high - low + pixel, 0, None).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + pixel).prod(axis=1) for boxes in (first, second)]
    union = np.maximum(areas[0] + areas[1] - shared, np.finfo(np.float64).tiny)
    overlaps: Float64[np.ndarray, " pairs"] = shared / union
    return overlaps


def _verdicts(
    overlap: Float64[np.ndarray, " detections"],
    objects: Int64[np.ndarray, " detections"],
    ignored: Bool[np.ndarray, " objects"],
) -> tuple[Bool[np.ndarray, "thresholds detections"], Bool[np.ndarray, "thresholds detections"]]:
    """Which detections, in order of claim, are right, and which count at all."""
    right = np.zeros((len(THRESHOLDS), len(overlap)), bool)
    counts = np.ones_like(right)
    on_ignored = np.append(ignored, False)[objects]
    for number, threshold in enumerate(THRESHOLDS):
        reaches = overlap >= threshold
        counts[number] = ~(reaches & on_ignored)
        claims = np.flatnonzero(reaches & ~on_ignored)
        _, first = np.unique(objects[claims], return_index=True)
        right[number, claims[first]] = True
    return right, counts


def _class_ap(
    right: Bool[np.ndarray, "thresholds detections"],
    counts: Bool[np.ndarray, "thresholds detections"],
    num_objects: int,
    protocol: VocProtocol,
) -> list[float]:
    """AP of one class at each threshold; NaN without objects."""
    if not num_objects:
        return [float("nan")] * len(THRESHOLDS)
    average = eleven_points if protocol == "voc07" else area
    return [average(row[kept], num_objects) for row, kept in zip(right, counts, strict=True)]


def eleven_points(right: Bool[np.ndarray, " detections"], num_objects: int) -> float:
    """Mean of the highest precision at recalls of at least 0, 0.1 ... 1; by falling score."""
    precision = np.append(_monotone_precision(right), 0.0)
    at = np.searchsorted(np.cumsum(right) / num_objects, RECALLS_07)
    return float(precision[at].mean())


def area(right: Bool[np.ndarray, " detections"], num_objects: int) -> float:
    """The area under the monotone precision over recall; by falling score."""
    return float(_monotone_precision(right)[right].sum() / num_objects)


def _monotone_precision(right: Bool[np.ndarray, " detections"]) -> Float64[np.ndarray, " _"]:
    """At each detection, the highest precision from there on."""
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _scores(
    by_class: Float64[np.ndarray, "classes thresholds"],
    num_objects: Sequence[int],
    classes: Classes,
    protocol: VocProtocol,
) -> VocScores:
    return VocScores(
        protocol=protocol,
        ap=_mean(by_class),
        ap50=_mean(by_class[:, 0]),
        ap75=_mean(by_class[:, 5]),
        per_class=tuple(
            ClassScores(name, objects, float(row.mean()), float(row[0]))
            for name, objects, row in zip(classes.names, num_objects, by_class, strict=True)
        ),
    )


def _mean(values: Float64[np.ndarray, "*_"]) -> float:
    """Mean of what exists."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
