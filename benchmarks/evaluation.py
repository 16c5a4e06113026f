"""Seconds to score predictions, beside pycocotools, with equal numbers.

    python -m benchmarks.evaluation

Made truth of 80 classes (7.3 objects a picture, as in COCO, some of them crowds) and made
detections around it, from one seed: --pictures pictures with --detections each. Ours (from arrays),
VOC's AP, and pycocotools from the lists of dictionaries that it takes (the time to make them is not
counted), in one process, in turn; CPU seconds. Fails where one of the twelve numbers differs by
1e-9.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune.coco_ap import CocoScores, score_coco
from finetune.scores import PictureDetections, PictureTruth
from finetune.voc_ap import score_voc
from models.structures import Classes

CLASSES = Classes(tuple(f"class {n}" for n in range(80)), tuple(range(1, 81)))

T = TypeVar("T")


def main() -> None:
    """Reads the arguments and prints the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of each picture")
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    truths = [made_truth(generator) for _ in range(arguments.pictures)]
    detections = [made_detections(each, generator, arguments.detections) for each in truths]
    for number in range(arguments.repeat):
        ours, our_s = timed(lambda: score_coco(truths, detections, CLASSES))
        _, voc_s = timed(lambda: score_voc(truths, detections, CLASSES, "voc07"))
        lists = coco_lists(truths, detections)
        theirs, their_s = timed(partial(pycocotools_numbers, *lists))
        # Millions of live objects slow down whoever makes new ones, through garbage collection.
        del lists
        check_equal(ours, theirs)
        print(f"{number + 1}: ours {our_s:.1f} s, pycocotools {their_s:.1f} s, "
              f"{their_s / our_s:.1f} times faster; VOC 11 points, ten thresholds "
              f"{voc_s:.1f} s")  # fmt: skip
    largest = np.abs(np.array(list(ours.numbers().values())) - theirs).max()
    print(f"AP {ours.ap:.6f}; largest difference of the twelve numbers {largest:.1e}")


def made_truth(generator: np.random.Generator) -> PictureTruth:
    """Objects of a picture of 640 x 480; one in a hundred is a crowd."""
    count = int(generator.poisson(7.3))
    corner = generator.uniform(0, [560, 400], (count, 2))
    boxes = np.concatenate([corner, corner + generator.exponential(90, (count, 2)) + 4], axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) * generator.uniform(0.4, 0.9, count)
    return PictureTruth(
        boxes_xyxy=boxes.round(2),
        labels=generator.integers(0, 80, count),
        areas=areas,
        crowd=generator.random(count) < 0.01,
        difficult=np.zeros(count, bool),
    )


def made_detections(
    truth: PictureTruth, generator: np.random.Generator, count: int
) -> PictureDetections:
    """A third near objects of the picture, mostly of their class; the others anywhere."""
    near = generator.integers(0, max(1, len(truth.labels)), count // 3 if len(truth.labels) else 0)
    corner = generator.uniform(0, [560, 400], (count - len(near), 2))
    far = np.concatenate([corner, corner + generator.exponential(90, corner.shape) + 4], axis=1)
    boxes = np.concatenate([truth.boxes_xyxy[near], far])
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + generator.normal(0, 0.07, boxes.shape) * sides
    labels = generator.integers(0, 80, count)
    right = np.flatnonzero(generator.random(len(near)) < 0.8)
    labels[right] = truth.labels[near[right]]
    scores = generator.random(count) ** np.where(np.arange(count) < len(near), 1, 3)
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    return PictureDetections(
        np.concatenate([low, high], axis=1).astype(np.float32), labels, scores.astype(np.float32)
    )


def coco_lists(
    truths: Sequence[PictureTruth], detections: Sequence[PictureDetections]
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The same as COCO's json and its results list, which pycocotools takes."""
    annotations: list[dict[str, object]] = []
    results: list[dict[str, object]] = []
    for image, (truth, found) in enumerate(zip(truths, detections, strict=True), start=1):
        for box, label, area, crowd in zip(
            xywh(truth.boxes_xyxy), truth.labels.tolist(), truth.areas.tolist(), truth.crowd,
            strict=True,
        ):  # fmt: skip
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label + 1,
                 "bbox": box, "area": area, "iscrowd": int(crowd)}
            )  # fmt: skip
        results += [
            {"image_id": image, "category_id": label + 1, "bbox": box, "score": score}
            for box, label, score in zip(
                xywh(found.boxes_xyxy), found.labels.tolist(), found.scores.tolist(), strict=True
            )
        ]
    images = [{"id": number} for number in range(1, len(truths) + 1)]
    categories = [{"id": number} for number in range(1, 81)]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def xywh(boxes_xyxy: np.ndarray) -> list[list[float]]:
    """Corner and size, in float64."""
    wide = boxes_xyxy.astype(np.float64)
    whole: list[list[float]] = np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()
    return whole


def pycocotools_numbers(
    annotated: dict[str, object], results: list[dict[str, object]]
) -> np.ndarray:
    """COCO's twelve numbers by its own code, whose prints are swallowed."""
    truth = COCO()
    truth.dataset = annotated
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What comes back, and the CPU seconds of this process that it took."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def check_equal(ours: CocoScores, theirs: np.ndarray) -> None:
    """Raises SystemExit, naming the number, where they differ."""
    for (name, value), other in zip(ours.numbers().items(), theirs, strict=True):
        if not abs(value - other) <= 1e-9:
            raise SystemExit(f"{name}: {value!r} is not pycocotools' {other!r}")


if __name__ == "__main__":
    main()
