"""What a labelled picture teaches: crowds, difficult objects, boxes outside, unknown classes."""

from collections.abc import Sequence

import pytest
import torch

from data.annotations import AnnotationError
from data.detection_batches import detection_to_device
from data.detection_content import (
    COUNTED,
    DetectionContent,
    boxed_and_counted,
    boxed_picture,
)
from data.detection_transforms import AugmentSettings
from data.loader import Place
from data.pictures import BrokenPicture
from data.samples import Sample
from tests.data.labelled import CLASSES, Box, annotation, sample_with

CPU = torch.device("cpu")
PLAIN = AugmentSettings(kind="none", short_sides=(32,), max_size=64)


def no_other(_id: int) -> Sample:
    raise AssertionError("detection needs no other picture")


def counted(
    boxes: Sequence[Box],
    crowd: Sequence[bool] | None = None,
    difficult: Sequence[bool] | None = None,
    drop: bool = False,
) -> tuple[list[list[float]], dict[str, int]]:
    """The boxes that are left of a picture of 40 x 30, and the counts that are not 0."""
    found = annotation(40, 30, boxes, ["dog"] * len(boxes), crowd, difficult)
    policy = "drop" if drop else "keep"
    boxed, counts = boxed_and_counted(sample_with(found), CLASSES, policy)
    return boxed.boxes_xyxy.tolist(), {name: count for name, count in counts.items() if count}


def test_names_become_labels_of_the_classes_whatever_their_ids() -> None:
    """Peers' bug 8: ids 1, 4, 17 are labels 0, 1, 2."""
    found = annotation(40, 30, [(1, 2, 3, 4), (5, 6, 7, 8), (1, 1, 9, 9)], ["emu", "cat", "dog"])
    boxed = boxed_picture(sample_with(found), CLASSES, "keep")
    assert boxed.labels.tolist() == [2, 0, 1]
    assert boxed.boxes_xyxy.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 9, 9]]
    assert boxed.picture.shape == (30, 40, 3)


def test_crowds_are_removed_and_counted() -> None:
    boxes, counts = counted([(0, 0, 9, 9), (1, 1, 8, 8)], crowd=[True, False])
    assert boxes == [[1, 1, 8, 8]]
    assert counts == {"boxes": 1, "boxes_crowd": 1}


def test_difficult_objects_are_kept_or_dropped_by_name() -> None:
    hard = [True, False]
    boxes, counts = counted([(0, 0, 9, 9), (1, 1, 8, 8)], difficult=hard)
    assert len(boxes) == 2
    assert counts == {"boxes": 2}
    boxes, counts = counted([(0, 0, 9, 9), (1, 1, 8, 8)], difficult=hard, drop=True)
    assert boxes == [[1, 1, 8, 8]]
    assert counts == {"boxes": 1, "boxes_difficult": 1}


def test_boxes_are_clamped_to_the_picture_and_those_without_area_dropped() -> None:
    nan = float("nan")
    boxes, counts = counted(
        [(-3, 5, 50, 31), (0, 0, 40.25, 30), (41, 2, 60, 9), (5, 5, 5, 9), (9, 9, 3, 3),
         (nan, 0, 5, 5)],
    )  # fmt: skip
    assert boxes == [[0, 5, 40, 30], [0, 0, 40, 30]]
    # A quarter of a pixel is rounding, as COCO's own boxes have it.
    assert counts == {"boxes": 2, "boxes_clamped": 1, "boxes_without_area": 4}


def test_a_picture_without_boxes_stays() -> None:
    boxes, counts = counted([])
    assert boxes == []
    assert counts == {"pictures_without_boxes": 1}
    boxes, counts = counted([(0, 0, 9, 9)], crowd=[True])
    assert boxes == []
    assert counts == {"boxes_crowd": 1, "pictures_without_boxes": 1}


