"""VOC's average precision: by hand, and against the development kit's rules one at a time."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from finetune.scores import PictureDetections, PictureTruth
from finetune.voc_ap import THRESHOLDS, area, eleven_points, score_voc
from models.structures import Classes
from tests.finetune.made_scores import found, noisy, truth

TWO = Classes(("cat", "dog"), (1, 2))
BOX = [10.0, 10.0, 30.0, 40.0]
FAR = [100.0, 100.0, 150.0, 130.0]


def test_eleven_points_by_hand() -> None:
    """Right, wrong, right, wrong, with 4 objects: recalls 1/4 and 2/4 at precisions 1 and 2/3.

    Points 0, 0.1, 0.2 read 1; points 0.3, 0.4, 0.5 read 2/3; the other five read 0.
    """
    assert eleven_points(np.array([True, False, True, False]), 4) == pytest.approx((3 + 2) / 11)


def test_area_by_hand() -> None:
    """The same: a quarter of recall at precision 1 and a quarter at 2/3."""
    expected = 0.25 * 1 + 0.25 * 2 / 3
    assert area(np.array([True, False, True, False]), 4) == pytest.approx(expected)


def test_precision_is_made_monotone_before_it_is_read() -> None:
    """Wrong, right, right: precisions 0, 1/2, 2/3; the first right one counts with 2/3 as well."""
    right = np.array([False, True, True])
    assert area(right, 2) == pytest.approx(2 / 3)
    assert eleven_points(right, 2) == pytest.approx(2 / 3)


def test_the_eleven_recalls_are_those_of_the_public_evaluators() -> None:
    """3 * 0.1 is above 0.3 in floats: points 0, 0.1 and 0.2 read 1, point 0.3 does not."""
    assert eleven_points(np.array([True, True, True]), 10) == pytest.approx(3 / 11)
    assert eleven_points(np.ones(5, bool), 10) == pytest.approx(6 / 11)
    assert eleven_points(np.ones(7, bool), 10) == pytest.approx(7 / 11)


def test_nothing_found_is_zero_and_no_object_is_no_number() -> None:
    scores = score_voc([truth([BOX], [1])], [found([], [], [])], TWO, "voc07")
    assert (scores.ap, scores.ap50, scores.ap75) == (0.0, 0.0, 0.0)
    assert np.isnan(scores.per_class[0].ap50)
    assert scores.per_class[1].objects == 1
    assert np.isnan(score_voc([], [], TWO).ap50)
    assert list(scores.numbers()) == ["voc07_ap", "voc07_ap50", "voc07_ap75"]


def test_the_second_detection_of_an_object_is_a_mistake() -> None:
    """Right, wrong (again), right: 2 of 2 objects at precisions 1 and 2/3."""
    pictures = [truth([BOX, FAR], [0, 0])]
    detections = [found([BOX, BOX, FAR], [0, 0, 0], [0.9, 0.8, 0.7])]
    scores = score_voc(pictures, detections, TWO)
    assert scores.ap50 == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_detection_belongs_to_the_object_that_it_overlaps_most_even_if_that_is_claimed() -> None:
    """COCO would give it to the free object, which it overlaps well enough too."""
    near = [10.0, 10.0, 30.0, 50.0]
    pictures = [truth([BOX, near], [0, 0])]
    detections = [found([BOX, [10, 10, 30, 41]], [0, 0], [0.9, 0.8])]
    assert score_voc(pictures, detections, TWO).ap50 == pytest.approx(0.5)


def test_a_detection_on_a_difficult_object_is_neither_right_nor_wrong() -> None:
    """Twice on the difficult one: both count as nothing."""
    pictures = [truth([BOX, FAR], [0, 0], difficult=[True, False])]
    detections = [found([BOX, BOX, FAR], [0, 0, 0], [0.9, 0.8, 0.7])]
    by_policy = {
        policy: score_voc(pictures, detections, TWO, difficult=policy).per_class[0]
        for policy in ("ignore", "keep", "drop")
    }
    assert {name: (each.ap50, each.objects) for name, each in by_policy.items()} == {
        "ignore": (pytest.approx(1.0), 1),
        "keep": (pytest.approx(0.5 + 0.5 * 2 / 3), 2),
        "drop": (pytest.approx(1 / 3), 1),
    }


def test_a_crowd_is_ignored_like_a_difficult_object() -> None:
    pictures = [truth([BOX, FAR], [0, 0], crowd=[True, False])]
    detections = [found([BOX, FAR], [0, 0], [0.9, 0.7])]
    assert score_voc(pictures, detections, TWO, difficult="keep").ap50 == pytest.approx(1.0)


def test_classes_and_pictures_do_not_mix() -> None:
    pictures = [truth([BOX], [0]), truth([BOX], [1])]
    wrong_class = [found([BOX], [1], [0.9]), found([BOX], [0], [0.9])]
    assert score_voc(pictures, wrong_class, TWO).ap50 == 0.0
    assert score_voc(pictures, wrong_class[::-1], TWO).ap50 == 1.0


def test_equal_scores_count_in_the_order_of_the_pictures() -> None:
    pictures = [truth([BOX], [0]), truth([FAR], [0])]
    detections = [found([FAR], [0], [0.5]), found([FAR], [0], [0.5])]
    assert score_voc(pictures, detections, TWO).ap50 == pytest.approx(0.5 * 0.5)
    assert score_voc(pictures[::-1], detections, TWO).ap50 == pytest.approx(0.5 * 1.0)


def test_an_overlap_of_exactly_the_threshold_counts() -> None:
    pictures = [truth([[0, 0, 10, 10]], [0])]
    assert score_voc(pictures, [found([[0, 0, 10, 5]], [0], [1.0])], TWO).ap50 == 1.0
    assert score_voc(pictures, [found([[0, 0, 10, 4]], [0], [1.0])], TWO).ap50 == 0.0


def test_ap_is_the_mean_over_ten_thresholds() -> None:
    """An overlap of 0.72 reaches 0.5, 0.55, 0.6, 0.65 and 0.7."""
    pictures = [truth([[0, 0, 10, 100]], [0])]
    scores = score_voc(pictures, [found([[0, 0, 10, 72]], [0], [1.0])], TWO)
    assert (scores.ap50, scores.ap75) == (1.0, 0.0)
    assert scores.ap == pytest.approx(0.5)


def test_boxes_that_name_their_last_pixel_are_one_pixel_longer() -> None:
    """Rows 1..10 and 4.2..13.2 share 6.8 of 13.2, above a half; read as edges 5.8 of 12.2.

    VOC's annotations become edges where they are read, so that ours need nothing added.
    """
    pictures = [truth([[1, 1, 10, 10]], [0])]
    detections = [found([[1, 4.2, 10, 13.2]], [0], [1.0])]
    assert score_voc(pictures, detections, TWO, inclusive=True).ap50 == 1.0
    assert score_voc(pictures, detections, TWO).ap50 == 0.0
    assert development_kit(pictures, detections, 0, 0.5, pixel=1.0).tolist() == [True]
    edges = [truth([[0, 0, 10, 10]], [0])]
    assert score_voc(edges, [found([[0, 3.2, 10, 13.2]], [0], [1.0])], TWO).ap50 == 1.0


@pytest.mark.parametrize("protocol", ["voc07", "voc"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_development_kit_s_rules_detection_by_detection(
    protocol: str, seed: int
) -> None:
    """Ties, difficult objects, duplicates, empty pictures, two classes, all ten thresholds."""
    generator = np.random.default_rng(seed)
    pictures = [_made(generator, count) for count in (4, 0, 7, 1, 3, 9)]
    detections = [noisy(each, generator, 25, 2) for each in pictures]
    scores = score_voc(pictures, detections, TWO, protocol)
    average = plain_eleven_points if protocol == "voc07" else plain_area
    for label, ours in enumerate(scores.per_class):
        num_objects = sum(_to_find(each, label) for each in pictures)
        theirs = [
            average(development_kit(pictures, detections, label, threshold), num_objects)
            for threshold in THRESHOLDS
        ]
        assert ours.objects == num_objects
        assert ours.ap50 == pytest.approx(theirs[0], abs=1e-12)
        assert ours.ap == pytest.approx(np.mean(theirs), abs=1e-12)
    assert 0.02 < scores.ap50 < 0.95


def test_the_pictures_of_voc2007_s_test_set_take_seconds() -> None:
    """4,952 pictures with 100 detections each, of 20 classes, at ten thresholds."""
    generator = np.random.default_rng(0)
    classes = Classes(tuple(map(str, range(20))), tuple(range(20)))
    corners = generator.uniform(0, 300, (4952, 100, 2))
    boxes = np.concatenate([corners, corners + 80], axis=2).astype(np.float32)
    labels = generator.integers(0, 20, (4952, 100))
    scores = generator.random((4952, 100), np.float32)
    detections = [PictureDetections(*each) for each in zip(boxes, labels, scores, strict=True)]
    pictures = [truth(boxes[n, :3] + 2.0, labels[n, :3].tolist()) for n in range(4952)]
    start = time.process_time()
    assert score_voc(pictures, detections, classes, "voc07").ap50 > 0
    assert time.process_time() - start < 15


def development_kit(
    pictures: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    label: int,
    threshold: float,
    pixel: float = 0.0,
) -> np.ndarray:
    """The kit's loop: of the detections that count, by falling score, which are right."""
    listed = [
        (float(score), number, box)
        for number, each in enumerate(detections)
        for box, own, score in zip(
            each.boxes_xyxy.astype(float), each.labels, each.scores, strict=True
        )
        if own == label
    ]
    claimed: set[tuple[int, int]] = set()
    right = []
    for _, number, box in sorted(listed, key=lambda entry: -entry[0]):
        overlap, place = _most_overlapped(pictures[number], label, box, pixel)
        if overlap < threshold:
            right.append(False)
        elif not pictures[number].difficult[place]:
            right.append((number, place) not in claimed)
            claimed.add((number, place))
    return np.array(right, bool)


