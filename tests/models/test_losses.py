"""The set criterion."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou

from models.boxes import cxcywh_to_xyxy
from models.losses import LossWeights, Reconstruction, set_losses
from models.matching import ClassScores, MatchingCosts, match
from models.shares import Share, counts_of
from models.structures import GroupOutput, LayerOutput, Losses, Targets
from tests.models.test_matching import predictions, targets

COSTS = MatchingCosts()
WEIGHTS = LossWeights()


def group_of(logits: Tensor, boxes: Tensor) -> GroupOutput:
    layers = tuple(LayerOutput(box, logit, box) for logit, box in zip(logits, boxes, strict=True))
    return GroupOutput("queries", layers)


def features(layers: int, batch: int, queries: int, count: int) -> Reconstruction:
    generator = torch.Generator().manual_seed(3)
    return Reconstruction(
        torch.randn(layers, batch, queries, 6, generator=generator),
        torch.randn(batch, count, 6, generator=generator),
    )


def plain_layer(
    logits: Tensor, boxes: Tensor, of: Targets, rebuilt: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The criterion as DETR and UP-DETR write it, for one layer, picture by picture."""
    found = match(logits[None], boxes[None], of, COSTS)
    num_boxes = max(sum(len(labels) for labels in of.labels), 1)
    wanted = torch.full(logits.shape[:2], 3)
    distance, overlap, feature = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for picture, query, target in zip(found.picture, found.query, found.target, strict=True):
        wanted[picture, query] = of.labels[int(picture)][target]
        box, true = boxes[picture, query], of.boxes_cxcywh[int(picture)][target]
        distance = distance + F.l1_loss(box, true, reduction="sum")
        pair = generalized_box_iou(cxcywh_to_xyxy(box)[None], cxcywh_to_xyxy(true)[None])
        overlap = overlap + 1 - pair.squeeze()
        predicted, truth = rebuilt[0][picture, query], rebuilt[1][picture, target]
        feature = feature + 2 - 2 * F.cosine_similarity(predicted, truth, dim=0)
    weight = torch.tensor([1, 1, 1, 0.1])
    return {
        "loss_ce": F.cross_entropy(logits.transpose(1, 2), wanted, weight),
        "loss_bbox": distance / num_boxes,
        "loss_giou": overlap / num_boxes,
        "loss_feature": feature / num_boxes,
    }


def test_all_layers_at_once_equal_one_after_the_other_forward_and_backward() -> None:
    logits, boxes = predictions(3, 2, 5)
    logits.requires_grad_()
    boxes.requires_grad_()
    of, rebuilt = targets(2, 4), features(3, 2, 5, 4)
    losses = set_losses(group_of(logits, boxes), of, WEIGHTS, COSTS, reconstruction=rebuilt)
    total = torch.zeros(())
    for layer, suffix in enumerate(("_0", "_1", "")):
        predicted = (rebuilt.predicted[layer], rebuilt.true)
        plain = plain_layer(logits[layer], boxes[layer], of, predicted)
        for name, value in plain.items():
            torch.testing.assert_close(losses.terms[name + suffix], value.detach())
        total = total + plain["loss_ce"] + 5 * plain["loss_bbox"]
        total = total + 2 * plain["loss_giou"] + plain["loss_feature"]
    torch.testing.assert_close(losses.total, total)
    ours = torch.autograd.grad(losses.total, (logits, boxes))
    theirs = torch.autograd.grad(total, (logits, boxes))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("no_object", "class_scores"), [(0.1, "softmax"), ("paper", "softmax"), (0.1, "sigmoid")]
)
def test_gradients_and_terms_of_unequal_parts_add_up_to_those_of_the_whole_batch(
    no_object: float | str, class_scores: ClassScores
) -> None:
    """One worker makes passes of 1 and 2 pictures, one with more targets than queries; the other
    worker has only a blank stand-in, whose targets must not count."""
    logits, boxes = predictions(2, 3, 5)
    weights = LossWeights.model_validate({"no_object": no_object})
    of = targets(2, 7, 0)
    gradient, whole = _learned(logits, boxes, of, weights, class_scores)
    parts = [slice(0, 1), slice(1, 3), slice(0, 1)]
    counts = [counts_of(of.part(rows), 5, blank=n == 2) for n, rows in enumerate(parts)]
    assert [count.tolist() for count in counts] == [[2, 2, 1], [7, 5, 2], [0, 0, 0]]
    share = Share(torch.stack(counts).sum(0), workers=2)
    found = [
        _learned(
            logits[:, rows], boxes[:, rows], of.part(rows), weights, class_scores, share, n == 2
        )
        for n, rows in enumerate(parts)
    ]
    assert float(found[2][0].abs().max()) == 0
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]], dim=1) / 2, gradient)
    torch.testing.assert_close(sum(losses.total for _, losses in found) / 2, whole.total)
    for name, term in whole.terms.items():
        together = sum(losses.terms[name] for _, losses in found) / 2
        torch.testing.assert_close(together, term, msg=name)


