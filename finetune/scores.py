"""The nouns of scoring: what a picture holds and what was found in it, as plain arrays.

One form for COCO's and VOC's numbers. Detections are float32 as they come from the model, truth is
float64 as annotated: at IoU thresholds a rounded truth would be another truth. Areas are those of
the objects' masks where the data have them (COCO's sizes are of masks), else of the boxes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from data.annotations import BoxAnnotation
from models.structures import Classes

Difficult = Literal["keep", "ignore", "drop"]
"""Objects marked difficult: counted as all others; neither to be found nor a mistake to find (VOC's
evaluation); or not there, so that finding one is a mistake."""


@dataclass(frozen=True)
class PictureTruth:
    """The objects of one picture, in the order of its annotation."""

    boxes_xyxy: Float64[np.ndarray, "boxes 4"]
    """Pixels of the stored picture."""
    labels: Int64[np.ndarray, " boxes"]
    """Those of `Classes`: 0 first."""
    areas: Float64[np.ndarray, " boxes"]
    """Square pixels, of the mask where there is one."""
    crowd: Bool[np.ndarray, " boxes"]
    """The box covers a group: neither to be found nor a mistake to find."""
    difficult: Bool[np.ndarray, " boxes"]


@dataclass(frozen=True)
class PictureDetections:
    """What was found in one picture, in any order."""

    boxes_xyxy: Float32[np.ndarray, "detections 4"]
    """Pixels of the stored picture."""
    labels: Int64[np.ndarray, " detections"]
    """Those of `Classes`: 0 first."""
    scores: Float32[np.ndarray, " detections"]


@dataclass(frozen=True)
class TruthArrays:
    """The objects of all pictures, one after the other, as `PictureTruth` names them."""

    pictures: Int64[np.ndarray, " boxes"]
    """Number of each object's picture, 0 first."""
    boxes_xyxy: Float64[np.ndarray, "boxes 4"]
    labels: Int64[np.ndarray, " boxes"]
    areas: Float64[np.ndarray, " boxes"]
    crowd: Bool[np.ndarray, " boxes"]
    difficult: Bool[np.ndarray, " boxes"]


@dataclass(frozen=True)
class DetectionArrays:
    """The detections of all pictures, one after the other, as `PictureDetections` names them."""

    pictures: Int64[np.ndarray, " detections"]
    """Number of each detection's picture, 0 first."""
    boxes_xyxy: Float64[np.ndarray, "detections 4"]
    labels: Int64[np.ndarray, " detections"]
    scores: Float64[np.ndarray, " detections"]


@dataclass(frozen=True)
class ClassScores:
    """Average precision of one class, 0..1; NaN where there is no object to find."""

    name: str
    objects: int
    """To be found: without crowds, and without difficult ones that are not kept."""
    ap: float
    """Mean over the IoU thresholds 0.50:0.05:0.95."""
    ap50: float


def truth_of(annotation: BoxAnnotation, classes: Classes) -> PictureTruth:
    """The objects of an annotated picture, crowds and difficult ones included.

    Raises:
        ValueError: a class name that is none of `classes`.
    """
    numbers = {name: label for label, name in enumerate(classes.names)}
    boxes = np.asarray(annotation.boxes_xyxy, np.float64).reshape(-1, 4)
    areas = annotation.areas
    return PictureTruth(
        boxes_xyxy=boxes,
        labels=np.asarray([_label(name, numbers, annotation) for name in annotation.names], int),
        areas=_box_areas(boxes) if areas is None else np.asarray(areas, np.float64),
        crowd=np.asarray(annotation.crowd, bool),
        difficult=np.asarray(annotation.difficult, bool),
    )


def together(
    truths: Sequence[PictureTruth], detections: Sequence[PictureDetections], difficult: Difficult
) -> tuple[TruthArrays, DetectionArrays]:
    """All pictures' objects and detections; `detections[n]` is of the picture of `truths[n]`.

    Objects that are difficult are left out where they are to be dropped, and are no longer marked
    where they are to be kept.

    Raises:
        ValueError: not as many truths as detections.
    """
    if len(truths) != len(detections):
        raise ValueError(
            f"{len(truths)} annotated pictures and {len(detections)} with detections: give one "
            "of each for every picture, an empty one where nothing was found"
        )
    return _truth_arrays([_settled(truth, difficult) for truth in truths]), DetectionArrays(
        pictures=_numbers([found.labels for found in detections]),
        boxes_xyxy=_joined([found.boxes_xyxy for found in detections], np.zeros((0, 4))),
        labels=_joined([found.labels for found in detections], np.zeros(0, np.int64)),
        scores=_joined([found.scores for found in detections], np.zeros(0)),
    )


def _label(name: str, numbers: Mapping[str, int], annotation: BoxAnnotation) -> int:
    if name not in numbers:
        raise ValueError(
            f"picture {annotation.image_id}: the class {name!r} is none of the {len(numbers)} that "
            "are evaluated; add it to them, or leave its objects out of the data"
        )
    return numbers[name]


def _box_areas(boxes_xyxy: Float64[np.ndarray, "boxes 4"]) -> Float64[np.ndarray, " boxes"]:
    areas: Float64[np.ndarray, " boxes"] = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    return areas


def _settled(truth: PictureTruth, difficult: Difficult) -> PictureTruth:
    match difficult:
        case "ignore":
            return truth
        case "keep":
            return replace(truth, difficult=np.zeros_like(truth.difficult))
        case "drop":
            kept = ~truth.difficult
            return PictureTruth(
                truth.boxes_xyxy[kept],
                truth.labels[kept],
                truth.areas[kept],
                truth.crowd[kept],
                truth.difficult[kept],
            )
        case _:
            assert_never(difficult)


def _truth_arrays(truths: Sequence[PictureTruth]) -> TruthArrays:
    none = np.zeros(0, bool)
    return TruthArrays(
        pictures=_numbers([truth.labels for truth in truths]),
        boxes_xyxy=_joined([truth.boxes_xyxy for truth in truths], np.zeros((0, 4))),
        labels=_joined([truth.labels for truth in truths], np.zeros(0, np.int64)),
        areas=_joined([truth.areas for truth in truths], np.zeros(0)),
        crowd=_joined([truth.crowd for truth in truths], none),
        difficult=_joined([truth.difficult for truth in truths], none),
    )


def _joined(
    parts: Sequence[Shaped[np.ndarray, "_ ..."]], empty: Shaped[np.ndarray, "0 ..."]
) -> Shaped[np.ndarray, "_ ..."]:
    """The parts one after the other, in the type of `empty`."""
    return np.concatenate([empty, *parts], dtype=empty.dtype)


def _numbers(parts: Sequence[Shaped[np.ndarray, " _"]]) -> Int64[np.ndarray, " all"]:
    """For each entry of the parts, the number of its part."""
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])
