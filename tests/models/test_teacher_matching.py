"""Adaptive matching with a teacher: true partners, one copy, more teachers than students."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.boxes import cxcywh_to_xyxy, generalized_iou
from models.matching import UnmatchableError
from models.soft_labels import cross_entropies, divergences, soft_labels
from models.teacher_matching import SoftAnswers, TeacherCosts, _costs, match_teacher


def answers(queries: int, seed: int, layers: int = 2) -> tuple[Tensor, Tensor]:
    """Logits of three classes and boxes, of two pictures."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, 2, queries, 3, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(layers, 2, queries, 4, generator=generator)
    return logits, boxes


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_the_cost_is_kl_of_the_classes_and_distance_of_the_boxes(scores: str) -> None:
    logits, boxes = (each[0] for each in answers(4, 1))
    theirs, their_boxes = (each[0] for each in answers(5, 2))
    wanted = theirs.sigmoid() if scores == "sigmoid" else theirs.softmax(-1)
    found = _costs(logits, boxes, wanted, their_boxes, TeacherCosts(), scores)
    for picture, student, teacher in ((0, 0, 0), (1, 3, 4), (1, 2, 1)):
        p, q = wanted[picture, teacher], logits[picture, student]
        if scores == "sigmoid":
            s = q.sigmoid()
            kl = (p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()).sum()
        else:
            kl = (p * (p / q.softmax(-1)).log()).sum()
        one, other = boxes[picture, student], their_boxes[picture, teacher]
        corners = (cxcywh_to_xyxy(each)[None] for each in (one, other))
        expected = kl + 5 * (one - other).abs().sum() + 2 * (1 - generalized_iou(*corners)[0, 0])
        torch.testing.assert_close(found[picture, student, teacher], expected)


def test_6_of_more_teachers_with_sure_decoys_the_true_partners_are_found() -> None:
    """The cross-entropy alone would prefer those that are sure that nothing is there (6 to 11)."""
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(1, 1, 6, 3, generator=generator) * 0.7
    boxes = 0.5 + 0.01 * torch.rand(1, 1, 6, 4, generator=generator)
    decoys = torch.full((1, 1, 6, 3), -6.0)
    teacher = SoftAnswers(torch.cat((theirs, decoys), 2).sigmoid(), boxes.repeat(1, 1, 2, 1))
    own = theirs + 0.1 * torch.randn(theirs.shape, generator=generator)
    partners = match_teacher(own, boxes, teacher, TeacherCosts(), "sigmoid")
    assert partners.tolist() == [[[0, 1, 2, 3, 4, 5]]]
    entropy = cross_entropies(own, teacher.probabilities, "sigmoid")[0, 0]
    _, cheapest = linear_sum_assignment(entropy.numpy())
    assert max(cheapest) > 5


def test_other_order_of_the_teachers_queries_gives_the_same_partners() -> None:
    logits, boxes = answers(4, 1)
    theirs, their_boxes = answers(6, 2)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    plain = SoftAnswers(theirs.sigmoid(), their_boxes)
    mixed = SoftAnswers(theirs.sigmoid()[:, :, order], their_boxes[:, :, order])
    first = match_teacher(logits, boxes, plain, TeacherCosts(), "sigmoid")
    second = match_teacher(logits, boxes, mixed, TeacherCosts(), "sigmoid")
    assert torch.equal(order[second], first)


def test_all_layers_are_copied_to_the_host_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    to_host = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (copies.append(self.shape), to_host(self))[1])
    logits, boxes = answers(4, 1, layers=5)
    match_teacher(logits, boxes, SoftAnswers(logits.sigmoid(), boxes), TeacherCosts(), "sigmoid")
    assert copies == [(5, 2, 4, 4)]


def test_fewer_teachers_and_broken_numbers_are_refused() -> None:
    logits, boxes = answers(4, 1)
    few = SoftAnswers(logits.sigmoid()[:, :, :3], boxes[:, :, :3])
    with pytest.raises(ValueError, match=r"3 queries for 4 .* distill\.adaptive=false"):
        match_teacher(logits, boxes, few, TeacherCosts(), "sigmoid")
    broken = boxes.clone()
    broken[1, 0] = torch.nan
    with pytest.raises(UnmatchableError, match="decoder layer 1, picture 0"):
        match_teacher(
            logits, broken, SoftAnswers(logits.sigmoid(), boxes), TeacherCosts(), "sigmoid"
        )


def test_soft_labels_of_other_classes_and_scores() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    chosen = torch.tensor([2, 0])
    assert torch.equal(
        soft_labels(logits, "sigmoid", "sigmoid", chosen), logits[:, [2, 0]].sigmoid()
    )
    p = logits.softmax(-1)[0]
    among = soft_labels(logits, "softmax", "softmax", chosen)[0]
    torch.testing.assert_close(among, torch.stack((p[2], p[0], p[1] + p[3])))
    assert torch.equal(soft_labels(logits, "softmax", "sigmoid", chosen)[0], p[[2, 0]])
    with pytest.raises(ValueError, match=r"use model\.class_scores=sigmoid"):
        soft_labels(logits, "sigmoid", "softmax", chosen)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_divergences_are_finite_at_extreme_logits_and_zero_where_both_agree(scores: str) -> None:
    logits = torch.tensor([[50.0, -50.0, 0.0], [-50.0, 50.0, 50.0]], requires_grad=True)
    same = logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)
    assert divergences(logits, same, scores).abs().max() < 1e-5
    far = divergences(logits, same.flip(0).detach(), scores)
    far.sum().backward()
    assert far.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
