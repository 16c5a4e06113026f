"""Evaluation of a detector on a labelled set: predicted by all workers, scored by one.

Worker r of n predicts every n-th picture once; batches hold pictures of like shape. As DETR does
it: the likeliest class of each object query (the softmax's column of no object is no choice), or
with sigmoid scores the surest pairs of a query and a class; no threshold, no suppression. What was
found is gathered once, as small arrays on the CPU; scoring needs no model and may run in a thread
beside the training. The loss is not computed: it would cost a matching of every batch and says less
than AP.

The classes of the model and of the data meet by name, so that a detector of COCO can be judged on
VOC. A picture that cannot be read is left out, its objects too, and is named in the result.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from data.detection_set import DetectionSet
from data.evaluation_batches import EvaluationBatch, EvaluationSizes, evaluation_batches
from data.reading import ReadingSettings
from finetune.coco_ap import CocoScores, score_coco
from finetune.scores import Difficult, PictureDetections, PictureTruth
from finetune.shares import ClassMap, JudgedPicture, Share, map_classes, predict_share
from finetune.voc_ap import VocScores, score_voc
from models.matching import ClassScores
from models.settings import Settings
from models.structures import Classes
from models.urls import public_url
from training.world import World, gather_objects

EvaluationProtocol = Literal["coco", "voc07", "voc"]
"""COCO's twelve numbers; VOC's AP by 11 points, as for VOC2007; VOC's AP by area."""

Progress = Callable[[int, int], None]
"""Told the pictures done and all pictures, of this worker."""


class EvaluationSettings(Settings):
    """How a detector is judged."""

    protocols: Annotated[tuple[EvaluationProtocol, ...], Field(min_length=1)] = ("coco",)
    """Whose numbers: coco, voc07 (11 points) and voc (area)."""
    difficult: Difficult = "ignore"
    """Objects marked difficult (VOC): keep (as all others), ignore (as VOC does), drop."""
    max_detections: int = Field(default=100, ge=1)
    """Detections of one picture that count, the surest ones."""
    max_pictures: int | None = Field(default=None, ge=1)
    """Judge on so many pictures, evenly spread over the set; null takes all."""
    sizes: EvaluationSizes = EvaluationSizes()
    """The size that a picture is brought to."""
    batch_size: int = Field(default=4, ge=1)
    """Pictures in a batch of one worker."""
    processes: int = Field(default=2, ge=0)
    """Loader processes of each worker; 0 reads in the worker itself."""

    @model_validator(mode="after")
    def _no_protocol_twice(self) -> Self:
        twice = [name for name in self.protocols if self.protocols.count(name) > 1]
        if twice:
            raise ValueError(f"protocols names {twice[0]} twice; name each once")
        return self


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a detector on a labelled set."""

    data: str
    """The set, as the user wrote it but for credentials."""
    pictures: int
    """That were judged."""
    skipped: tuple[str, ...]
    """Pictures that could not be read, and why; neither their objects count nor anything else."""
    missing: tuple[str, ...]
    """Classes of the data that the detector does not know: their AP is 0 where they have objects.
    """
    left_out: Mapping[str, int]
    """Detections of each class of the detector that the data do not have; they do not count."""
    not_finite: int
    """Detections whose score or box is not a number; they do not count."""
    difficult: Difficult
    coco: CocoScores | None
    """None where it was not asked for."""
    voc: tuple[VocScores, ...]
    selection: Mapping[str, float] = field(default_factory=dict)
    """Of a detector that updates a part of its tokens: Corr, the share of the decoder's attention
    that meets them, 0..1, of all and by level; the mean over batches weighted by their pictures.
    """

    def numbers(self) -> dict[str, float]:
        """By name, `ap`, `ap50` ... of COCO, `voc07_ap50` ... of VOC; NaN where none exists."""
        numbers = self.coco.numbers() if self.coco else {}
        return numbers | {name: x for scores in self.voc for name, x in scores.numbers().items()}

    def metrics(self) -> dict[str, float]:
        """The numbers that exist, by name, 0..1, and how many pictures could not be read."""
        known = {name: x for name, x in self.numbers().items() if not math.isnan(x)}
        return {**known, **self.selection, "skipped": float(len(self.skipped))}


def evaluate_detector(
    model: nn.Module,
    data: DetectionSet,
    model_classes: Classes,
    settings: EvaluationSettings,
    world: World,
    precision: Literal["float32", "bf16"] = "float32",
    reading: ReadingSettings | None = None,
    progress: Progress | None = None,
    class_scores: ClassScores = "softmax",
) -> Callable[[], Evaluation]:
    """Predicts on every worker, each its own pictures; what comes back does the scoring.

    The model is in evaluation mode and on `world.device`. Every worker may score, one is enough.

    Raises:
        ValueError: the model and the data have no class in common; an object of an unknown class.
        What reading the data raises.
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
    with closing(batches) as open_batches:
        told = _counted(open_batches, len(ids), progress) if progress else open_batches
        share = predict_share(
            model,
            told,
            model_classes,
            data.classes,
            settings.max_detections,
            precision,
            class_scores,
        )
    shares = gather_objects(share)
    return lambda: score_shares(shares, data, class_map, settings)


def evaluated_ids(num_samples: int, max_pictures: int | None) -> list[int]:
    """The samples to judge on: all, or `max_pictures` that are evenly spread over the set.

    Sets often lie sorted by class: the first ones alone would show a few of them.
    """
    count = min(num_samples, max_pictures or num_samples)
    return [number * num_samples // count for number in range(count)]


def score_shares(
    shares: Sequence[Share], data: DetectionSet, class_map: ClassMap, settings: EvaluationSettings
) -> Evaluation:
    """The numbers of what all workers found; the same however the pictures were shared out."""
    found = sorted((picture for share in shares for picture in share.pictures), key=_sample_id)
    truths = [picture.truth for picture in found]
    detections = [picture.detections for picture in found]
    return Evaluation(
        data=public_url(data.url),
        pictures=len(found),
        skipped=tuple(sorted(name for share in shares for name in share.skipped)),
        missing=class_map.missing,
        left_out=_summed([share.left_out for share in shares]),
        not_finite=sum(share.not_finite for share in shares),
        difficult=settings.difficult,
        coco=_coco(truths, detections, data.classes, settings),
        voc=tuple(
            score_voc(truths, detections, data.classes, protocol, settings.difficult)
            for protocol in settings.protocols
            if protocol != "coco"
        ),
        selection=_corr(shares, len(found)),
    )


def _coco(
    truths: Sequence[PictureTruth],
    detections: Sequence[PictureDetections],
    classes: Classes,
    settings: EvaluationSettings,
) -> CocoScores | None:
    if "coco" not in settings.protocols:
        return None
    return score_coco(truths, detections, classes, settings.difficult, settings.max_detections)


def _corr(shares: Sequence[Share], pictures: int) -> dict[str, float]:
    names = sorted({name for share in shares for name in share.corr})
    return {name: sum(share.corr.get(name, 0.0) for share in shares) / pictures for name in names}


def _sample_id(picture: JudgedPicture) -> int:
    return picture.sample_id


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = sorted({name for each in counts for name in each})
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


def _counted(
    batches: Iterator[EvaluationBatch], total: int, progress: Progress
) -> Iterator[EvaluationBatch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.keys) + len(batch.skipped)
        progress(done, total)
