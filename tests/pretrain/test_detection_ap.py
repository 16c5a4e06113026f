"""Class-agnostic AP: by hand, and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pretrain.detection_ap import PictureDetections, average_precision


def test_one_hit_below_one_miss_gives_precision_one_half_at_every_recall() -> None:
    picture = PictureDetections(scores=np.array([0.9, 0.8]), iou=np.array([[0.0], [1.0]]))
    assert average_precision([picture]).ap50 == pytest.approx(0.5)


def test_a_box_is_claimed_once_and_the_second_detection_of_it_is_a_miss() -> None:
    picture = PictureDetections(
        scores=np.array([0.9, 0.8, 0.7]), iou=np.array([[0.9, 0.0], [0.8, 0.0], [0.0, 0.6]])
    )
    # Recall 0.5 at precision 1 (51 of 101 recalls), then recall 1 at precision 2/3 (the other 50).
    assert average_precision([picture]).ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_no_box_at_all_is_nan_and_no_detection_is_zero() -> None:
    empty = PictureDetections(scores=np.zeros(0), iou=np.zeros((0, 2)))
    assert np.isnan(average_precision([]).ap)
    assert average_precision([empty]).ap == 0.0


def test_equals_pycocotools_on_random_detections() -> None:
    rng = np.random.default_rng(3)
    boxes = [_boxes(rng, count) for count in (3, 0, 5, 2)]
    found = [
        _boxes(rng, 7),
        _boxes(rng, 4),
        np.concatenate([boxes[2] + 3.0, _boxes(rng, 120)]),
        boxes[3],
    ]
    scores = [rng.random(len(each)).round(1) for each in found]
    pictures = [
        PictureDetections(score, _iou(detections, truth))
        for score, detections, truth in zip(scores, found, boxes, strict=True)
    ]
    ours, theirs = average_precision(pictures), _coco(boxes, found, scores)
    assert ours.ap == pytest.approx(theirs[0], abs=1e-12)
    assert ours.ap50 == pytest.approx(theirs[1], abs=1e-12)
    assert ours.ap75 == pytest.approx(theirs[2], abs=1e-12)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner, size = rng.uniform(0, 40, (count, 2)), rng.uniform(20, 60, (count, 2))
    return np.concatenate([corner, size], axis=1)


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum((first[:, :2] + first[:, 2:])[:, None], (second[:, :2] + second[:, 2:])[None])
    overlap = np.clip(high - low, 0, None).prod(-1)
    area = first[:, 2:].prod(-1)[:, None] + second[:, 2:].prod(-1)[None]
    return overlap / (area - overlap)


def _coco(boxes: list[np.ndarray], found: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in range(len(boxes))],
        "categories": [{"id": 1}],
        "annotations": [],
    }
    for number, each in enumerate(boxes):
        for box in each.tolist():
            truth.dataset["annotations"].append(
                {
                    "id": len(truth.dataset["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    results = [
        {"image_id": number, "category_id": 1, "bbox": box, "score": score}
        for number, (each, values) in enumerate(zip(found, scores, strict=True))
        for box, score in zip(each.tolist(), values.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)
