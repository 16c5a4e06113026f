"""One-shot evaluation: every question answered from one encoding, as if it were asked alone."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.detection_set import DetectionSet
from data.evaluation_batches import EvaluationSizes, evaluation_batches
from data.query_crops import CropSettings
from data.reading import ReadingSettings
from data.reference_crops import PictureCrops, crops_by_picture, read_crops
from finetune.evaluation import EvaluationSettings
from finetune.one_shot import OneShotSettings
from finetune.one_shot_evaluation import (
    OneShotTest,
    evaluate_one_shot,
    one_shot_test,
    score_answers,
)
from finetune.one_shot_report import one_shot_json, one_shot_text
from finetune.one_shot_shares import (
    AnswerShare,
    ReferenceFeatures,
    answer_share,
    merged,
    normalised_crops,
    reference_features,
)
from models.boxes import cxcywh_to_xyxy
from models.one_shot import MATCHES, one_shot_detector
from models.patch_queries import PatchDetector
from tests.data.one_shot_sets import scene_set, told_by
from tests.finetune.small_detector import SETTINGS
from training.world import World

CPU = torch.device("cpu")
ALONE = World.alone(CPU)
ONE_SHOT = OneShotSettings(unseen=("emu",), references=3, crops=CropSettings(side=32, min_side=8.0))
EVALUATION = EvaluationSettings(
    protocols=("voc07", "coco"),
    sizes=EvaluationSizes(short_side=64, max_size=96),
    batch_size=3,
    processes=0,
)


def small_model() -> PatchDetector:
    settings = SETTINGS.model_copy(update={"num_classes": None})
    return one_shot_detector(settings, torch.Generator().manual_seed(0)).eval()


def asked_of(data: DetectionSet) -> OneShotTest:
    return one_shot_test(data, ONE_SHOT, EVALUATION)


def answers(
    model: PatchDetector, test: OneShotTest, ids: list[int], batch_size: int = 3
) -> AnswerShare:
    batches = evaluation_batches(
        test.data, ids, EVALUATION.sizes, batch_size, 0, CPU, ReadingSettings()
    )
    references = features_of(model, test)
    questions = test.plan.questions
    return answer_share(model, batches, questions, references, test.data.classes, 100, "float32")


def features_of(model: PatchDetector, test: OneShotTest) -> ReferenceFeatures:
    return reference_features(model, crops_of(test).values(), CPU, "float32")


def crops_of(test: OneShotTest) -> Mapping[int, PictureCrops]:
    """By sample id, of all references."""
    pictures = crops_by_picture(test.catalogue, range(len(test.catalogue.sample_ids)))
    read = read_crops(test.data, test.catalogue, pictures, 32, ReadingSettings())
    ids = [id for id, _ in pictures]
    return {
        id: crops for id, crops in zip(ids, read, strict=True) if isinstance(crops, PictureCrops)
    }


@torch.no_grad()
def test_every_answer_is_that_of_the_crop_alone_in_a_run_of_the_whole_model(
    tmp_path: Path,
) -> None:
    model, test = small_model(), asked_of(scene_set(tmp_path))
    crops = {
        number: crop
        for of_picture in crops_of(test).values()
        for number, crop in zip(of_picture.numbers, of_picture.crops, strict=True)
    }
    ids = list(test.plan.questions)
    found = {picture.sample_id: picture for picture in answers(model, test, ids).pictures}
    assert sorted(found) == ids == [0, 1, 2, 3, 5]
    (batch,) = evaluation_batches(
        test.data, ids, EVALUATION.sizes, len(ids), 0, CPU, ReadingSettings()
    )
    for row, id in enumerate(batch.sample_ids.tolist()):
        for run, answered in enumerate(found[id].runs[: 1 if id else 3]):
            for question in test.plan.questions[id]:
                asked = normalised_crops(crops[question.crops[run]][None], CPU)[None]
                asked = asked.expand(len(ids), -1, -1, -1, -1)
                last = model(batch.images, asked).detection.groups[0].layers[-1]
                scores = last.logits[row].softmax(-1)[:, MATCHES]
                own = answered.labels == question.label
                order = torch.argsort(scores, descending=True, stable=True)
                np.testing.assert_allclose(answered.scores[own], scores[order], rtol=1e-4)
                boxes = cxcywh_to_xyxy(last.boxes[row, order]) * torch.tensor([48.0, 44, 48, 44])
                np.testing.assert_allclose(answered.boxes_xyxy[own], boxes, atol=1e-3)


def test_crops_are_those_of_the_catalogue(tmp_path: Path) -> None:
    test = asked_of(scene_set(tmp_path))
    for id, of_picture in crops_of(test).items():
        for number, crop in zip(of_picture.numbers, of_picture.crops, strict=True):
            label = int(np.searchsorted(test.catalogue.firsts.numpy(), number, side="right")) - 1
            assert told_by(crop) == (test.data.classes.names[label], id)


def test_shares_of_several_workers_give_the_numbers_of_one(tmp_path: Path) -> None:
    model, test = small_model(), asked_of(scene_set(tmp_path))
    ids = list(test.plan.questions)
    whole = score_answers([answers(model, test, ids)], (), test)
    parts = [answers(model, test, ids[rank::2], batch_size=1) for rank in range(2)]
    assert _rounded(score_answers(parts, (), test).metrics()) == _rounded(whole.metrics())
    assert evaluate_one_shot(model, test, ALONE)().metrics() == whole.metrics()
    assert (whole.pictures, whole.questions, whole.own_references) == (5, 8, 0)


def test_features_of_several_workers_come_together_by_their_numbers(tmp_path: Path) -> None:
    model, test = small_model(), asked_of(scene_set(tmp_path))
    whole = features_of(model, test)
    crops = list(crops_of(test).values())
    parts = [reference_features(model, crops[rank::2], CPU, "float32") for rank in range(2)]
    together = merged(parts)
    assert together.numbers.tolist() == whole.numbers.tolist() == list(range(9))
    np.testing.assert_allclose(together.features, whole.features, rtol=1e-4, atol=1e-5)


def test_the_sure_finder_of_everything_has_all_points_and_seen_and_unseen_are_told_apart(
    tmp_path: Path,
) -> None:
    test = asked_of(scene_set(tmp_path))
    share = answers(small_model(), test, list(test.plan.questions))
    perfect = [_perfect(picture) for picture in share.pictures]
    evaluation = score_answers([replace(share, pictures=tuple(perfect))], (), test)
    metrics = evaluation.metrics()
    assert metrics["voc07_seen_ap50"] == metrics["voc07_unseen_ap50"] == 1
    assert metrics["seen_ap50"] == pytest.approx(1)
    assert set(metrics) == {
        "voc07_seen_ap50", "voc07_unseen_ap50", "seen_ap50", "unseen_ap50", "skipped",
    }  # fmt: skip
    assert "emu    unseen        2  100.0" in one_shot_text(evaluation)
    content = one_shot_json(evaluation)
    assert content["questions"] == 8


def test_a_broken_picture_is_named_and_another_reference_stands_in_for_it(tmp_path: Path) -> None:
    model, test = small_model(), asked_of(scene_set(tmp_path, broken=(3,)))
    evaluation = evaluate_one_shot(model, test, ALONE)()
    assert evaluation.pictures == 4
    assert [name.partition(" in ")[0] for name in evaluation.skipped] == ["scene3"]
    assert [name.partition(" in ")[0] for name in evaluation.broken_references] == ["scene3"]
    share = answers(model, test, [5])
    assert all((run.labels == 0).sum() == 7 for run in share.pictures[0].runs)
    assert "references that could not be read, replaced by others: scene3" in one_shot_text(
        evaluation
    )


def test_a_question_whose_references_are_all_broken_stays_unanswered(tmp_path: Path) -> None:
    scenes = [(("cat", (2, 2, 20, 22)),)] * 2 + [(("dog", (2, 2, 20, 22)),)] * 2
    test = asked_of(scene_set(tmp_path, scenes, broken=(1,)))
    share = answers(small_model(), test, [0, 2, 3])
    by_id = {picture.sample_id: picture for picture in share.pictures}
    assert [len(run.scores) for run in by_id[0].runs] == [0, 0, 0]
    assert [len(run.scores) for run in by_id[2].runs] == [7, 7, 7]


def test_a_class_without_a_usable_reference_is_named(tmp_path: Path) -> None:
    scenes = [(("cat", (2, 2, 20, 22)), ("dog", (30, 30, 34, 40)))] * 2
    test = asked_of(scene_set(tmp_path, scenes))
    evaluation = score_answers([answers(small_model(), test, [0, 1])], (), test)
    assert evaluation.not_asked == ("dog",)
    assert "no query crop, so not asked for: dog" in one_shot_text(evaluation)
    dog = evaluation.scores[0].per_class[1]
    assert dog.objects == 2
    assert math.isnan(dog.ap50)


def test_a_set_with_nothing_to_ask_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower one_shot\.crops\.min_side=8"):
        asked_of(scene_set(tmp_path, [(), ()]))


def _perfect(picture):  # type: ignore[no-untyped-def]
    truth = picture.truth
    found = replace(
        picture.runs[0],
        boxes_xyxy=truth.boxes_xyxy.astype(np.float32),
        labels=truth.labels,
        scores=np.ones(len(truth.labels), np.float32),
    )
    return replace(picture, runs=(found,) * 3)


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items()}
