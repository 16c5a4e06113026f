"""One worker's part of a one-shot evaluation: features of references, answers to questions.

A picture is encoded once; all references of all its questions are put to that one memory. In a
batch, pictures with fewer questions than the fullest one are padded with features of 0, whose
answers are thrown away: the decoder is a small part of the cost.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from data.evaluation_batches import EvaluationBatch
from data.normalise import normalised
from data.packing import SkippedPicture
from data.reference_crops import PictureCrops
from finetune.one_shot_scores import Question
from finetune.scores import PictureDetections, PictureTruth, truth_of
from finetune.shares import picture_detections
from models.one_shot import matches_only, search
from models.patch_queries import PatchDetector
from models.structures import Classes

Precision = Literal["float32", "bf16"]

_CROPS_AT_ONCE = 64


@dataclass(frozen=True)
class ReferenceFeatures:
    """What the detector sees of references: their pooled CNN features."""

    numbers: Int64[np.ndarray, " references"]
    """Of each in the catalogue, rising."""
    features: Float32[np.ndarray, "references channels"]
    skipped: tuple[str, ...] = ()
    """Pictures of references that could not be read, and why."""

    def usable(self, crops: Sequence[int]) -> list[int]:
        """The places of those references that there are."""
        places = np.searchsorted(self.numbers, crops)
        inside = np.minimum(places, max(len(self.numbers) - 1, 0))
        if not len(self.numbers):
            return []
        return [int(place) for place in inside[self.numbers[inside] == crops]]


@dataclass(frozen=True)
class AnsweredPicture:
    """A picture with what it holds and what each run found in it."""

    sample_id: int
    truth: PictureTruth
    runs: tuple[PictureDetections, ...]
    """Labels are those of the data: the class that was asked for."""


@dataclass(frozen=True)
class AnswerShare:
    """What one worker found."""

    pictures: tuple[AnsweredPicture, ...]
    skipped: tuple[str, ...]
    """Pictures that could not be read, and why."""


@torch.no_grad()
def reference_features(
    model: PatchDetector,
    crops: Iterable[PictureCrops | SkippedPicture],
    device: torch.device,
    precision: Precision,
) -> ReferenceFeatures:
    """The features of all crops, by one run of the CNN for several of them."""
    skipped: list[str] = []
    numbers: list[int] = []
    features = [np.empty((0, model.detector.backbone.channels), np.float32)]
    for batch in _crop_batches(crops, skipped):
        numbers += [number for each in batch for number in each.numbers]
        levels = np.concatenate([each.crops for each in batch])
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = model.patch_features(normalised_crops(levels, device)[:, None])
        features.append(found[:, 0].cpu().numpy())
    return _sorted(np.array(numbers, np.int64), np.concatenate(features), skipped)


def merged(shares: Sequence[ReferenceFeatures]) -> ReferenceFeatures:
    """The features of all workers."""
    return _sorted(
        np.concatenate([share.numbers for share in shares]),
        np.concatenate([share.features for share in shares]),
        [name for share in shares for name in share.skipped],
    )


@torch.no_grad()
def answer_share(
    model: PatchDetector,
    batches: Iterable[EvaluationBatch],
    questions: Mapping[int, Sequence[Question]],
    references: ReferenceFeatures,
    classes: Classes,
    max_detections: int,
    precision: Precision,
) -> AnswerShare:
    """What is found in the pictures, which all have questions; the model is in evaluation mode.

    A reference whose picture could not be read is replaced by the question's next one; a question
    without any stays without an answer.
    """
    pictures: list[AnsweredPicture] = []
    skipped: list[str] = []
    for batch in batches:
        skipped += map(str, batch.skipped)
        if not batch.keys:
            continue
        ids = batch.sample_ids.tolist()
        asked = [[(q, references.usable(q.crops)) for q in questions[id]] for id in ids]
        rows = [[place for _, places in each for place in places] for each in asked]
        found = _found(model, batch, _padded(rows, references.features), precision)
        for row, id in enumerate(ids):
            truth = truth_of(batch.annotations[row], classes)
            answers = [_surest(each[row], max_detections) for each in found]
            pictures.append(AnsweredPicture(id, truth, _by_run(asked[row], answers)))
    return AnswerShare(tuple(pictures), tuple(skipped))


def normalised_crops(
    levels: UInt8[np.ndarray, "crops side side 3"], device: torch.device
) -> Float32[Tensor, "crops 3 side side"]:
    """Crops on the device, as the detector was trained to see them."""
    on_device = torch.from_numpy(levels).to(device).permute(0, 3, 1, 2)
    return normalised(on_device.to(torch.float32))


def _crop_batches(
    crops: Iterable[PictureCrops | SkippedPicture], skipped: list[str]
) -> Iterator[list[PictureCrops]]:
    """Pictures with about so many crops together; the others are put on `skipped`."""
    waiting: list[PictureCrops] = []
    for each in crops:
        if isinstance(each, SkippedPicture):
            skipped.append(str(each))
            continue
        waiting.append(each)
        if sum(len(one.numbers) for one in waiting) >= _CROPS_AT_ONCE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _sorted(
    numbers: Int64[np.ndarray, " references"],
    features: Float32[np.ndarray, "references channels"],
    skipped: Sequence[str],
) -> ReferenceFeatures:
    order = np.argsort(numbers)
    return ReferenceFeatures(numbers[order], features[order], tuple(sorted(skipped)))


def _padded(
    rows: Sequence[Sequence[int]], features: Float32[np.ndarray, "references channels"]
) -> Float32[Tensor, "batch crops channels"]:
    padded = np.zeros((len(rows), max(map(len, rows)), features.shape[1]), np.float32)
    for row, places in enumerate(rows):
        padded[row, : len(places)] = features[places]
    return torch.from_numpy(padded)


def _found(
    model: PatchDetector,
    batch: EvaluationBatch,
    features: Float32[Tensor, "batch crops channels"],
    precision: Precision,
) -> list[list[PictureDetections]]:
    """By crop, then by picture: one detection of each object query."""
    if not features.shape[1]:
        return []
    device = batch.images.pixels.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        memory = model.detector.encode(batch.images)
        layers = search(model, memory, features.to(device))
    scores = model.detector.settings.class_scores
    found = (matches_only(layer, scores) for layer in layers)
    return [picture_detections(layer, batch.stored_sizes) for layer in found]


def _surest(found: PictureDetections, count: int) -> PictureDetections:
    places = np.argsort(-found.scores, kind="stable")[:count]
    return PictureDetections(found.boxes_xyxy[places], found.labels[places], found.scores[places])


def _by_run(
    asked: Sequence[tuple[Question, Sequence[int]]], answers: Sequence[PictureDetections]
) -> tuple[PictureDetections, ...]:
    """The answers to all questions of a picture, by run, with the labels that were asked for."""
    by_question: list[tuple[int, list[PictureDetections]]] = []
    first = 0
    for question, places in asked:
        by_question.append((question.label, list(answers[first : first + len(places)])))
        first += len(places)
    runs = range(len(asked[0][0].crops))
    return tuple(_of_run(run, by_question) for run in runs)


def _of_run(
    run: int, by_question: Sequence[tuple[int, Sequence[PictureDetections]]]
) -> PictureDetections:
    chosen = [(label, found[run % len(found)]) for label, found in by_question if found]
    return PictureDetections(
        np.concatenate([np.empty((0, 4), np.float32), *(each.boxes_xyxy for _, each in chosen)]),
        np.concatenate([np.empty(0, np.int64), *(each.labels + label for label, each in chosen)]),
        np.concatenate([np.empty(0, np.float32), *(each.scores for _, each in chosen)]),
    )
