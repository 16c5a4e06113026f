"""COCO's twelve numbers, and AP for each class (Lin et al., 2014; `COCOeval`'s definition).

The engine is faster-coco-eval, fed from arrays, without files. Only its precision and recall arrays
are read, which equal pycocotools' (tested), none of its own summaries.

Difficult objects are VOC's, not COCO's. Ignoring them here follows COCO's own rule for objects that
lie outside of a size range: one detection of each is neither right nor wrong, overlap is IoU.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from jaxtyping import Float64

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

logger = logging.getLogger(__name__)

IGNORED_AREA = 1e11
"""Square pixels, beyond COCO's largest range (1e10): such an object is ignored in all of them."""

Record = dict[str, object]
Precision = Float64[np.ndarray, "thresholds recalls classes sizes limits"]
Recall = Float64[np.ndarray, "thresholds classes sizes limits"]


@dataclass(frozen=True)
class CocoScores:
    """COCO's numbers, 0..1, means over the classes; NaN where there is no such object.

    `small` is up to 32 x 32 pixels, `medium` up to 96 x 96, `large` above.
    """

    ap: float
    """Mean over the IoU thresholds 0.50:0.05:0.95."""
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    """Average recall with the best detection of each class in each picture alone."""
    ar10: float
    """With the ten best ones."""
    ar_all: float
    """With `max_detections`: COCO's AR100 where that is 100."""
    ar_small: float
    ar_medium: float
    ar_large: float
    max_detections: int
    """Of each class in each picture that are counted."""
    per_class: tuple[ClassScores, ...]

    def numbers(self) -> dict[str, float]:
        """All twelve by name, NaN where one does not exist; `ar100` is named after the maximum."""
        return {
            "ap": self.ap,
            "ap50": self.ap50,
            "ap75": self.ap75,
            "ap_small": self.ap_small,
            "ap_medium": self.ap_medium,
            "ap_large": self.ap_large,
            "ar1": self.ar1,
            "ar10": self.ar10,
            f"ar{self.max_detections}": self.ar_all,
            "ar_small": self.ar_small,
            "ar_medium": self.ar_medium,
            "ar_large": self.ar_large,
        }


def score_coco(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    classes: Classes,
    difficult: Difficult = "ignore",
    max_detections: int = 100,
) -> CocoScores:
    """COCO's numbers of the pictures; `detections[n]` is of the picture of `truths[n]`.

    Equal scores count in the order of the pictures, as in COCOeval.

    Raises:
        ValueError: not as many truths as detections, or `max_detections` below 1.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections={max_detections} counts nothing; use 1 or more")
    limits = sorted({1, min(10, max_detections), max_detections})
    annotated, found = together(truths, detections, difficult)
    precision, recall = _evaluated(annotated, found, len(truths), len(classes.names), limits)
    return CocoScores(
        ap=_mean(precision[:, :, :, 0, -1]),
        ap50=_mean(precision[0, :, :, 0, -1]),
        ap75=_mean(precision[5, :, :, 0, -1]),
        ap_small=_mean(precision[:, :, :, 1, -1]),
        ap_medium=_mean(precision[:, :, :, 2, -1]),
        ap_large=_mean(precision[:, :, :, 3, -1]),
        ar1=_mean(recall[:, :, 0, 0]),
        ar10=_mean(recall[:, :, 0, limits.index(min(10, max_detections))]),
        ar_all=_mean(recall[:, :, 0, -1]),
        ar_small=_mean(recall[:, :, 1, -1]),
        ar_medium=_mean(recall[:, :, 2, -1]),
        ar_large=_mean(recall[:, :, 3, -1]),
        max_detections=max_detections,
        per_class=_per_class(precision, annotated, classes),
    )


def _evaluated(
    truth: TruthArrays,
    found: DetectionArrays,
    num_pictures: int,
    num_classes: int,
    limits: list[int],
) -> tuple[Precision, Recall]:
    """COCOeval's arrays; -1 where there is no object."""
    if not num_pictures or not num_classes:
        return (
            np.full((10, 101, num_classes, 4, len(limits)), -1.0),
            np.full((10, num_classes, 4, len(limits)), -1.0),
        )
    # Numbers begin with 1: the engine takes an annotation's 0 for "not matched".
    images: list[Record] = [{"id": number + 1} for number in range(num_pictures)]
    categories: list[Record] = [{"id": number + 1} for number in range(num_classes)]
    engine = COCOeval_faster(
        _dataset(images, categories, _truth_records(truth)),
        _dataset(images, categories, _detection_records(found)),
        "bbox",
        print_function=logger.debug,
    )
    engine.params.maxDets = limits
    engine.evaluate()
    return np.asarray(engine.eval["precision"]), np.asarray(engine.eval["recall"])


def _dataset(images: list[Record], categories: list[Record], annotations: list[Record]) -> COCO:
    held = COCO(print_function=logger.debug)
    held.dataset = {"images": images, "categories": categories, "annotations": annotations}
    held.createIndex()
    return held


def _truth_records(truth: TruthArrays) -> list[Record]:
    areas = np.where(truth.difficult, IGNORED_AREA, truth.areas)
    boxes = _corner_and_size(truth.boxes_xyxy)
    columns = (truth.pictures + 1, truth.labels + 1, boxes, areas, truth.crowd.astype(int))
    lists = [column.tolist() for column in columns]
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": crowd,
        }
        for number, (image, category, box, area, crowd) in enumerate(zip(*lists, strict=True), 1)
    ]


def _detection_records(found: DetectionArrays) -> list[Record]:
    boxes = _corner_and_size(found.boxes_xyxy)
    columns = (found.pictures + 1, found.labels + 1, boxes, boxes[:, 2:].prod(axis=1), found.scores)
    lists = [column.tolist() for column in columns]
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "score": score,
        }
        for number, (image, category, box, area, score) in enumerate(zip(*lists, strict=True), 1)
    ]


def _corner_and_size(boxes_xyxy: Float64[np.ndarray, "boxes 4"]) -> Float64[np.ndarray, "boxes 4"]:
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def _per_class(
    precision: Precision, truth: TruthArrays, classes: Classes
) -> tuple[ClassScores, ...]:
    to_find = truth.labels[~truth.crowd & ~truth.difficult]
    objects = np.bincount(to_find, minlength=len(classes.names)).tolist()
    return tuple(
        ClassScores(
            name=name,
            objects=objects[label],
            ap=_mean(precision[:, :, label, 0, -1]),
            ap50=_mean(precision[0, :, label, 0, -1]),
        )
        for label, name in enumerate(classes.names)
    )


def _mean(values: np.ndarray) -> float:
    """Mean of what exists: COCOeval marks the rest with -1."""
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
