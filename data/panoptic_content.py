"""The panoptic content of a batch: pictures with boxes and the segment of every pixel.

All is as in `data.detection_content`, whose boxes are those of the segments; a crowd's pixels
belong to no target. Segments follow the picture through every augmentation.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from data.annotations import AnnotationError
from data.detection_batches import (
    PackedDetectionBatch,
    ReadyPicture,
    TargetForm,
    join_detection,
    pack_detection,
)
from data.detection_content import COUNTED, annotation_of, augmented, target_objects
from data.detection_transforms import AugmentSettings, BoxedPicture
from data.loader import Place, ReadSample
from data.packing import SkippedPicture
from data.panoptic_maps import decode_segment_ids, numbered_segments
from data.pictures import BrokenPicture, decode_picture
from data.samples import SEGMENTS_PART, Sample, picture_bytes, why_no_picture
from models.structures import Classes


@dataclass(frozen=True)
class PanopticContent:
    """Samples to pictures with targets and segments; a `data.loader.BatchContent`."""

    classes: Classes
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def part(
        self,
        place: Place,
        streams: Sequence[int],
        samples: Sequence[Sample],
        read: ReadSample,  # noqa: ARG002  (segments need no other picture)
        shared: bool,
    ) -> PackedDetectionBatch:
        """The augmented pictures with their targets.

        Raises AnnotationError where an annotation is none, names a class that is not there, or has
        no segments.
        """
        ready: list[ReadyPicture] = []
        skipped: list[SkippedPicture] = []
        counts = Counter(dict.fromkeys(COUNTED, 0))
        for stream, sample in zip(streams, samples, strict=True):
            try:
                boxed, counted = segmented_and_counted(sample, self.classes)
            except BrokenPicture as error:
                skipped.append(SkippedPicture(sample.id, sample.key, sample.shard, str(error)))
                continue
            counts.update(counted)
            changed = augmented(boxed, self.augment, place, sample.id)
            ready.append(ReadyPicture(stream, sample.id, sample.key, changed))
        form = TargetForm(has_segments=True)
        return pack_detection(ready, skipped, place.step, counts, form, shared)

    def join(self, parts: Sequence[PackedDetectionBatch], pin: bool) -> PackedDetectionBatch:
        """The parts of one step as one batch, see `join_detection`."""
        return join_detection(parts, pin)


def segmented_picture(sample: Sample, classes: Classes) -> BoxedPicture:
    """The picture as stored, with boxes and segments.

    Raises BrokenPicture where it or its PNG cannot be used, AnnotationError as `PanopticContent`.
    """
    return segmented_and_counted(sample, classes)[0]


def segmented_and_counted(
    sample: Sample, classes: Classes
) -> tuple[BoxedPicture, Mapping[str, int]]:
    """As `segmented_picture`, with the counts of `data.detection_content.COUNTED`."""
    annotation = annotation_of(sample)
    data, png = picture_bytes(sample), sample.parts.get(SEGMENTS_PART)
    if data is None:
        raise BrokenPicture(why_no_picture(sample))
    if png is None or annotation.segment_ids is None:
        raise AnnotationError(
            f"{sample.key} in {sample.shard} has boxes but no segments: a mask head learns from "
            "kind=coco_panoptic alone"
        )
    picture = decode_picture(data)
    height, width = picture.shape[:2]
    objects = target_objects(sample, annotation, height, width, classes, "keep")
    ids = decode_segment_ids(png)
    if ids.shape != (height, width):
        raise BrokenPicture(
            f"{width} x {height} pixels, and its segments {ids.shape[1]} x {ids.shape[0]}"
        )
    wanted = [annotation.segment_ids[place] for place in objects.places]
    boxed = BoxedPicture(picture, objects.boxes_xyxy, objects.labels)
    return replace(boxed, segments=numbered_segments(ids, wanted)), objects.counts