def _learned(
    logits: Tensor,
    boxes: Tensor,
    of: Targets,
    weights: LossWeights,
    class_scores: ClassScores,
    share: Share | None = None,
    blank: bool = False,
) -> tuple[Tensor, Losses]:
    """The total's gradient with respect to logits and boxes, side by side, and the losses."""
    leaves = (logits.clone().requires_grad_(), boxes.clone().requires_grad_())
    losses = set_losses(
        group_of(*leaves),
        of,
        weights,
        COSTS,
        class_scores=class_scores,
        share=share,
        blank=blank,
    )
    return torch.cat(torch.autograd.grad(losses.total, leaves), dim=-1), losses


def test_the_papers_no_object_weight_is_targets_per_query() -> None:
    """Section 3.2 of UP-DETR: lambda = M / N, here 2 / 5."""
    logits, boxes = predictions(1, 2, 5)
    paper = set_losses(
        group_of(logits, boxes), targets(2, 2), LossWeights(no_object="paper"), COSTS
    )
    number = set_losses(group_of(logits, boxes), targets(2, 2), LossWeights(no_object=0.4), COSTS)
    torch.testing.assert_close(paper.terms["loss_ce"], number.terms["loss_ce"])


def test_a_negative_weight_of_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        LossWeights(no_object=-0.1)


def test_a_blank_batch_has_zero_loss_and_a_whole_graph() -> None:
    logits, boxes = predictions(2, 1, 4)
    logits.requires_grad_()
    losses = set_losses(group_of(logits, boxes), targets(0), WEIGHTS, COSTS, blank=True)
    assert losses.total.tolist() == 0
    losses.total.backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) == 0


def test_targets_without_a_query_are_counted() -> None:
    logits, boxes = predictions(1, 2, 3)
    losses = set_losses(group_of(logits, boxes), targets(5, 1), WEIGHTS, COSTS)
    assert float(losses.terms["unmatched_targets"]) == 2


def test_weights_scale_the_total_and_not_the_terms() -> None:
    logits, boxes = predictions(2, 2, 4)

    def of(weights: LossWeights) -> Losses:
        return set_losses(group_of(logits, boxes), targets(1, 2), weights, COSTS)

    only = of(LossWeights(classes=0.0, boxes_l1=3.0, giou=0.0))
    assert only.terms["loss_giou"] == of(WEIGHTS).terms["loss_giou"]
    wanted = 3 * (only.terms["loss_bbox"] + only.terms["loss_bbox_0"])
    torch.testing.assert_close(only.total, wanted)


