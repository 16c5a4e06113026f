"""What a detector is taught beyond its decoder: proposals, encoder layers, objectness, scores."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.detection_losses import Supervision, detection_losses, unmatched_losses
from models.losses import LossWeights, set_losses
from models.matching import ClassScores, MatchingCosts, UnmatchableError
from models.shares import Share, counts_of
from models.structures import (
    DetectorOutput,
    GroupOutput,
    LayerOutput,
    Losses,
    Memory,
    Targets,
    TokenPredictions,
    TokenSelection,
)
from tests.models.test_losses import Readings, group_of
from tests.models.test_matching import predictions, targets

WEIGHTS = LossWeights(classes=2.0)
COSTS = MatchingCosts(classes=2.0)
ALL = Supervision("sigmoid", "all")
BINARY = Supervision("sigmoid", "binary")
TOKENS = 9
KEPT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()


def tokens_say(seed: int, batch: int, tokens: int) -> TokenPredictions:
    generator = torch.Generator().manual_seed(seed)
    boxes = 0.1 + 0.4 * torch.rand(batch, tokens, 4, generator=generator)
    return TokenPredictions(torch.randn(batch, tokens, 4, generator=generator), boxes)


def sparse_output(batch: int = 3) -> DetectorOutput:
    """Two decoder layers, proposals, two encoder layers, objectness, a scoring network."""
    generator = torch.Generator().manual_seed(5)
    layers = tuple(
        replace(layer, cross_attention=torch.rand(batch, 2, 5, TOKENS, generator=generator))
        for layer in group_of(*predictions(2, batch, 5)).layers
    )
    padding = torch.zeros(batch, TOKENS, dtype=torch.bool)
    padding[1:, 6:] = True
    tokens = torch.zeros(batch, TOKENS, 4)
    indices = torch.arange(4).expand(batch, -1)
    memory = Memory(
        tokens=tokens,
        position=tokens,
        padding=padding,
        spatial_shapes=((3, 3),),
        valid_ratios=torch.ones(batch, 1, 2),
        selection=TokenSelection(
            indices, KEPT[:batch], torch.randn(batch, TOKENS, generator=generator)
        ),
        proposals=tokens_say(1, batch, TOKENS),
        encoder_layers=(tokens_say(2, batch, 4), tokens_say(3, batch, 4)),
        objectness=tokens_say(4, batch, TOKENS),
    )
    return DetectorOutput((GroupOutput("queries", layers),), memory)


def with_leaves(output: DetectorOutput) -> tuple[DetectorOutput, list[Tensor]]:
    """The same output, and the tensors that gradients are asked for."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    def said(by: TokenPredictions | None) -> TokenPredictions:
        assert by is not None
        return TokenPredictions(leaf(by.logits), leaf(by.boxes))

    memory, selection = output.memory, output.memory.selection
    assert selection is not None
    assert selection.scores is not None
    layers: list[LayerOutput] = [
        replace(layer, logits=leaf(layer.logits), boxes=leaf(layer.boxes))
        for layer in output.groups[0].layers
    ]
    known = replace(
        memory,
        selection=replace(selection, scores=leaf(selection.scores)),
        proposals=said(memory.proposals),
        encoder_layers=tuple(said(layer) for layer in memory.encoder_layers),
        objectness=said(memory.objectness),
    )
    return DetectorOutput((GroupOutput("queries", tuple(layers)),), known), leaves


def rows(output: DetectorOutput, part: slice) -> DetectorOutput:
    """The same output for some of the pictures."""

    def said(by: TokenPredictions | None) -> TokenPredictions:
        assert by is not None
        return TokenPredictions(by.logits[part], by.boxes[part])

    memory, selection = output.memory, output.memory.selection
    assert selection is not None
    assert selection.scores is not None
    layers = tuple(
        LayerOutput(
            layer.hidden[part],
            layer.logits[part],
            layer.boxes[part],
            cross_attention=layer.cross_attention[part],
        )
        for layer in output.groups[0].layers
        if isinstance(layer.cross_attention, Tensor)
    )
    known = replace(
        memory,
        tokens=memory.tokens[part],
        position=memory.position[part],
        padding=memory.padding[part],
        valid_ratios=memory.valid_ratios[part],
        selection=TokenSelection(
            selection.indices[part], selection.kept[part], selection.scores[part]
        ),
        proposals=said(memory.proposals),
        encoder_layers=tuple(said(layer) for layer in memory.encoder_layers),
        objectness=said(memory.objectness),
    )
    return DetectorOutput((GroupOutput("queries", layers),), known)


