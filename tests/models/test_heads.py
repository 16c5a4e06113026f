"""What queries and tokens say, and what they say at first."""

import math

import torch
from torch import Tensor, nn

from models.heads import (
    BoxHead,
    begin_at_reference,
    begin_rare,
    box_heads,
    class_heads,
    logit,
    read_boxes,
    read_logits,
)
from models.initialise import initialise


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))


def box_head() -> BoxHead:
    built = BoxHead(6)
    initialise(built, torch.Generator().manual_seed(0))
    return built


def test_the_logit_undoes_the_sigmoid_and_stays_finite_at_the_edges() -> None:
    """Deformable DETR's inverse sigmoid: shares are cut off 1e-5 from 0 and 1."""
    torch.testing.assert_close(logit(normal(7).sigmoid()), normal(7))
    edges = logit(torch.tensor([-0.5, 0.0, 1e-6, 1.0, 1.5]))
    low, high = math.log(1e-5), math.log(1e5)
    torch.testing.assert_close(edges, torch.tensor([low, low, low, high, high]))


def test_a_point_moves_the_centre_alone_and_a_box_all_four() -> None:
    """Deformable DETR, A.3 and A.4."""
    head, hidden = box_head(), normal(2, 5, 6)
    said = head(hidden)
    point = normal(2, 5, 2, seed=1)
    moved = torch.cat((said[..., :2] + point, said[..., 2:]), dim=-1).sigmoid()
    torch.testing.assert_close(read_boxes(head, hidden, point.sigmoid()), moved)
    box = normal(2, 5, 4, seed=2)
    torch.testing.assert_close(read_boxes(head, hidden, box.sigmoid()), (said + box).sigmoid())
    torch.testing.assert_close(read_boxes(head, hidden, None), said.sigmoid())


def test_first_boxes_are_at_their_reference() -> None:
    head, hidden, box = box_head(), normal(2, 5, 6), normal(2, 5, 4).sigmoid()
    begin_at_reference(head)
    torch.testing.assert_close(read_boxes(head, hidden, box), box)
    begin_at_reference(head, -2.0)
    found = read_boxes(head, hidden, box[..., :2])
    torch.testing.assert_close(found[..., :2], box[..., :2])
    torch.testing.assert_close(found[..., 2:], torch.full((2, 5, 2), 1 / (1 + math.exp(2))))


def test_rare_classes_begin_at_one_per_cent() -> None:
    """Focal loss, 4.1: a bias of -4.595."""
    head = nn.Linear(6, 3)
    begin_rare(head)
    torch.testing.assert_close(head.bias.detach(), torch.full((3,), -4.59512))
    torch.testing.assert_close(head.bias.detach().sigmoid(), torch.full((3,), 0.01))


def test_heads_compute_in_float32_under_autocast() -> None:
    """Public pitfall 7.1.12: logits of references, and what is added to them, in float32."""
    head, classes, hidden = box_head(), nn.Linear(6, 3), normal(2, 5, 6).bfloat16()
    box = normal(2, 5, 4).sigmoid()
    with torch.autocast("cpu", torch.bfloat16):
        boxes, logits = read_boxes(head, hidden, box), read_logits(classes, hidden)
    assert torch.equal(boxes, read_boxes(head, hidden.float(), box))
    assert torch.equal(logits, classes(hidden.float()))
    assert boxes.dtype == logits.dtype == torch.float32


def test_one_head_serves_all_layers_or_each_layer_has_its_own() -> None:
    shared, own = box_head(), nn.ModuleList(box_head() for _ in range(3))
    assert box_heads(shared, 3) == (shared, shared, shared)
    assert box_heads(own, 3) == tuple(own)
    classes = nn.Linear(6, 3)
    assert class_heads(classes, 2) == (classes, classes)
