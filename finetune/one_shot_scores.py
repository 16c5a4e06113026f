"""Scores of one-shot detection: AP50 of seen and of unseen classes (UP-DETR, table 3; CoAE).

Every class of every test picture is asked for with k references, one at a time. That is k runs of
the whole test set; each is scored by itself and a class's AP50 is the mean over the runs. (CoAE's
code writes one result file for each of its "average" references; that their APs are averaged is
inferred.) A class is looked for only where it is, as in CoAE: pictures without it cost no mistakes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
from jaxtyping import Float64

from data.query_crops import CropCatalogue, ListedObjects, is_of_picture, reference_crops
from finetune.coco_ap import score_coco
from finetune.scores import ClassScores, Difficult, PictureDetections, PictureTruth
from finetune.voc_ap import score_voc
from models.structures import Classes

Protocol = Literal["coco", "voc07", "voc"]
"""How AP50 is read from precision and recall: at 101 points, at 11, as an area."""


@dataclass(frozen=True)
class Question:
    """One class that is asked for in one picture."""

    label: int
    crops: tuple[int, ...]
    """Numbers of its references in the catalogue, one for each run."""


@dataclass(frozen=True)
class QuestionPlan:
    """What is asked in a test set; a pure function of its objects."""

    questions: Mapping[int, tuple[Question, ...]]
    """By sample id, rising; pictures with nothing to ask are not among them."""
    own_references: int
    """References that come from the very picture, because there is no other object."""
    without_references: tuple[int, ...]
    """Labels that have objects but no reference: never asked for, and not scored."""


@dataclass(frozen=True)
class OneShotClass:
    """AP50 of one class, 0..1."""

    name: str
    seen: bool
    objects: int
    ap50: float
    """Mean over the runs; NaN where there is no object to find."""


@dataclass(frozen=True)
class OneShotScores:
    """The numbers of one protocol; NaN where there is no class to speak of."""

    protocol: Protocol
    runs: int
    per_class: tuple[OneShotClass, ...]
    seen_ap50: float
    unseen_ap50: float

    def numbers(self) -> dict[str, float]:
        """By name, the protocol first unless it is COCO's; those that exist."""
        prefix = "" if self.protocol == "coco" else f"{self.protocol}_"
        named = {"seen_ap50": self.seen_ap50, "unseen_ap50": self.unseen_ap50}
        return {f"{prefix}{name}": value for name, value in named.items() if math.isfinite(value)}


def plan_questions(
    objects: ListedObjects, catalogue: CropCatalogue, ids: Sequence[int], references: int
) -> QuestionPlan:
    """Every class of every picture of `ids`, difficult objects included, with its references."""
    labels = range(len(catalogue.firsts) - 1)
    asked = [label for label in labels if catalogue.count(label)]
    pairs = np.unique(np.stack((objects.sample_ids, objects.labels), axis=1), axis=0)
    pairs = pairs[np.isin(pairs[:, 0], ids) & np.isin(pairs[:, 1], asked)]
    questions: dict[int, tuple[Question, ...]] = {}
    for id, label in pairs.tolist():
        crops = reference_crops(catalogue, label, id, references)
        questions[id] = (*questions.get(id, ()), Question(label, tuple(crops)))
    return QuestionPlan(
        questions=questions,
        own_references=_own_references(questions, catalogue),
        without_references=tuple(sorted(set(objects.labels.tolist()) - set(asked))),
    )


def score_one_shot(
    truths: Sequence[PictureTruth],
    runs: Sequence[Sequence[PictureDetections]],
    classes: Classes,
    unseen: Sequence[str],
    not_asked: Sequence[int] = (),
    protocol: Protocol = "voc07",
    difficult: Difficult = "ignore",
) -> OneShotScores:
    """The scores of all runs; `runs[r][n]` is what run r found in the picture of `truths[n]`."""
    by_run = [_per_class(truths, run, classes, protocol, difficult) for run in runs]
    ap50 = np.mean([[scored.ap50 for scored in run] for run in by_run], axis=0)
    ap50[list(not_asked)] = np.nan
    per_class = tuple(
        OneShotClass(scored.name, scored.name not in unseen, scored.objects, float(value))
        for scored, value in zip(by_run[0], ap50, strict=True)
    )
    seen = np.array([one.seen for one in per_class], bool)
    return OneShotScores(protocol, len(runs), per_class, _mean(ap50[seen]), _mean(ap50[~seen]))


def _own_references(questions: Mapping[int, Sequence[Question]], catalogue: CropCatalogue) -> int:
    return sum(
        is_of_picture(catalogue, crop, id)
        for id, asked in questions.items()
        for question in asked
        for crop in question.crops
    )


def _per_class(
    truths: Sequence[PictureTruth],
    found: Sequence[PictureDetections],
    classes: Classes,
    protocol: Protocol,
    difficult: Difficult,
) -> tuple[ClassScores, ...]:
    match protocol:
        case "coco":
            return score_coco(truths, found, classes, difficult).per_class
        case "voc" | "voc07":
            return score_voc(truths, found, classes, protocol, difficult).per_class
        case _:
            assert_never(protocol)


def _mean(values: Float64[np.ndarray, " classes"]) -> float:
    """Mean of what exists."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
