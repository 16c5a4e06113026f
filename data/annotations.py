"""The boxes that travel with a picture, as the `json` part of its sample.

Boxes are in pixels of the stored picture, x to the right, y down, the edges of the first pixel at 0
and 1: COCO's own frame; VOC's (first pixel 1, both ends inside the box) is moved into it.
"""

import json
from dataclasses import dataclass


class AnnotationError(ValueError):
    """A picture's annotation that does not fit the data set; the message names the picture."""


@dataclass(frozen=True)
class BoxAnnotation:
    """All boxes of one picture; every tuple but the size has one entry a box."""

    image_id: int | str
    """COCO's image id, or the file's stem for VOC."""
    width: int
    """Of the picture in pixels, as annotated."""
    height: int
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]
    names: tuple[str, ...]
    """Name of each box's class."""
    labels: tuple[int, ...] | None
    """COCO's category ids (1..90 with gaps); None for VOC, which has names only."""
    areas: tuple[float, ...] | None
    """Area of each object's mask in square pixels (COCO); None where there are no masks."""
    crowd: tuple[bool, ...]
    """COCO's iscrowd: the box covers a group."""
    difficult: tuple[bool, ...]
    """VOC's difficult: not counted in its evaluation."""
    segment_ids: tuple[int, ...] | None = None
    """COCO panoptic: the number of each segment in the picture's PNG; None where there is none."""


def annotation_json(annotation: BoxAnnotation) -> bytes:
    """Compact JSON, the same bytes for the same annotation; without a word of absent segments."""
    fields = dict(vars(annotation))
    if annotation.segment_ids is None:
        del fields["segment_ids"]
    return json.dumps(fields, separators=(",", ":")).encode()


def parse_annotation(data: bytes) -> BoxAnnotation:
    """The annotation of a sample's `json` part; ValueError where it holds none."""
    try:
        fields = json.loads(data)
        return BoxAnnotation(
            image_id=fields["image_id"],
            width=fields["width"],
            height=fields["height"],
            boxes_xyxy=tuple(_box(*box) for box in fields["boxes_xyxy"]),
            names=tuple(fields["names"]),
            labels=None if fields["labels"] is None else tuple(fields["labels"]),
            areas=None if fields["areas"] is None else tuple(fields["areas"]),
            crowd=tuple(fields["crowd"]),
            difficult=tuple(fields["difficult"]),
            segment_ids=tuple(fields["segment_ids"]) if "segment_ids" in fields else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the json of a sample holds no boxes ({type(error).__name__}: {error}): write the "
            "shards from a COCO json or a VOC root"
        ) from error


def _box(*sides: float | int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = map(float, sides)
    return x0, y0, x1, y1