def of_layers(layers: Sequence[TokenPredictions], of: Targets) -> Losses:
    """The set criterion of what tokens say, as if it came from a decoder."""
    logits = torch.stack([layer.logits for layer in layers])
    boxes = torch.stack([layer.boxes for layer in layers])
    return set_losses(group_of(logits, boxes), of, WEIGHTS, COSTS, class_scores="sigmoid")


def test_terms_have_the_names_of_the_public_code() -> None:
    losses = detection_losses(sparse_output(), targets(2, 1, 0), WEIGHTS, COSTS, ALL)
    suffixes = ("", "_0", "_enc", "_enc_0", "_enc_1", "_backbone")
    names = {
        f"{name}{suffix}"
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
        for suffix in suffixes
    }
    corr = {"corr_mask_attn_map_dec_all", "corr_mask_attn_map_dec_0"}
    logged = {"class_error", "unmatched_targets", "loss_mask_prediction"}
    assert set(losses.terms) == names | corr | logged


@pytest.mark.parametrize("supervision", [ALL, BINARY])
def test_tokens_are_matched_and_supervised_by_themselves(supervision: Supervision) -> None:
    """Sparse DETR, 3.3; binary labels make every object class 0 to proposals and scores."""
    output, of = sparse_output(), targets(2, 3, 0)
    losses = detection_losses(output, of, WEIGHTS, COSTS, replace(supervision, legacy_padding=True))
    ours = of
    if supervision is BINARY:
        ours = Targets(of.boxes_cxcywh, tuple(torch.zeros_like(labels) for labels in of.labels))
    memory = output.memory
    assert memory.proposals is not None
    assert memory.objectness is not None
    alone = {
        "": set_losses(output.groups[0], of, WEIGHTS, COSTS, class_scores="sigmoid"),
        "_enc": of_layers([memory.proposals], ours),
        "_enc_1": of_layers(memory.encoder_layers, of),
        "_backbone": of_layers([memory.objectness], ours),
    }
    for suffix, expected in alone.items():
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(losses.terms[name + suffix], expected.terms[name])
    total = sum(each.total for each in alone.values())
    torch.testing.assert_close(losses.total, total + losses.terms["loss_mask_prediction"])


def test_the_weight_of_the_scoring_network_is_that_of_the_recipe() -> None:
    output, of = sparse_output(), targets(2, 3, 0)
    one = detection_losses(output, of, WEIGHTS, COSTS, ALL)
    none = detection_losses(output, of, LossWeights(classes=2.0, selection=0.0), COSTS, ALL)
    scoring = one.terms["loss_mask_prediction"]
    assert none.terms["loss_mask_prediction"] == scoring
    torch.testing.assert_close(one.total - none.total, scoring)


def test_tokens_that_fill_up_a_batch_change_nothing() -> None:
    """Peers' bug 7.2.3: the public code supervises them, so batch mates change a picture's loss."""
    output, of = sparse_output(), targets(1, 3, 0)
    known, leaves = with_leaves(output)
    losses = detection_losses(known, of, WEIGHTS, COSTS, ALL)
    by_layer = torch.autograd.grad(losses.total, leaves)[6:14]
    filling = ~KEPT
    encoder = [each for each in by_layer if each.shape[1] == KEPT.shape[1]]
    assert len(encoder) == 4
    assert all(float(each[filling].abs().max()) == 0 for each in encoder)
    assert all(bool((each[KEPT] != 0).any()) for each in encoder)
    public = detection_losses(known, of, WEIGHTS, COSTS, replace(ALL, legacy_padding=True))
    heard = torch.autograd.grad(public.total, known.memory.encoder_layers[0].logits)[0]
    assert bool((heard[filling] != 0).all())


def test_of_more_targets_than_selected_tokens_the_rest_stays_without() -> None:
    losses = detection_losses(sparse_output(), targets(1, 4, 0), WEIGHTS, COSTS, ALL)
    assert losses.total.isfinite()


def test_boxes_of_unusable_tokens_are_one_and_their_gradients_zero_not_nan() -> None:
    """The logit of their first box is +inf; here they are matched, as there are no others."""
    said = torch.zeros(1, 2, 4, requires_grad=True)
    boxes = (said + torch.tensor([[[torch.inf] * 4, [0.0] * 4]])).sigmoid()
    proposals = TokenPredictions(torch.zeros(1, 2, 4), boxes)
    tokens = torch.zeros(1, 2, 4)
    ratios = torch.ones(1, 1, 2)
    nowhere = torch.zeros(1, 2, dtype=torch.bool)
    memory = Memory(tokens, tokens, nowhere, ((1, 2),), ratios, proposals=proposals)
    output = DetectorOutput((group_of(*predictions(1, 1, 3)),), memory)
    losses = detection_losses(output, targets(2), WEIGHTS, COSTS, BINARY)
    (gradient,) = torch.autograd.grad(losses.total, said)
    assert gradient[0, 0].tolist() == [0, 0, 0, 0]
    assert bool((gradient[0, 1] != 0).any())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("class_scores", ["softmax", "sigmoid"])
