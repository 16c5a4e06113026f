"""Made objects, noisy detections of them, and COCO's own evaluator on the same arrays."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune.coco_ap import IGNORED_AREA
from finetune.scores import PictureDetections, PictureTruth


def truth(
    boxes: Sequence[Sequence[float]] | np.ndarray,
    labels: Sequence[int],
    areas: Sequence[float] | None = None,
    crowd: Sequence[bool] | None = None,
    difficult: Sequence[bool] | None = None,
) -> PictureTruth:
    """Objects of a picture; areas are the boxes' own where none are given."""
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    own = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    return PictureTruth(
        corners,
        np.array(labels, np.int64),
        own if areas is None else np.array(areas, np.float64),
        np.array(crowd if crowd is not None else [False] * len(labels), bool),
        np.array(difficult if difficult is not None else [False] * len(labels), bool),
    )


def found(
    boxes: Sequence[Sequence[float]] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
) -> PictureDetections:
    return PictureDetections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(scores, np.float32),
    )


def noisy(
    picture: PictureTruth, generator: np.random.Generator, count: int, num_classes: int
) -> PictureDetections:
    """Detections near the objects (some twice, some of another class) and anywhere, with ties."""
    near = generator.integers(0, max(1, len(picture.labels)), count // 2)
    near = near[: len(near) if len(picture.labels) else 0]
    boxes = np.concatenate([picture.boxes_xyxy[near], _anywhere(generator, count - len(near))])
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + sides * generator.normal(0, 0.08, boxes.shape)
    boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    labels = generator.integers(0, num_classes, count)
    right = np.flatnonzero(generator.random(len(near)) < 0.8)
    labels[right] = picture.labels[near[right]]
    scores = generator.random(count).round(2)
    order = generator.permutation(count)
    return found(boxes[order], labels[order], scores[order])


def pycocotools_evaluation(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    num_classes: int,
    limits: Sequence[int] = (1, 10, 100),
) -> COCOeval:
    """COCO's evaluator after `accumulate`, its prints swallowed; difficult objects are ignored as
    objects beyond every size."""
    annotated, results = COCO(), COCO()
    images = [{"id": number + 1} for number in range(len(truths))]
    categories = [{"id": number + 1} for number in range(num_classes)]
    annotated.dataset = {
        "images": images,
        "categories": categories,
        "annotations": _objects(truths),
    }
    results.dataset = {
        "images": images,
        "categories": categories,
        "annotations": _found(detections),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        annotated.createIndex()
        results.createIndex()
        evaluation = COCOeval(annotated, results, "bbox")
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def pycocotools_numbers(evaluation: COCOeval) -> np.ndarray:
    """The twelve numbers as `summarize` makes them; -1 where one does not exist."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def _anywhere(generator: np.random.Generator, count: int) -> np.ndarray:
    corner = generator.uniform(0, 400, (count, 2))
    return np.concatenate([corner, corner + generator.exponential(80, (count, 2)) + 1], axis=1)


def _objects(truths: Sequence[PictureTruth]) -> list[dict[str, object]]:
    entries = [
        (picture, box, label, IGNORED_AREA if difficult else area, crowd)
        for picture, each in enumerate(truths, start=1)
        for box, label, area, crowd, difficult in zip(
            each.boxes_xyxy.tolist(),
            each.labels.tolist(),
            each.areas.tolist(),
            each.crowd.tolist(),
            each.difficult.tolist(),
            strict=True,
        )
    ]
    return [
        {
            "id": number,
            "image_id": picture,
            "category_id": label + 1,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (picture, box, label, area, crowd) in enumerate(entries, start=1)
    ]


def _found(detections: Sequence[PictureDetections]) -> list[dict[str, object]]:
    entries = [
        (picture, box, label, score)
        for picture, each in enumerate(detections, start=1)
        for box, label, score in zip(
            each.boxes_xyxy.tolist(), each.labels.tolist(), each.scores.tolist(), strict=True
        )
    ]
    return [
        {
            "id": number,
            "image_id": picture,
            "category_id": label + 1,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": (box[2] - box[0]) * (box[3] - box[1]),
            "score": score,
        }
        for number, (picture, box, label, score) in enumerate(entries, start=1)
    ]