def test_losses_are_float32_under_autocast() -> None:
    logits, boxes = predictions(2, 2, 4)
    plain = set_losses(group_of(logits, boxes), targets(1, 2), WEIGHTS, COSTS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = set_losses(group_of(logits, boxes), targets(1, 2), WEIGHTS, COSTS)
    assert torch.equal(plain.total, mixed.total)


class Readings(TorchDispatchMode):
    """Counts the values that the host waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_no_single_value_is_read_back_from_the_device() -> None:
    """The costs are copied as one tensor; an `.item()` would make the host wait once more."""
    logits, boxes = predictions(3, 2, 5)
    of, rebuilt = targets(2, 4), features(3, 2, 5, 4)
    with Readings() as readings:
        set_losses(group_of(logits, boxes), of, WEIGHTS, COSTS, reconstruction=rebuilt)
    assert readings.count == 0


def sure_of_one_box() -> tuple[GroupOutput, Targets]:
    """Query 0 lies on the target, of class 1, and gives it 3/4; all else gets 1/2."""
    logits = torch.tensor([[[[0.0, math.log(3)], [0.0, 0.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.2, 0.2]]]])
    return group_of(logits, boxes), Targets((boxes[0, 0, :1] + 0.1,), (torch.tensor([1]),))


def test_the_focal_loss_is_the_sum_over_queries_and_classes_per_target() -> None:
    """Deformable DETR, 4.2: 3 x 0.75/4 log 2 of what is not there, 0.25/16 log(4/3) of what is."""
    group, of = sure_of_one_box()
    losses = set_losses(group, of, WEIGHTS, COSTS, class_scores="sigmoid")
    torch.testing.assert_close(losses.terms["loss_ce"], torch.tensor(3 * 0.1299651 + 0.0044950))
    torch.testing.assert_close(losses.terms["loss_bbox"], torch.tensor(0.4))
    twice = Targets(of.boxes_cxcywh * 2, of.labels * 2)
    pair = set_losses(
        group_of(*(torch.cat((each, each), dim=1) for each in raw(group))),
        twice,
        WEIGHTS,
        COSTS,
        class_scores="sigmoid",
    )
    torch.testing.assert_close(pair.terms["loss_ce"], losses.terms["loss_ce"])


def raw(group: GroupOutput) -> tuple[Tensor, Tensor]:
    logits = torch.stack([layer.logits for layer in group.layers])
    return logits, torch.stack([layer.boxes for layer in group.layers])


def test_alpha_and_gamma_of_the_focal_loss_come_from_the_weights() -> None:
    group, of = sure_of_one_box()
    weights = LossWeights(focal_alpha=0.1, focal_gamma=3.0)
    losses = set_losses(group, of, weights, COSTS, class_scores="sigmoid")
    torch.testing.assert_close(losses.terms["loss_ce"], torch.tensor(3 * 0.0779791 + 0.0004495))


def test_sigmoid_logs_are_those_of_the_public_code_with_its_meaningless_cardinality() -> None:
    """It counts queries whose best class is not the last one, though there is no "no object"."""
    group, of = sure_of_one_box()
    losses = set_losses(group, of, WEIGHTS, COSTS, class_scores="sigmoid")
    assert float(losses.terms["class_error"]) == 0
    assert float(losses.terms["cardinality_error"]) == 0
    wrong = Targets(of.boxes_cxcywh, (torch.tensor([0]),))
    assert float(set_losses(group, wrong, WEIGHTS, COSTS).terms["class_error"]) == 100


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_pictures_without_targets_have_finite_losses_and_gradients(counts: tuple[int, int]) -> None:
    logits, boxes = predictions(2, 2, 4)
    logits.requires_grad_()
    boxes.requires_grad_()
    losses = set_losses(
        group_of(logits, boxes), targets(*counts), WEIGHTS, COSTS, class_scores="sigmoid"
    )
    gradients = torch.autograd.grad(losses.total, (logits, boxes))
    assert all(bool(each.isfinite().all()) for each in gradients)
    assert bool((gradients[0] != 0).all())
    if not any(counts):
        assert float(losses.terms["loss_bbox"]) == 0
        assert float(losses.terms["class_error"]) == 100


def test_focal_losses_are_float32_under_autocast() -> None:
    """Peers' bug 7.1.12."""
    logits, boxes = predictions(2, 2, 4)
    group, of = group_of(logits.bfloat16(), boxes), targets(1, 2)
    plain = set_losses(group, of, WEIGHTS, COSTS, class_scores="sigmoid")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = set_losses(group, of, WEIGHTS, COSTS, class_scores="sigmoid")
    assert plain.total.dtype == torch.float32
    assert torch.equal(plain.total, mixed.total)


def test_up_detrs_patches_are_matched_and_rebuilt_with_sigmoid_scores() -> None:
    """Label 1 of 2 is "matches a patch", as with softmax scores; the features are the same."""
    logits, boxes = predictions(3, 2, 5)
    of = Targets(targets(2, 4).boxes_cxcywh, (torch.tensor([1, 1]), torch.tensor([1, 1, 1, 1])))
    rebuilt = features(3, 2, 5, 4)
    group = group_of(logits[..., :2], boxes)
    losses = set_losses(group, of, WEIGHTS, COSTS, class_scores="sigmoid", reconstruction=rebuilt)
    pairs = match(logits[2:, ..., :2], boxes[2:], of, COSTS, "sigmoid")
    alike = F.cosine_similarity(
        rebuilt.predicted[2][pairs.picture, pairs.query],
        rebuilt.true[pairs.picture, pairs.target],
        dim=1,
    )
    torch.testing.assert_close(losses.terms["loss_feature"], (2 - 2 * alike).sum() / 6)
