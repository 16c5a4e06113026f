"""The measures of patch detection, on answers written out by hand."""

import pytest
import torch

from models.structures import LayerOutput, Targets
from pretrain.held_out import own_answers, picture_results, summarise

FIRST, SECOND, ELSEWHERE = [0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.4], [0.9, 0.1, 0.05, 0.05]


def answer(boxes: list[list[float]], match_scores: list[float]) -> LayerOutput:
    """Four queries of one picture, two for each of two patches, scored by logit 1."""
    logits = torch.zeros(1, 4, 3)
    logits[0, :, 1] = torch.tensor(match_scores)
    return LayerOutput(hidden=torch.zeros(1, 4, 2), logits=logits, boxes=torch.tensor([boxes]))


def targets() -> Targets:
    return Targets((torch.tensor([FIRST, SECOND]),), (torch.ones(2, dtype=torch.int64),))


def test_perfect_answers_score_one_everywhere() -> None:
    layer = answer([FIRST, ELSEWHERE, SECOND, ELSEWHERE], [3.0, -3.0, 2.0, -3.0])
    summary = summarise(picture_results(layer, targets(), [torch.tensor([0, 2])]))
    assert summary == pytest.approx(
        {"ap": 1, "ap50": 1, "ap75": 1, "mean_iou": 1, "recall50": 1, "own_patch": 1}
    )


def test_a_patch_found_by_the_other_group_counts_for_ap_but_not_for_its_own_answer() -> None:
    layer = answer([SECOND, ELSEWHERE, FIRST, ELSEWHERE], [3.0, -3.0, 2.0, -3.0])
    summary = summarise(picture_results(layer, targets(), [torch.tensor([2, 0])]))
    assert summary["ap"] == pytest.approx(1.0)
    assert summary["recall50"] == summary["own_patch"] == 0.0


def test_the_answer_of_a_patch_is_the_best_scored_query_of_its_group() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.5, 0.7]])
    assert own_answers(scores, 2).tolist() == [[1, 3]]
    assert own_answers(scores, 3).tolist() == [[1, 3, 5]]


def test_nothing_held_out_gives_no_numbers() -> None:
    assert summarise([]) == {}
