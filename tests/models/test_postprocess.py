"""Boxes in pixels."""

import torch

from models.postprocess import detections
from models.structures import LayerOutput


def test_scores_leave_out_no_object_and_boxes_are_pixels_of_the_given_size() -> None:
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]]))
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.5, 0.5, 1.0]]])
    found = detections(LayerOutput(boxes, logits, boxes), torch.tensor([[40, 100]]))
    torch.testing.assert_close(found.scores, torch.tensor([[0.3, 0.6]]))
    assert found.labels.tolist() == [[1, 0]]
    assert found.boxes_xyxy.tolist() == [[[0, 10, 100, 30], [0, 0, 50, 40]]]