def plain_eleven_points(right: np.ndarray, num_objects: int) -> float:
    found_so_far = np.cumsum(right)
    precision = found_so_far / np.arange(1, len(right) + 1)
    points = []
    for least in np.arange(0.0, 1.1, 0.1):
        reached = precision[found_so_far / num_objects >= least]
        points.append(reached.max() if len(reached) else 0.0)
    return float(np.mean(points))


def plain_area(right: np.ndarray, num_objects: int) -> float:
    recall = [0.0, *(np.cumsum(right) / num_objects), 1.0]
    precision = [0.0, *(np.cumsum(right) / np.arange(1, len(right) + 1)), 0.0]
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    steps = range(len(recall) - 1)
    return float(sum((recall[n + 1] - recall[n]) * precision[n + 1] for n in steps))


def _most_overlapped(
    picture: PictureTruth, label: int, box: np.ndarray, pixel: float
) -> tuple[float, int]:
    best, place = -1.0, -1
    for number, (other, own) in enumerate(zip(picture.boxes_xyxy, picture.labels, strict=True)):
        width = min(box[2], other[2]) - max(box[0], other[0]) + pixel
        height = min(box[3], other[3]) - max(box[1], other[1]) + pixel
        if own != label or width <= 0 or height <= 0:
            continue
        areas = [(b[2] - b[0] + pixel) * (b[3] - b[1] + pixel) for b in (box, other)]
        overlap = width * height / (sum(areas) - width * height)
        if overlap > best:
            best, place = overlap, number
    return best, place


def _made(generator: np.random.Generator, count: int) -> PictureTruth:
    corner = generator.uniform(0, 200, (count, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(30, 90, (count, 2))], axis=1)
    made = truth(boxes, generator.integers(0, 2, count).tolist())
    return replace(made, difficult=generator.random(count) < 0.3)


def _to_find(picture: PictureTruth, label: int) -> int:
    return int(((picture.labels == label) & ~picture.difficult).sum())
