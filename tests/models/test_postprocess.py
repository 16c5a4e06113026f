"""Boxes in pixels."""

import torch

from models.postprocess import detections, query_scores
from models.structures import LayerOutput


def test_scores_leave_out_no_object_and_boxes_are_pixels_of_the_given_size() -> None:
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]]))
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.5, 0.5, 1.0]]])
    found = detections(LayerOutput(boxes, logits, boxes), torch.tensor([[40, 100]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.3, 0.6]]))
    assert found.labels.tolist() == [[1, 0]]
    assert found.boxes_xyxy.tolist() == [[[0, 10, 100, 30], [0, 0, 50, 40]]]


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities]).logit()


def test_sigmoid_detections_are_the_surest_pairs_of_query_and_class() -> None:
    """Deformable DETR's public code: a query may say two classes, another one none."""
    logits = logits_of([0.6, 0.1, 0.8], [0.2, 0.7, 0.05])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.5, 0.5, 1.0]]])
    layer = LayerOutput(boxes, logits, boxes)
    found = detections(layer, torch.tensor([[40, 100]]), "sigmoid", max_pairs=4)
    torch.testing.assert_close(found.scores, torch.tensor([[0.8, 0.7, 0.6, 0.2]]))
    assert found.labels.tolist() == [[2, 1, 0, 0]]
    first, second = [0, 10, 100, 30], [0, 0, 50, 40]
    assert found.boxes_xyxy.tolist() == [[first, second, first, second]]


def test_fewer_pairs_than_asked_for_are_all_found() -> None:
    logits = logits_of([0.6, 0.1, 0.8], [0.2, 0.7, 0.05])
    boxes = torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0))
    found = detections(LayerOutput(boxes, logits, boxes), torch.tensor([[4, 6]]), "sigmoid")
    assert found.scores.shape == (1, 6)
    assert found.labels[0, -1] == 2


def test_equally_sure_pairs_are_each_found_once() -> None:
    logits = torch.zeros(1, 3, 2)
    boxes = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0))
    found = detections(LayerOutput(boxes, logits, boxes), torch.tensor([[4, 6]]), "sigmoid")
    lefts = zip(found.labels[0].tolist(), found.boxes_xyxy[0, :, 0].tolist(), strict=True)
    assert len(set(lefts)) == 6


def test_a_query_is_as_sure_as_its_likeliest_class() -> None:
    probabilities = torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]])
    softmax = query_scores(probabilities.log(), "softmax")
    torch.testing.assert_close(softmax, torch.tensor([[0.3, 0.6]]))
    sigmoid = query_scores(probabilities.logit(), "sigmoid")
    torch.testing.assert_close(sigmoid, torch.tensor([[0.5, 0.6]]))
