"""The names of numbers, known beforehand, are those that evaluations give."""

import numpy as np
import pytest

from cluster.stages import recipe_of
from finetune.coco_ap import score_coco
from finetune.metric_names import QUALITY_NAMES, number_names, one_shot_names
from finetune.one_shot_scores import score_one_shot
from finetune.panoptic_evaluation import PanopticEvaluation
from finetune.panoptic_quality import PanopticMap, panoptic_quality, picture_quality
from finetune.scores import PictureDetections, PictureTruth
from finetune.voc_ap import score_voc
from models.structures import Classes
from training.recipe import RecipeError

CLASSES = Classes(("cat", "road"), (3, 8), (True, False))
TRUTH = PictureTruth(
    boxes_xyxy=np.array([[2.0, 3.0, 20.0, 31.0], [1.0, 1.0, 9.0, 5.0]]),
    labels=np.array([0, 1]),
    areas=np.array([504.0, 32.0]),
    crowd=np.zeros(2, bool),
    difficult=np.zeros(2, bool),
)
FOUND = PictureDetections(
    np.array([[2, 3, 20, 31]], np.float32), np.array([0]), np.array([0.5], np.float32)
)


@pytest.mark.parametrize("most", [1, 10, 37, 100])
def test_the_numbers_of_boxes_are_those_of_the_scores(most: int) -> None:
    coco = score_coco([TRUTH], [FOUND], CLASSES, "ignore", most).numbers()
    voc = score_voc([TRUTH], [FOUND], CLASSES, "voc07").numbers()
    assert number_names(("coco", "voc07"), most) == (*coco, *voc)


def test_the_numbers_of_one_shot_detection_are_those_of_the_scores() -> None:
    coco, voc = (
        score_one_shot([TRUTH], [[FOUND]], CLASSES, ("road",), protocol=protocol).numbers()
        for protocol in ("coco", "voc07")
    )
    assert one_shot_names(("coco", "voc07")) == (*coco, *voc)


def test_the_numbers_of_a_mask_head_are_those_of_the_quality() -> None:
    both = PanopticMap(np.array([[1, 1, 2]], np.int16), np.array([0, 1]), np.zeros(2, bool))
    quality = panoptic_quality([picture_quality(4, both, both)], CLASSES)
    assert set(quality.metrics()) == set(QUALITY_NAMES)
    evaluation = PanopticEvaluation("set", quality, ("3.png: no picture",), (), {})
    assert evaluation.metrics() == {**quality.metrics(), "skipped": 1.0}


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        (["best_metric=eval/ap5"], r"best_metric=eval/ap5 is no number of task=detect"),
        (["best_metric=ap50"], r"best_metric=ap50 is no .* use one of eval/ap, eval/ap50,"),
        (["best_metric=eval/voc07_ap50"], r"with evaluation\.protocols=\['coco'\]"),
        (["early_stop={patience: 2, metric: eval/pq}"], r"early_stop\.metric=eval/pq is no"),
        (["checkpoints.best_metric=ap"], r"checkpoints\.best_metric=ap is no number"),
        (["task=panoptic"], r"best_metric=eval/ap is no number of task=panoptic .* eval/pq,"),
        (["task=one_shot", "best_metric=eval/voc_seen_ap50"], r"one of eval/seen_ap50, eval/uns"),
    ],
)
def test_a_recipe_that_waits_for_a_number_that_nobody_gives_is_refused(
    told: list[str], complaint: str
) -> None:
    """It would keep no best weights and never stop early, without a word."""
    with pytest.raises(RecipeError, match=complaint):
        recipe_of("finetune", "tiny_cpu", ["run=r", "data.train=t", "init=w", *told])
