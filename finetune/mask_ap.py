"""COCO's average precision of masks (Lin et al., 2014; COCOeval of `segm`): overlaps of masks.

Masks travel as run lengths, as COCO's results do. The engine is faster-coco-eval's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as run_lengths
from jaxtyping import Bool, Float32, Int64

from finetune.coco_ap import Record, logger


@dataclass(frozen=True)
class PictureMasks:
    """The masks of one picture, annotated or found."""

    runs: tuple[Record, ...]
    """Run lengths, see `encoded`."""
    labels: Int64[np.ndarray, " masks"]
    scores: Float32[np.ndarray, " masks"] | None = None
    """Of found ones."""
    crowd: Bool[np.ndarray, " masks"] | None = None
    """Of annotated ones: neither to be found nor a mistake to find."""


@dataclass(frozen=True)
class MaskScores:
    """Mean over the classes, 0..1; NaN where there is nothing to find."""

    ap: float
    """Mean over the IoU thresholds 0.50:0.05:0.95."""
    ap50: float
    ap75: float

    def numbers(self) -> dict[str, float]:
        """By name."""
        return {"mask_ap": self.ap, "mask_ap50": self.ap50, "mask_ap75": self.ap75}


def encoded(masks: Bool[np.ndarray, "masks height width"]) -> tuple[Record, ...]:
    """As run lengths, in COCO's own form."""
    if not len(masks):
        return ()
    found: list[Record] = run_lengths.encode(
        np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    )
    return tuple(found)


def score_masks(
    truths: Sequence[PictureMasks],
    found: Sequence[PictureMasks],
    num_classes: int,
    max_detections: int = 100,
) -> MaskScores:
    """The numbers of the pictures; `found[n]` is of the picture of `truths[n]`."""
    pictures = enumerate(zip(truths, found, strict=True), start=1)
    images = [_image(number, (*one.runs, *other.runs)) for number, (one, other) in pictures]
    categories: list[Record] = [{"id": number + 1} for number in range(num_classes)]
    if not any(len(truth.labels) for truth in truths):
        return MaskScores(float("nan"), float("nan"), float("nan"))
    engine = COCOeval_faster(
        _dataset(images, categories, truths),
        _dataset(images, categories, found),
        "segm",
        print_function=logger.debug,
    )
    engine.params.maxDets = sorted({1, min(10, max_detections), max_detections})
    engine.evaluate()
    precision = np.asarray(engine.eval["precision"])[:, :, :, 0, -1]
    return MaskScores(_mean(precision), _mean(precision[0]), _mean(precision[5]))


def _image(number: int, runs: Sequence[Record]) -> Record:
    """The size is told by any mask; without one nothing hangs on it."""
    sizes = [run["size"] for run in runs]
    height, width = sizes[0] if sizes and isinstance(sizes[0], list) else (1, 1)
    return {"id": number, "height": height, "width": width}


def _dataset(
    images: list[Record], categories: list[Record], pictures: Sequence[PictureMasks]
) -> COCO:
    records: list[Record] = []
    for number, picture in enumerate(pictures, start=1):
        areas = run_lengths.area(list(picture.runs)) if picture.runs else []
        for place, run in enumerate(picture.runs):
            record: Record = {
                "id": len(records) + 1,
                "image_id": number,
                "category_id": int(picture.labels[place]) + 1,
                "segmentation": run,
                "area": float(areas[place]),
                "iscrowd": 0 if picture.crowd is None else int(picture.crowd[place]),
            }
            if picture.scores is not None:
                record["score"] = float(picture.scores[place])
            records.append(record)
    held = COCO(print_function=logger.debug)
    held.dataset = {"images": images, "categories": categories, "annotations": records}
    held.createIndex()
    return held


def _mean(values: np.ndarray) -> float:
    """Mean of what exists: COCOeval marks the rest with -1."""
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
