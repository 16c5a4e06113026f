"""What is asked of a test set in one-shot detection, and how the answers are scored."""

import numpy as np
import pytest

from data.query_crops import ListedObjects, catalogue_of
from finetune.one_shot_report import one_shot_table
from finetune.one_shot_scores import OneShotScores, plan_questions, score_one_shot
from finetune.scores import PictureDetections, PictureTruth
from models.structures import Classes

CLASSES = Classes(("boat", "cat", "dog"), (1, 4, 17))


def objects(*listed: tuple[int, int], difficult: tuple[int, ...] = ()) -> ListedObjects:
    """Objects of 20 x 10 pixels of (sample id, label); `difficult` are numbers of objects."""
    count = len(listed)
    boxes = np.tile(np.array([5, 5, 25, 15], np.float32), (count, 1))
    return ListedObjects(
        sample_ids=np.array([id for id, _ in listed], np.int64),
        labels=np.array([label for _, label in listed], np.int64),
        boxes_xyxy=boxes,
        difficult=np.isin(np.arange(count), difficult),
    )


def truth(*labels: int) -> PictureTruth:
    count = len(labels)
    boxes = np.array([[10.0 * n, 0, 10 * n + 8, 8] for n in range(count)]).reshape(-1, 4)
    return PictureTruth(
        boxes, np.array(labels, np.int64), np.full(count, 64.0), *np.zeros((2, count), bool)
    )


def found(truth: PictureTruth, *right: bool, score: float = 0.9) -> PictureDetections:
    """One detection for each object, at its place or far away."""
    moved = truth.boxes_xyxy + np.where(np.array(right, bool), 0.0, 500.0)[:, None]
    return PictureDetections(
        moved.astype(np.float32), truth.labels, np.full(len(right), score, np.float32)
    )


def test_every_class_of_every_picture_is_asked_for_once_with_k_references() -> None:
    listed = objects((0, 2), (0, 2), (0, 1), (3, 2), (4, 1))
    plan = plan_questions(listed, catalogue_of(listed, (1, 2), 3, 8.0), (0, 3, 4), 2)
    asked = {id: [question.label for question in plan.questions[id]] for id in plan.questions}
    assert asked == {0: [1, 2], 3: [2], 4: [1]}
    assert all(len(question.crops) == 2 for part in plan.questions.values() for question in part)
    assert plan.own_references == 0


def test_references_come_from_other_pictures_of_the_set_also_from_those_not_judged() -> None:
    listed = objects((0, 2), (3, 2), (4, 2))
    plan = plan_questions(listed, catalogue_of(listed, (2,), 3, 8.0), (3,), 4)
    assert list(plan.questions) == [3]
    assert set(plan.questions[3][0].crops) == {0, 2}


def test_a_class_of_one_object_is_asked_with_that_object_and_counted() -> None:
    listed = objects((0, 2), (3, 1), (4, 1))
    plan = plan_questions(listed, catalogue_of(listed, (1, 2), 3, 8.0), (0, 3, 4), 3)
    assert plan.own_references == 3


def test_a_class_without_a_usable_reference_is_not_asked_for_and_is_named() -> None:
    listed = objects((0, 2), (3, 1), (4, 1), difficult=(0,))
    plan = plan_questions(listed, catalogue_of(listed, (0, 1, 2), 3, 8.0), (0, 3, 4), 3)
    assert list(plan.questions) == [3, 4]
    assert plan.without_references == (2,)


def test_difficult_objects_are_asked_for_as_in_the_protocol() -> None:
    listed = objects((0, 2), (3, 2), (4, 2), difficult=(0,))
    plan = plan_questions(listed, catalogue_of(listed, (2,), 3, 8.0), (0, 3, 4), 1)
    assert list(plan.questions) == [0, 3, 4]
    assert plan.questions[0][0].crops[0] in (0, 1)


@pytest.mark.parametrize("protocol", ["voc07", "voc", "coco"])
def test_a_class_has_the_mean_of_its_runs_and_seen_and_unseen_the_mean_of_their_classes(
    protocol: str,
) -> None:
    first, second = truth(0, 1), truth(2)
    right = [found(first, True, True), found(second, True)]
    wrong = [found(first, True, False), found(second, False)]
    scores = score_one_shot(
        [first, second],
        [right, wrong],
        CLASSES,
        ("dog",),
        protocol=protocol,  # type: ignore[arg-type]
    )
    assert [one.ap50 for one in scores.per_class] == pytest.approx([1, 0.5, 0.5])
    assert [one.seen for one in scores.per_class] == [True, True, False]
    assert scores.seen_ap50 == pytest.approx(0.75)
    assert scores.unseen_ap50 == pytest.approx(0.5)
    assert scores.runs == 2


def test_classes_without_objects_or_questions_do_not_count() -> None:
    one = truth(0, 1)
    runs = [[found(one, True, True)]]
    scores = score_one_shot([one], runs, CLASSES, ("cat", "dog"), not_asked=(1,))
    assert scores.seen_ap50 == 1
    assert np.isnan(scores.unseen_ap50)
    assert scores.numbers() == {"voc07_seen_ap50": 1.0}


def test_the_table_lists_seen_classes_before_unseen_ones() -> None:
    one = truth(0, 1, 1)
    scores = score_one_shot([one], [[found(one, True, True, False)]], CLASSES, ("boat",))
    assert one_shot_table(scores).splitlines() == [
        "one-shot, voc07, mean of 1 references",
        "class          objects   AP50",
        "cat    seen          2   54.5",
        "dog    seen          0      -",
        "boat   unseen        1  100.0",
        "mean   seen              54.5",
        "mean   unseen           100.0",
    ]


def test_coco_numbers_have_no_prefix() -> None:
    scores = OneShotScores("coco", 1, (), 0.25, 0.5)
    assert scores.numbers() == {"seen_ap50": 0.25, "unseen_ap50": 0.5}
