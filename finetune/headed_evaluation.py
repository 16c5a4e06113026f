"""Evaluation of RetinaNet and Mask R-CNN: boxes as for any detector, masks where there are some.

Masks are judged where the data have segments (COCO panoptic): those of its things, crowds
neither to be found nor mistakes.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from data.detection_set import DetectionSet
from data.evaluation_batches import EvaluationBatch, evaluation_batches
from data.reading import ReadingSettings
from finetune.evaluation import (
    Evaluation,
    EvaluationSettings,
    Progress,
    evaluated_ids,
    score_shares,
)
from finetune.evaluation_report import evaluation_json, evaluation_text
from finetune.mask_ap import MaskScores, PictureMasks, encoded, score_masks
from finetune.panoptic_evaluation import true_map
from finetune.scores import PictureDetections, PictureTruth, truth_of
from finetune.shares import ClassMap, Finds, Share, map_classes
from models.other_heads import FoundObjects, HeadedDetector
from models.structures import Classes
from training.world import World, gather_objects


@dataclass(frozen=True)
class HeadedEvaluation:
    """What was found, and by its masks too where the data have some."""

    boxes: Evaluation
    masks: MaskScores | None

    def metrics(self) -> dict[str, float]:
        """Those of the boxes, and `mask_ap`, `mask_ap50`, `mask_ap75`; only those that exist."""
        numbers = {} if self.masks is None else self.masks.numbers()
        known = {name: value for name, value in numbers.items() if not np.isnan(value)}
        return {**self.boxes.metrics(), **known}

    def content(self) -> dict[str, object]:
        """Everything, as values of JSON."""
        masks = None if self.masks is None else self.masks.numbers()
        return {**evaluation_json(self.boxes), "masks": masks}

    def text(self) -> str:
        """Tables for a terminal."""
        if self.masks is None:
            return evaluation_text(self.boxes)
        numbers = "  ".join(f"{name} {100 * x:.1f}" for name, x in self.masks.numbers().items())
        return f"{evaluation_text(self.boxes)}\n\nmasks: {numbers}"


@dataclass(frozen=True)
class _Masked:
    """The masks of one picture."""

    sample_id: int
    truth: PictureMasks
    found: PictureMasks


def evaluate_headed(
    model: HeadedDetector,
    data: DetectionSet,
    model_classes: Classes,
    settings: EvaluationSettings,
    world: World,
    precision: Literal["float32", "bf16"] = "float32",
    reading: ReadingSettings | None = None,
    progress: Progress | None = None,
) -> Callable[[], HeadedEvaluation]:
    """Predicts on every worker, each its own pictures; what comes back does the scoring.

    The model is in evaluation mode and on `world.device`. Raises ValueError where model and data
    have no class in common, and what reading the data raises.
    """
    class_map = map_classes(model_classes, data.classes)
    ids = evaluated_ids(data.index.num_samples, settings.max_pictures)[world.rank :: world.size]
    batches = evaluation_batches(
        data,
        ids,
        settings.sizes,
        settings.batch_size,
        settings.processes,
        world.device,
        reading or ReadingSettings(),
    )
    finds, masked, skipped = Finds(), list[_Masked](), list[str]()
    has_masks = model.head_name == "mask_rcnn" and data.classes.things is not None
    with closing(batches) as opened:
        for batch in opened:
            skipped += map(str, batch.skipped)
            if batch.keys:
                found = _found(model, batch, precision)
                truths = [truth_of(each, data.classes) for each in batch.annotations]
                if has_masks:
                    truths = [_of_things(truth, data.classes) for truth in truths]
                boxes = [_boxes(each) for each in found]
                most = settings.max_detections
                finds.add(batch.sample_ids.tolist(), truths, boxes, class_map, most)
                if has_masks:
                    masked += _masks(batch, found, data.classes, class_map)
            if progress is not None:
                progress(len(finds.pictures) + len(skipped), len(ids))
    own = Share(
        tuple(finds.pictures),
        tuple(skipped),
        {model_classes.names[label]: count for label, count in finds.left_out.items()},
        finds.not_finite,
    )
    shares = gather_objects((own, tuple(masked)))
    return lambda: _scored(shares, data, class_map, settings, has_masks)


def _scored(
    shares: Sequence[tuple[Share, tuple[_Masked, ...]]],
    data: DetectionSet,
    class_map: ClassMap,
    settings: EvaluationSettings,
    has_masks: bool,
) -> HeadedEvaluation:
    boxes = score_shares([share for share, _ in shares], data, class_map, settings)
    if not has_masks:
        return HeadedEvaluation(boxes, None)
    pictures = sorted((one for _, some in shares for one in some), key=lambda one: one.sample_id)
    masks = score_masks(
        [picture.truth for picture in pictures],
        [picture.found for picture in pictures],
        len(data.classes.names),
        settings.max_detections,
    )
    return HeadedEvaluation(boxes, masks)


@torch.no_grad()
def _found(
    model: nn.Module, batch: EvaluationBatch, precision: Literal["float32", "bf16"]
) -> list[FoundObjects]:
    assert isinstance(model, HeadedDetector)
    device = batch.images.pixels.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        return model.find(batch.images, batch.stored_sizes)


def _of_things(truth: PictureTruth, classes: Classes) -> PictureTruth:
    """Stuff has boxes in COCO panoptic, and no head here learns them."""
    assert classes.things is not None
    kept = np.array(classes.things)[truth.labels]
    return PictureTruth(
        truth.boxes_xyxy[kept],
        truth.labels[kept],
        truth.areas[kept],
        truth.crowd[kept],
        truth.difficult[kept],
    )


def _boxes(found: FoundObjects) -> PictureDetections:
    return PictureDetections(
        found.boxes_xyxy.float().cpu().numpy(),
        found.labels.cpu().numpy(),
        found.scores.float().cpu().numpy(),
    )


def _masks(
    batch: EvaluationBatch, found: Sequence[FoundObjects], classes: Classes, class_map: ClassMap
) -> list[_Masked]:
    assert classes.things is not None
    things = np.array(classes.things)
    masked = []
    for number, each in enumerate(found):
        png = batch.segments[number]
        assert png is not None
        true = true_map(batch.annotations[number], png, classes)
        are_things = things[true.labels]
        numbers = np.flatnonzero(are_things) + 1
        truth = PictureMasks(
            encoded(true.numbers[None] == numbers[:, None, None]),
            true.labels[are_things],
            crowd=true.crowd[are_things],
        )
        labels = class_map.labels[each.labels.cpu().numpy()]
        known = labels >= 0
        assert each.masks is not None
        answer = PictureMasks(
            encoded(each.masks.cpu().numpy()[known]),
            labels[known],
            scores=each.scores.float().cpu().numpy()[known],
        )
        masked.append(_Masked(int(batch.sample_ids[number]), truth, answer))
    return masked