def test_a_picture_of_another_size_than_annotated_is_counted() -> None:
    found = annotation(40, 30, [(35, 5, 40, 9)], ["dog"])
    smaller = sample_with(annotation(20, 15)).parts["jpg"]
    boxed, counts = boxed_and_counted(sample_with(found, smaller), CLASSES, "keep")
    assert counts["pictures_of_other_size"] == 1
    assert counts["boxes_without_area"] == 1
    assert boxed.boxes_xyxy.shape == (0, 4)


def test_an_unknown_class_stops_with_the_picture_and_the_name() -> None:
    found = annotation(40, 30, [(0, 0, 9, 9)], ["yak"])
    with pytest.raises(AnnotationError) as error:
        boxed_picture(sample_with(found), CLASSES, "keep")
    assert str(error.value) == (
        "p3 in p3.jpg has an object of the class 'yak', which is none of the 3 classes; "
        "run `querypatch data check` on the set"
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "p3 in p3.jpg has no json: these are pictures without boxes"),
        ({"json": b"{}"}, r"p3 in p3.jpg: the json of a sample holds no boxes \(KeyError"),
        ({"json": b"\xff"}, "p3 in p3.jpg: the json of a sample holds no boxes"),
    ],
)
def test_a_sample_without_boxes_of_ours_stops_with_its_name(
    parts: dict[str, bytes], message: str
) -> None:
    picture = sample_with(annotation(40, 30)).parts["jpg"]
    with pytest.raises(AnnotationError, match=message):
        boxed_picture(Sample(3, "p3", "p3.jpg", {"jpg": picture, **parts}), CLASSES, "keep")


def test_a_picture_that_cannot_be_had_says_why() -> None:
    gone = Sample(3, "p3", "p3.jpg", {"json": b"{}"}, fault="no such file: p3.jpg")
    with pytest.raises(BrokenPicture, match=r"no such file: p3\.jpg"):
        boxed_picture(gone, CLASSES, "keep")


def test_a_part_skips_broken_pictures_and_adds_up_the_counts() -> None:
    whole = annotation(40, 30, [(0, 0, 9, 9), (1, 1, 99, 8)], ["dog", "emu"])
    samples = [
        sample_with(whole),
        sample_with(whole, b"no picture"),
        sample_with(annotation(33, 50)),
    ]
    content = DetectionContent(CLASSES, "keep", PLAIN)
    part = content.part(Place(1, 2, 0, 2), [0, 3, 5], samples, no_other, shared=False)
    assert part.streams == (0, 5)
    assert part.box_counts == (2, 0)
    assert part.counts == {
        **dict.fromkeys(COUNTED, 0),
        "boxes": 2, "boxes_clamped": 1, "pictures_without_boxes": 1,
    }  # fmt: skip
    assert [picture.key for picture in part.skipped] == ["p3"]


@pytest.mark.parametrize("kind", ["detr", "flip", "none"])
def test_pictures_smaller_than_the_stride_of_a_backbone_survive(kind: str) -> None:
    """Peers' bug 17: 7 x 5 pixels, alone in its batch."""
    augment = AugmentSettings.model_validate({"kind": kind, "max_size": 800})
    sample = sample_with(annotation(7, 5, [(1, 1, 6, 4)], ["cat"]))
    content = DetectionContent(CLASSES, "keep", augment)
    part = content.part(Place(1, 2, 0, 2), [0], [sample], no_other, shared=False)
    batch = detection_to_device(content.join([part], pin=False), device=CPU)
    height, width = batch.images.sizes[0].tolist()
    assert min(height, width) >= 32
    (boxes,) = batch.targets.boxes_cxcywh
    assert len(boxes) <= 1
    assert bool(((boxes >= 0) & (boxes <= 1)).all())


def test_a_picture_of_one_pixel_a_side_survives() -> None:
    """Peers' bug 17: the long side is capped and no side becomes 0."""
    for width, height in ((1, 1), (1, 300), (300, 1)):
        sample = sample_with(annotation(width, height, [(0, 0, 1, 1)], ["cat"]))
        content = DetectionContent(CLASSES, "keep", AugmentSettings())
        part = content.part(Place(1, 2, 0, 2), [0], [sample], no_other, shared=False)
        assert part.skipped == ()
        assert part.shape.height * part.shape.width > 0
