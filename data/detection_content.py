"""Detection's content of a batch: pictures with boxes, as DETR trains on them (datasets/coco.py).

Crowds are removed; boxes are clamped to the picture; those without area are dropped; a picture
without boxes stays, with no targets. What is dropped or clamped is counted. Then pictures are
augmented (`data.detection_transforms`): one final scale for a global batch, or one a picture.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from data.annotations import AnnotationError, BoxAnnotation, parse_annotation
from data.detection_batches import (
    PackedDetectionBatch,
    ReadyPicture,
    join_detection,
    pack_detection,
)
from data.detection_transforms import AugmentSettings, BoxedPicture, augment
from data.loader import Place, ReadSample, scale_generator
from data.packing import SkippedPicture
from data.pictures import BrokenPicture, decode_picture
from data.randomness import sample_generator
from data.samples import Sample, picture_bytes, why_no_picture
from models.structures import Classes

Difficult = Literal["keep", "drop"]
"""Whether objects that VOC calls difficult are learned from."""

COUNTED = (
    "boxes",
    "boxes_crowd",
    "boxes_difficult",
    "boxes_without_area",
    "boxes_clamped",
    "pictures_without_boxes",
    "pictures_of_other_size",
)
"""Names of what is counted: boxes that are used, dropped as crowds, as difficult, as without area,
and clamped by more than half a pixel; pictures in which no box is left before augmentation, and
pictures whose size is not the annotated one."""


@dataclass(frozen=True)
class TargetObjects:
    """The objects of a picture that are targets."""

    boxes_xyxy: Float32[np.ndarray, "objects 4"]
    """Pixels of the picture, clamped to it."""
    labels: Int64[np.ndarray, " objects"]
    places: Int64[np.ndarray, " objects"]
    """Of each in the annotation."""
    counts: Mapping[str, int]
    """`COUNTED`."""


@dataclass(frozen=True)
class DetectionContent:
    """Samples to pictures with targets; a `data.loader.BatchContent`."""

    classes: Classes
    difficult: Difficult = "keep"
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def part(
        self,
        place: Place,
        streams: Sequence[int],
        samples: Sequence[Sample],
        read: ReadSample,  # noqa: ARG002  (boxes need no other picture)
        shared: bool,
    ) -> PackedDetectionBatch:
        """The augmented pictures with their targets.

        Raises AnnotationError where an annotation is none, or names a class that is not there.
        """
        ready: list[ReadyPicture] = []
        skipped: list[SkippedPicture] = []
        counts = Counter(dict.fromkeys(COUNTED, 0))
        for stream, sample in zip(streams, samples, strict=True):
            try:
                boxed, counted = boxed_and_counted(sample, self.classes, self.difficult)
            except BrokenPicture as error:
                skipped.append(SkippedPicture(sample.id, sample.key, sample.shard, str(error)))
                continue
            counts.update(counted)
            changed = augmented(boxed, self.augment, place, sample.id)
            ready.append(ReadyPicture(stream, sample.id, sample.key, changed))
        return pack_detection(ready, skipped, place.step, counts, shared=shared)

    def join(self, parts: Sequence[PackedDetectionBatch], pin: bool) -> PackedDetectionBatch:
        """The parts of one step as one batch, see `join_detection`."""
        return join_detection(parts, pin)


def boxed_picture(sample: Sample, classes: Classes, difficult: Difficult) -> BoxedPicture:
    """The picture as stored, with the boxes that are targets.

    Raises BrokenPicture where it cannot be used, AnnotationError where its annotation is none or
    names a class that is not one of `classes`.
    """
    return boxed_and_counted(sample, classes, difficult)[0]


def boxed_and_counted(
    sample: Sample, classes: Classes, difficult: Difficult
) -> tuple[BoxedPicture, Mapping[str, int]]:
    """As `boxed_picture`, with the counts of `COUNTED`."""
    data = picture_bytes(sample)
    if data is None:
        raise BrokenPicture(why_no_picture(sample))
    picture = decode_picture(data)
    height, width = picture.shape[:2]
    objects = target_objects(sample, annotation_of(sample), height, width, classes, difficult)
    return BoxedPicture(picture, objects.boxes_xyxy, objects.labels), objects.counts


def augmented(
    boxed: BoxedPicture, settings: AugmentSettings, place: Place, sample_id: int
) -> BoxedPicture:
    """The picture changed by the draws of (seed, epoch, sample), at the scale of the place."""
    scale = float(scale_generator(place, sample_id).random())
    generator = sample_generator(place.seed, place.epoch, sample_id, "augment")
    return augment(boxed, settings, scale, generator)


def annotation_of(sample: Sample) -> BoxAnnotation:
    """The boxes that travel with a sample; AnnotationError, naming it, where there are none."""
    text = sample.parts.get("json")
    if text is None:
        raise AnnotationError(
            f"{sample.key} in {sample.shard} has no json: these are pictures without boxes; use "
            "shards that were written from a labelled set"
        )
    try:
        return parse_annotation(text)
    except ValueError as error:
        raise AnnotationError(f"{sample.key} in {sample.shard}: {error}") from error


def target_objects(
    sample: Sample,
    annotation: BoxAnnotation,
    height: int,
    width: int,
    classes: Classes,
    difficult: Difficult,
) -> TargetObjects:
    """What a picture of height x width pixels is to teach; AnnotationError for an unknown class.

    Not a number counts as without area.
    """
    labels = _labels_of(sample, annotation, classes)
    boxes_xyxy = np.array(annotation.boxes_xyxy, np.float32).reshape(-1, 4)
    crowd = np.array(annotation.crowd, np.bool_)
    hard = np.array(annotation.difficult, np.bool_) & ~crowd & (difficult == "drop")
    clamped = np.clip(boxes_xyxy, np.float32(0), np.array([width, height] * 2, np.float32))
    has_area = (clamped[:, 2:] > clamped[:, :2]).all(axis=1)
    kept = ~crowd & ~hard & has_area
    moved = (np.abs(clamped - boxes_xyxy) > 0.5).any(axis=1)
    counts = (
        kept.sum(),
        crowd.sum(),
        hard.sum(),
        (~crowd & ~hard & ~has_area).sum(),
        (kept & moved).sum(),
        not kept.any(),
        (annotation.height, annotation.width) != (height, width),
    )
    return TargetObjects(
        boxes_xyxy=clamped[kept],
        labels=labels[kept],
        places=np.flatnonzero(kept),
        counts=dict(zip(COUNTED, map(int, counts), strict=True)),
    )


def _labels_of(
    sample: Sample, annotation: BoxAnnotation, classes: Classes
) -> Int64[np.ndarray, " objects"]:
    known = _label_by_name(classes)
    unknown = [name for name in annotation.names if name not in known]
    if unknown:
        raise AnnotationError(
            f"{sample.key} in {sample.shard} has an object of the class {unknown[0]!r}, which is "
            f"none of the {len(known)} classes; run `querypatch data check` on the set"
        )
    return np.array([known[name] for name in annotation.names], np.int64)


@lru_cache
def _label_by_name(classes: Classes) -> Mapping[str, int]:
    return MappingProxyType({name: label for label, name in enumerate(classes.names)})
