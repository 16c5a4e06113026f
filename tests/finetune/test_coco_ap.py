"""COCO's numbers: equal to pycocotools', by hand, and what does not exist is not a number."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.annotations import BoxAnnotation
from finetune.coco_ap import CocoScores, score_coco
from finetune.scores import PictureTruth, truth_of
from models.structures import Classes
from tests.finetune.made_scores import (
    found,
    noisy,
    pycocotools_evaluation,
    pycocotools_numbers,
    truth,
)

TWO = Classes(("cat", "dog"), (4, 17))
NOTHING = found([], [], [])


def test_equals_pycocotools_on_detections_of_real_coco_boxes(shared_data: Path) -> None:
    """Crowds, areas of masks, ties, empty pictures, more than 100 detections, classes without
    objects: all twelve numbers, and AP and AP50 of every class."""
    truths, classes = real_coco(shared_data / "coco/annotations/instances_val2017.json")
    truths = truths[::2]
    assert any(each.crowd.any() for each in truths)
    assert any(len(each.labels) == 0 for each in truths)
    generator = np.random.default_rng(5)
    counts = [0 if number % 9 == 0 else 20 + 4 * number for number in range(len(truths))]
    detections = [
        noisy(each, generator, count, 80) for each, count in zip(truths, counts, strict=True)
    ]
    assert max(counts) > 250
    ours, theirs = (
        score_coco(truths, detections, classes),
        pycocotools_evaluation(truths, detections, 80),
    )
    assert values(ours) == pytest.approx(pycocotools_numbers(theirs), abs=1e-9)
    assert 0.05 < ours.ap < 0.9
    assert sum(np.isnan(each.ap) for each in ours.per_class) > 0
    assert_classes_equal(ours, theirs.eval["precision"])


def test_equals_pycocotools_with_more_than_100_detections_of_one_class_in_a_picture() -> None:
    """A third of its objects are difficult: ignored as if they were beyond every size."""
    generator = np.random.default_rng(7)
    corner = generator.uniform(0, 300, (30, 2))
    boxes = np.concatenate([corner, np.add(corner, (40, 30))], axis=1)
    objects = truth(boxes, [1] * 30, difficult=[n % 3 == 0 for n in range(30)])
    detections = [noisy(objects, generator, 250, 2), noisy(truth([], []), generator, 120, 2)]
    truths = [objects, truth([[0, 0, 9, 9]], [0])]
    ours = score_coco(truths, detections, TWO)
    theirs = pycocotools_numbers(pycocotools_evaluation(truths, detections, 2))
    assert values(ours) == pytest.approx(numbers_or_nan(theirs), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("limit", [1, 7, 10, 300])
def test_max_detections_other_than_100_give_numbers(limit: int) -> None:
    """Peers' bug 16: with another maximum the numbers were -1."""
    generator = np.random.default_rng(limit)
    truths = [truth([[0, 0, 50, 60], [70, 70, 110, 100]], [0, 1]) for _ in range(5)]
    detections = [noisy(each, generator, 40, 2) for each in truths]
    ours = score_coco(truths, detections, TWO, max_detections=limit)
    limits = sorted({1, min(10, limit), limit})
    theirs = pycocotools_evaluation(truths, detections, 2, limits)
    precision, recall = theirs.eval["precision"], theirs.eval["recall"]
    assert ours.ap > 0
    assert ours.ap == pytest.approx(precision[:, :, :, 0, -1].mean(), abs=1e-12)
    assert ours.numbers()[f"ar{limit}"] == pytest.approx(recall[:, :, 0, -1].mean(), abs=1e-12)
    assert min(ours.numbers()[name] for name in ("ap", "ap50", "ar1", "ar10")) >= 0


def test_one_hit_below_one_miss_gives_precision_one_half_at_every_recall() -> None:
    pictures = [truth([[10, 20, 40, 50]], [1])]
    detections = [found([[80, 80, 90, 95], [10, 20, 40, 50]], [1, 1], [0.9, 0.8])]
    scores = score_coco(pictures, detections, TWO)
    assert scores.ap50 == pytest.approx(0.5)
    assert [each.ap50 for each in scores.per_class] == pytest.approx([np.nan, 0.5], nan_ok=True)
    assert [each.objects for each in scores.per_class] == [0, 1]


