"""Evaluation of one-shot detection: every class of every picture, asked for with k crops.

First each reference is turned into its feature, once for all the questions that show it, shared out
between the workers; then each picture is encoded once, and all its questions are put to that one
memory. Pictures without anything to ask for are not read. What was found is gathered once and
scored by one worker, in a thread if it likes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from data.detection_set import DetectionSet
from data.evaluation_batches import EvaluationBatch, evaluation_batches
from data.one_shot_content import seen_labels
from data.packing import SkippedPicture
from data.query_crops import CropCatalogue, catalogue_of, list_objects
from data.reading import ReadingSettings
from data.reference_crops import PictureCrops, crops_by_picture, read_crops
from data.set_annotations import set_annotations
from finetune.evaluation import EvaluationSettings, Progress, evaluated_ids
from finetune.one_shot import OneShotSettings
from finetune.one_shot_report import OneShotEvaluation
from finetune.one_shot_scores import QuestionPlan, plan_questions, score_one_shot
from finetune.one_shot_shares import (
    AnsweredPicture,
    AnswerShare,
    Precision,
    ReferenceFeatures,
    answer_share,
    merged,
    reference_features,
)
from models.patch_queries import PatchDetector
from models.urls import public_url
from training.world import World, gather_objects


@dataclass(frozen=True)
class OneShotTest:
    """What is asked of a test set: made once, put to a model as often as it is judged."""

    data: DetectionSet
    one_shot: OneShotSettings
    evaluation: EvaluationSettings
    catalogue: CropCatalogue
    """References of all classes, from the test set itself."""
    plan: QuestionPlan


def one_shot_test(
    data: DetectionSet,
    one_shot: OneShotSettings,
    evaluation: EvaluationSettings,
    reading: ReadingSettings | None = None,
) -> OneShotTest:
    """The questions of a test set; reads its annotations.

    Raises:
        ValueError: an unseen class that the data do not have, or nothing to ask for.
        What reading the annotations raises.
    """
    seen_labels(data.classes, one_shot.unseen, data.url)
    objects = list_objects(set_annotations(data, reading or ReadingSettings()), data.classes)
    labels = range(len(data.classes.names))
    catalogue = catalogue_of(objects, labels, len(labels), one_shot.crops.min_side)
    ids = evaluated_ids(data.index.num_samples, evaluation.max_pictures)
    plan = plan_questions(objects, catalogue, ids, one_shot.references)
    if not plan.questions:
        raise ValueError(
            f"{data.url}: none of its {len(ids)} pictures holds a class with a query crop; lower "
            f"one_shot.crops.min_side={one_shot.crops.min_side:g}, or use other data"
        )
    return OneShotTest(data, one_shot, evaluation, catalogue, plan)


def evaluate_one_shot(
    model: PatchDetector,
    test: OneShotTest,
    world: World,
    precision: Precision = "float32",
    reading: ReadingSettings | None = None,
    progress: Progress | None = None,
) -> Callable[[], OneShotEvaluation]:
    """Predicts on every worker, each its own pictures; what comes back does the scoring.

    The model is in evaluation mode and on `world.device`. Every worker may score, one is enough.
    """
    reading = reading or ReadingSettings()
    ids = list(test.plan.questions)[world.rank :: world.size]
    references = _references(model, test, world, precision, reading, progress)
    settings = test.evaluation
    batches = evaluation_batches(
        test.data,
        ids,
        settings.sizes,
        settings.batch_size,
        settings.processes,
        world.device,
        reading,
    )
    with closing(batches) as open_batches:
        share = answer_share(
            model,
            _counted(open_batches, len(ids), progress),
            test.plan.questions,
            references,
            test.data.classes,
            settings.max_detections,
            precision,
        )
    shares = gather_objects(share)
    return lambda: score_answers(shares, references.skipped, test)


def score_answers(
    shares: Sequence[AnswerShare], broken_references: Sequence[str], test: OneShotTest
) -> OneShotEvaluation:
    """The numbers of what all workers found; the same however the pictures were shared out."""
    found = sorted((picture for share in shares for picture in share.pictures), key=_sample_id)
    truths = [picture.truth for picture in found]
    runs = [[each.runs[run] for each in found] for run in range(test.one_shot.references)]
    names = test.data.classes.names
    return OneShotEvaluation(
        data=public_url(test.data.url),
        pictures=len(found),
        questions=sum(len(test.plan.questions[picture.sample_id]) for picture in found),
        skipped=tuple(sorted(name for share in shares for name in share.skipped)),
        broken_references=tuple(broken_references),
        own_references=test.plan.own_references,
        not_asked=tuple(names[label] for label in test.plan.without_references),
        scores=tuple(
            score_one_shot(
                truths,
                runs,
                test.data.classes,
                test.one_shot.unseen,
                test.plan.without_references,
                protocol,
                test.evaluation.difficult,
            )
            for protocol in test.evaluation.protocols
        ),
    )


def _references(
    model: PatchDetector,
    test: OneShotTest,
    world: World,
    precision: Precision,
    reading: ReadingSettings,
    progress: Progress | None,
) -> ReferenceFeatures:
    """The features of all references that are shown, each made by one worker."""
    questions = [question for asked in test.plan.questions.values() for question in asked]
    shown = {crop for question in questions for crop in question.crops}
    pictures = crops_by_picture(test.catalogue, sorted(shown))[world.rank :: world.size]
    crops = read_crops(test.data, test.catalogue, pictures, test.one_shot.crops.side, reading)
    heard = crops if progress is None else _heard(crops, len(test.plan.questions), progress)
    return merged(gather_objects(reference_features(model, heard, world.device, precision)))


def _heard(
    crops: Iterator[PictureCrops | SkippedPicture], total: int, progress: Progress
) -> Iterator[PictureCrops | SkippedPicture]:
    """The crops; each is a sign of life, though no picture is answered yet."""
    for crop in crops:
        progress(0, total)
        yield crop


def _counted(
    batches: Iterator[EvaluationBatch], total: int, progress: Progress | None
) -> Iterator[EvaluationBatch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.keys) + len(batch.skipped)
        if progress is not None:
            progress(done, total)


def _sample_id(picture: AnsweredPicture) -> int:
    return picture.sample_id