def test_gradients_of_unequal_parts_add_up_to_those_of_the_whole_batch(
    class_scores: ClassScores,
) -> None:
    """Two workers with 1 and 2 pictures; of softmax scores where pictures have as many tokens."""
    supervision = Supervision(class_scores, "all")
    output, of = sparse_output(), targets(3, 1, 2)
    if class_scores == "softmax":
        output = _with_kept(output, torch.ones_like(KEPT))
    whole, alone = _learned(output, of, supervision)
    parts = [slice(0, 1), slice(1, 3)]
    share = Share(torch.stack([counts_of(of.part(part), 5) for part in parts]).sum(0), workers=2)
    found = [_learned(rows(output, part), of.part(part), supervision, share) for part in parts]
    for name, term in alone.terms.items():
        together = sum(losses.terms[name] for _, losses in found) / 2
        torch.testing.assert_close(together, term, msg=name)
    for ours, theirs in zip(whole, zip(*(leaves for leaves, _ in found), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(theirs) / 2, ours)


def _with_kept(output: DetectorOutput, kept: Tensor) -> DetectorOutput:
    assert output.memory.selection is not None
    selection = replace(output.memory.selection, kept=kept)
    return replace(output, memory=replace(output.memory, selection=selection))


def _learned(
    output: DetectorOutput, of: Targets, supervision: Supervision, share: Share | None = None
) -> tuple[tuple[Tensor, ...], Losses]:
    known, leaves = with_leaves(output)
    losses = detection_losses(known, of, WEIGHTS, COSTS, supervision, share=share)
    return torch.autograd.grad(losses.total, leaves), losses


@pytest.mark.parametrize("supervision", [ALL, BINARY, Supervision("softmax", "all")])
def test_a_part_that_cannot_be_matched_gives_nan_everywhere(supervision: Supervision) -> None:
    """Whichever kind of predictions is broken."""
    broken, leaves = with_leaves(sparse_output())
    of = targets(2, 1, 0)
    with torch.no_grad():
        broken.memory.encoder_layers[1].boxes[0, 0] = torch.nan
    with pytest.raises(UnmatchableError, match="in encoder layer 1, picture 0"):
        detection_losses(broken, of, WEIGHTS, COSTS, supervision)
    losses = unmatched_losses(broken, of, supervision)
    assert losses.total.isnan()
    assert all(bool(each.isnan().all()) for each in torch.autograd.grad(losses.total, leaves))


def test_a_blank_batch_adds_nothing_and_has_a_whole_graph() -> None:
    known, leaves = with_leaves(sparse_output())
    losses = detection_losses(known, targets(0, 0, 0), WEIGHTS, COSTS, ALL, blank=True)
    assert losses.total.tolist() == 0
    gradients = torch.autograd.grad(losses.total, leaves)
    assert all(float(each.abs().max()) == 0 for each in gradients)


def test_pictures_without_targets_teach_tokens_that_nothing_is_there() -> None:
    losses = detection_losses(sparse_output(), targets(0, 0, 0), WEIGHTS, COSTS, BINARY)
    assert losses.total.isfinite()
    assert float(losses.terms["loss_bbox_enc"]) == 0
    assert float(losses.terms["loss_ce_enc_0"]) > 0


def test_a_detector_without_selection_has_the_losses_of_its_decoder_alone() -> None:
    output, of = sparse_output(), targets(2, 1, 0)
    plain = replace(
        output.memory, selection=None, proposals=None, encoder_layers=(), objectness=None
    )
    losses = detection_losses(
        DetectorOutput(output.groups, plain), of, WEIGHTS, COSTS, Supervision()
    )
    alone = set_losses(output.groups[0], of, WEIGHTS, COSTS)
    assert torch.equal(losses.total, alone.total)
    assert losses.terms.keys() == alone.terms.keys()


def test_of_thousands_of_tokens_no_value_is_read_by_itself() -> None:
    """Peers' bug 7.2.9: the public matcher converts index after index."""
    output = sparse_output()
    many = replace(output.memory, proposals=tokens_say(7, 3, 3000))
    known = DetectorOutput(output.groups, many)
    with Readings() as readings:
        detection_losses(known, targets(20, 3, 0), WEIGHTS, COSTS, ALL)
    assert readings.count == 0