def test_numbers_of_sizes_that_do_not_occur_do_not_exist() -> None:
    """Neither -1 nor 0: a mean over nothing."""
    scores = score_coco([truth([[0, 0, 200, 100]], [0])], [NOTHING], TWO)
    assert (scores.ap, scores.ap_large, scores.ar1) == (0.0, 0.0, 0.0)
    assert np.isnan([scores.ap_small, scores.ap_medium, scores.ar_small, scores.ar_medium]).all()


def test_the_area_of_the_mask_decides_the_size_and_not_the_box() -> None:
    box = [0, 0, 200, 100]
    scores = score_coco([truth([box], [0], areas=[500.0])], [found([box], [0], [0.6])], TWO)
    assert scores.ap_small == 1.0
    assert np.isnan(scores.ap_large)


def test_no_picture_no_object_and_no_detection_are_no_numbers() -> None:
    assert np.isnan(list(score_coco([], [], TWO).numbers().values())).all()
    empty = score_coco([truth([], [])], [NOTHING], TWO)
    assert np.isnan(list(empty.numbers().values())).all()


def test_difficult_objects_are_ignored_kept_or_dropped_by_name() -> None:
    """The surest detection is on the difficult object, the second on the other one."""
    boxes = [[0, 0, 30, 30], [60, 60, 100, 90]]
    pictures = [truth(boxes, [0, 0], difficult=[True, False])]
    detections = [found(boxes, [0, 0], [0.9, 0.8])]
    by_policy = {
        policy: score_coco(pictures, detections, TWO, difficult=policy).per_class[0]
        for policy in ("ignore", "keep", "drop")
    }
    assert {name: (each.ap50, each.objects) for name, each in by_policy.items()} == {
        "ignore": (pytest.approx(1.0), 1),
        "keep": (pytest.approx(1.0), 2),
        "drop": (pytest.approx(0.5), 1),
    }
    lost = [found(boxes[1:], [0], [0.8])]
    assert score_coco(pictures, lost, TWO, difficult="keep").ap50 == pytest.approx(51 / 101)
    assert score_coco(pictures, lost, TWO, difficult="ignore").ap50 == pytest.approx(1.0)


def test_as_many_truths_as_detections_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^1 annotated pictures and 2 with detections"):
        score_coco([truth([], [])], [NOTHING, NOTHING], TWO)
    with pytest.raises(ValueError, match="max_detections=0"):
        score_coco([], [], TWO, max_detections=0)


def test_a_class_that_is_not_evaluated_is_an_error_that_names_the_picture() -> None:
    annotation = BoxAnnotation(
        "000007", 20, 10, ((0.0, 0.0, 5.0, 5.0),), ("bird",), None, None, (False,), (False,)
    )
    with pytest.raises(ValueError, match=r"000007: the class 'bird' is none of the 2"):
        truth_of(annotation, TWO)


def test_areas_are_of_the_boxes_where_there_are_no_masks() -> None:
    annotation = BoxAnnotation(
        "a", 20, 10, ((1.0, 2.0, 5.0, 5.0),), ("dog",), None, None, (False,), (True,)
    )
    picture = truth_of(annotation, TWO)
    assert picture.areas.tolist() == [12.0]
    assert picture.labels.tolist() == [1]
    assert picture.difficult.tolist() == [True]


def real_coco(path: Path) -> tuple[list[PictureTruth], Classes]:
    content = json.loads(path.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    classes = Classes(tuple(names[id] for id in sorted(names)), tuple(sorted(names)))
    truths = []
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        corners = np.array([entry["bbox"] for entry in own]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = [sorted(names).index(entry["category_id"]) for entry in own]
        areas = [float(entry["area"]) for entry in own]
        truths.append(truth(corners, labels, areas, [bool(entry["iscrowd"]) for entry in own]))
    return truths, classes


def values(scores: CocoScores) -> list[float]:
    return list(scores.numbers().values())


def numbers_or_nan(stats: np.ndarray) -> np.ndarray:
    return np.where(stats == -1, np.nan, stats)


def assert_classes_equal(scores: CocoScores, precision: np.ndarray) -> None:
    for label, each in enumerate(scores.per_class):
        theirs = numbers_or_nan(precision[:, :, label, 0, -1])
        assert each.ap == pytest.approx(theirs.mean(), abs=1e-9, nan_ok=True)
        assert each.ap50 == pytest.approx(theirs[0].mean(), abs=1e-9, nan_ok=True)
