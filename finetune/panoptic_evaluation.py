"""Panoptic quality of a detector with a mask head on a labelled set.

Predicted by all workers, each its own pictures; what is gathered are the counts of each picture
(0.5 kB), no maps and no files. The classes of the model and of the data meet by name; segments of
a class that the data do not have become void and are counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data.annotations import BoxAnnotation
from data.detection_set import DetectionSet
from data.evaluation_batches import EvaluationBatch, evaluation_batches
from data.panoptic_maps import decode_segment_ids, numbered_segments
from data.pictures import BrokenPicture
from data.reading import ReadingSettings
from finetune.evaluation import EvaluationSettings, Progress, evaluated_ids
from finetune.panoptic_postprocess import SegmentSettings, panoptic_maps
from finetune.panoptic_quality import (
    PanopticMap,
    PanopticQuality,
    PictureQuality,
    panoptic_quality,
    picture_quality,
    quality_table,
)
from finetune.shares import ClassMap, map_classes
from models.mask_head import PanopticDetector
from models.structures import Classes
from models.urls import public_url
from training.world import World, gather_objects


@dataclass(frozen=True)
class PanopticEvaluation:
    """The numbers of a detector with a mask head on a labelled set."""

    data: str
    """The set, as the user wrote it but for credentials."""
    quality: PanopticQuality
    skipped: tuple[str, ...]
    """Pictures that could not be read, and why; they count in no number."""
    missing: tuple[str, ...]
    """Classes of the data that the detector does not know: all their segments are missed."""
    left_out: Mapping[str, int]
    """Segments of each class of the detector that the data do not have."""

    def metrics(self) -> dict[str, float]:
        """`pq`, `sq`, `rq` and those of things and stuff, where they exist; skipped pictures."""
        return {**self.quality.metrics(), "skipped": float(len(self.skipped))}

    def content(self) -> dict[str, object]:
        """Everything, as JSON."""
        by_class = {name: vars(quality) for name, quality in self.quality.by_class.items()}
        return {
            "data": self.data,
            "pictures": self.quality.pictures,
            "numbers": self.quality.metrics(),
            "classes": by_class,
            "skipped": list(self.skipped),
            "missing_classes": list(self.missing),
            "left_out_segments": dict(self.left_out),
        }

    def text(self) -> str:
        """The tables, and below them what did not count."""
        lines = [f"{self.quality.pictures} pictures of {self.data}", quality_table(self.quality)]
        lines += [f"left out, could not be read: {told}" for told in self.skipped]
        if self.missing:
            lines.append(f"the detector does not know {', '.join(self.missing)}: missed")
        lines += [
            f"{count} segments of {name}, which the data do not have, are void"
            for name, count in self.left_out.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Share:
    """What one worker found."""

    pictures: tuple[PictureQuality, ...]
    skipped: tuple[str, ...]
    left_out: Mapping[str, int]


def evaluate_panoptic(
    model: PanopticDetector,
    data: DetectionSet,
    model_classes: Classes,
    settings: EvaluationSettings,
    segments: SegmentSettings,
    world: World,
    precision: Literal["float32", "bf16"] = "float32",
    reading: ReadingSettings | None = None,
    progress: Progress | None = None,
) -> Callable[[], PanopticEvaluation]:
    """Predicts on every worker, each its own pictures; what comes back does the scoring.

    The model is in evaluation mode and on `world.device`; what is thing or stuff, the model's
    classes say while segments are merged, the data's while they are scored. Raises ValueError where
    the model and the data have no class in common or the data have no segments, and what reading
    the data raises.
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
    with (
        closing(batches) as open_batches,
        torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        told = _counted(open_batches, len(ids), progress) if progress else open_batches
        share = _share(model, told, data, model_classes, class_map, segments)
    shares = gather_objects(share)
    return lambda: _scored(shares, data, class_map)


def true_map(annotation: BoxAnnotation, png: bytes, classes: Classes) -> PanopticMap:
    """The segments of a picture as they are annotated, crowds too.

    Raises BrokenPicture where the PNG is damaged or not of the annotated size, ValueError for a
    class that is none of `classes`, or an annotation without segments.
    """
    if annotation.segment_ids is None:
        raise ValueError(f"picture {annotation.image_id} has no segments; use kind=coco_panoptic")
    unknown = [name for name in annotation.names if name not in classes.names]
    if unknown:
        raise ValueError(
            f"picture {annotation.image_id}: the class {unknown[0]!r} is none of the "
            f"{len(classes.names)} that are evaluated"
        )
    return PanopticMap(
        numbers=numbered_segments(decode_segment_ids(png), annotation.segment_ids),
        labels=np.array([classes.names.index(name) for name in annotation.names], np.int64),
        crowd=np.array(annotation.crowd, bool),
    )


def renamed_map(found: PanopticMap, labels: Sequence[int]) -> PanopticMap:
    """With the label `labels[n]` for n; segments whose new label is -1 become void."""
    renamed = np.asarray(labels, np.int64)[found.labels]
    kept = renamed >= 0
    numbers = np.zeros(len(kept) + 1, np.int16)
    numbers[1:][kept] = np.arange(1, kept.sum() + 1)
    return PanopticMap(
        numbers=numbers[found.numbers],
        labels=renamed[kept],
        crowd=found.crowd[kept],
        scores=None if found.scores is None else found.scores[kept],
    )


def _share(
    model: PanopticDetector,
    batches: Iterable[EvaluationBatch],
    data: DetectionSet,
    model_classes: Classes,
    class_map: ClassMap,
    segments: SegmentSettings,
) -> _Share:
    pictures: list[PictureQuality] = []
    skipped: list[str] = []
    left_out: Counter[str] = Counter()
    for batch in batches:
        skipped += map(str, batch.skipped)
        if not batch.keys:
            continue
        stored = [(height, width) for height, width in batch.stored_sizes.tolist()]
        maps = panoptic_maps(model, batch.images, stored, model_classes, segments)
        for row, found in enumerate(maps):
            unknown = found.labels[class_map.labels[found.labels] < 0]
            left_out.update(model_classes.names[label] for label in unknown)
            try:
                truth = _truth(batch, row, data)
                known = renamed_map(found, class_map.labels.tolist())
                pictures.append(picture_quality(int(batch.sample_ids[row]), truth, known))
            except BrokenPicture as error:
                skipped.append(f"{batch.keys[row]}: {error}")
    return _Share(tuple(pictures), tuple(skipped), dict(left_out))


def _truth(batch: EvaluationBatch, row: int, data: DetectionSet) -> PanopticMap:
    png, (height, width) = batch.segments[row], batch.stored_sizes[row].tolist()
    if png is None:
        raise ValueError(f"{data.url}: {batch.keys[row]} has no segments; use kind=coco_panoptic")
    truth = true_map(batch.annotations[row], png, data.classes)
    if truth.numbers.shape != (height, width):
        shape = truth.numbers.shape
        raise BrokenPicture(f"{width} x {height} pixels, and its segments {shape[1]} x {shape[0]}")
    return truth


def _scored(
    shares: Sequence[_Share], data: DetectionSet, class_map: ClassMap
) -> PanopticEvaluation:
    left_out: Counter[str] = Counter()
    for share in shares:
        left_out.update(share.left_out)
    pictures = [picture for share in shares for picture in share.pictures]
    return PanopticEvaluation(
        data=public_url(data.url),
        quality=panoptic_quality(pictures, data.classes),
        skipped=tuple(sorted(told for share in shares for told in share.skipped)),
        missing=class_map.missing,
        left_out=dict(sorted(left_out.items())),
    )


def _counted(
    batches: Iterator[EvaluationBatch], total: int, progress: Progress
) -> Iterator[EvaluationBatch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.keys) + len(batch.skipped)
        progress(done, total)
