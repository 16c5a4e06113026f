"""Conditional DETR and DAB-DETR: the paper's formulas, groups, recording, first values, precision.

That they compute what the public code computes is in `tests.parity`.
"""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import attention_weights, mixture
from models.conditional_attention import ConditionalCrossAttention
from models.heads import logit
from models.initialise import initialise
from models.query_positions import AnchorPositions, ConditionalPositions, box_waves
from models.sampling_parts import sampling_parts
from models.structures import DetectorOutput, QueryGroup
from tests.models.conditional_small import ANCHORS, CONDITIONAL, PATTERNS, drawn, memory, normal
from tests.models.test_detector import images, settings

KINDS = pytest.mark.parametrize("kind", [CONDITIONAL, PATTERNS], ids=["conditional", "anchors"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (CONDITIONAL | {"pre_norm": True}, "pre_norm=true .*use pre_norm=false"),
        (CONDITIONAL | {"box_refinement": True}, "box_refinement=true .*query_kind=anchor"),
        ({"query_kind": "anchor"}, "query_kind=anchor with decoder_attention=dense.*conditional"),
        (CONDITIONAL | {"num_patterns": 3}, "num_patterns=3 .*use num_patterns=0, or query_kind"),
        (ANCHORS | {"rho": 0.3}, "scale_positions=true .*rho=null"),
        (
            {"position": "learned", "position_temperature": 20.0},
            "position_temperature=20.0 .*use position=sine",
        ),
    ],
)
def test_what_does_not_go_together_names_the_key_the_value_and_the_way_out(
    changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(**changes)


@pytest.mark.parametrize("first", [True, False])
def test_contents_are_compared_with_contents_and_places_with_places_in_each_head(
    first: bool,
) -> None:
    """Conditional DETR, equation 4; in the first layer places are added to contents as well."""
    attention = ConditionalCrossAttention(16, 2, 0.0, first=first)
    initialise(attention, torch.Generator().manual_seed(0))
    content, position, sine = normal(1, 3, 16), normal(1, 3, 16, seed=1), normal(1, 3, 16, seed=2)
    tokens, places = normal(1, 4, 16, seed=3), normal(1, 4, 16, seed=4)
    with torch.no_grad():
        queries = attention.project_queries(content, position, sine)
        seen = attention_weights(queries, attention.project_keys(tokens, places), None)
        asked, spatial = attention.query_content(content), attention.query_sine(sine)
        keys, key_places = attention.key_content(tokens), attention.key_position(places)
        if first:
            assert attention.query_position is not None
            asked, keys = asked + attention.query_position(position), keys + key_places
    for head, channels in enumerate((slice(0, 8), slice(8, 16))):
        scores = asked[0, :, channels] @ keys[0, :, channels].T
        scores = scores + spatial[0, :, channels] @ key_places[0, :, channels].T
        expected = (scores / math.sqrt(16)).softmax(-1)
        torch.testing.assert_close(seen[0, head], expected)
    assert (attention.query_position is None) != first


def test_values_narrower_than_queries_are_mixed_alike_by_any_kernel() -> None:
    """The fast path pads them for torch's fused kernel."""
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        queries, keys, values = (
            normal(2, 2, count, width, seed=seed).requires_grad_()
            for seed, (count, width) in enumerate(((3, 8), (5, 8), (5, 4)))
        )
        hidden = torch.tensor([False, False, True, False, True])
        with sdpa_kernel(backend):
            mixed = mixture(queries, keys, values, hidden[None, None, None], 0.0)
        torch.autograd.backward(mixed.square().sum())
        found.append((mixed, queries.grad, keys.grad, values.grad))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)


def test_the_code_of_a_box_is_y_then_x_then_its_sides() -> None:
    code = box_waves(torch.tensor([[[0.25, 0.5, 0.75, 0.0]]]), 8)[0, 0].view(4, 4)
    x, y, width, height = (share * 2 * math.pi for share in (0.25, 0.5, 0.75, 0.0))
    for row, angle in zip(code, (y, x, width, height), strict=True):
        slow = angle / 100
        expected = [math.sin(angle), math.cos(angle), math.sin(slow), math.cos(slow)]
        torch.testing.assert_close(row, torch.tensor(expected))


def test_contents_scale_the_sines_in_all_layers_but_the_first() -> None:
    positions = ConditionalPositions(8, num_layers=2)
    content, points = normal(1, 3, 8), torch.rand(1, 3, 2)
    plain = box_waves(points, 8)
    torch.testing.assert_close(positions(content, points, first=True), plain)
    scaled = positions(content, points, first=False)
    assert positions.scale is not None
    torch.testing.assert_close(scaled, plain * positions.scale(content))


def test_a_wide_anchor_looks_wider_than_a_narrow_one() -> None:
    """DAB-DETR, equation 8: x by the asked width over the anchor's, y by the heights."""
    positions = AnchorPositions(8, num_layers=2)
    content = normal(1, 1, 8)
    anchor = torch.tensor([[[0.3, 0.6, 0.2, 0.4]]])
    sine = positions(content, anchor, first=True).sine
    width, height = positions.sides(content)[0, 0].sigmoid().tolist()
    y, x = box_waves(anchor, 8)[0, 0, :8].split(4)
    expected = torch.cat((y * height / 0.4, x * width / 0.2))
    torch.testing.assert_close(sine[0, 0], expected)
    nothing = positions(content, torch.zeros(1, 1, 4), first=True).sine
    assert nothing.isfinite().all()


def test_anchors_are_moved_by_what_is_not_normalised_and_boxes_begin_from_them() -> None:
    """As the public code does; its paper says neither. A state without a weight is its bias."""
    model = drawn(ANCHORS, noise=0.2)
    with torch.no_grad():
        model.decoder.layers[0].norm3.weight.zero_()
    (group,) = model.decode(memory(), (model.query_group(memory()),)).groups
    first, second = group.layers
    assert second.reference is not None
    assert second.reference.requires_grad
    state = model.decoder.layers[0].norm3.bias.expand(2, 5, -1)
    assert first.reference is not None
    moved = (model.box_head(state) + logit(first.reference, 1e-3)).sigmoid()
    torch.testing.assert_close(second.reference, moved)
    started = (model.box_head(second.hidden) + logit(second.reference, 1e-3)).sigmoid()
    torch.testing.assert_close(second.boxes, started)
    assert not torch.allclose(first.boxes, second.reference)


@KINDS
def test_a_group_does_not_depend_on_the_others(kind: dict[str, object]) -> None:
    model = drawn(kind, noise=0.1)
    mine = model.query_group(memory())
    other = QueryGroup(
        "teacher",
        content=normal(2, 7, 16, seed=7),
        position=None if mine.position is None else normal(2, 7, 16, seed=8),
        reference=torch.rand(2, 7, 4 if mine.position is None else 2),
    )
    with torch.no_grad():
        alone = model.decode(memory(), (mine,))
        both = model.decode(memory(), (mine, other))
        other_alone = model.decode(memory(), (other,))
    for output, expected in (
        (both.groups[0], alone.groups[0]),
        (both.groups[1], other_alone.groups[0]),
    ):
        for layer, wanted in zip(output.layers, expected.layers, strict=True):
            torch.testing.assert_close(layer.boxes, wanted.boxes)
            torch.testing.assert_close(layer.logits, wanted.logits)


@KINDS
def test_attention_is_handed_out_per_head_before_dropout(kind: dict[str, object]) -> None:
    """Public modules hand out the mean over heads after dropout."""
    model = drawn(kind, noise=0.1, dropout=0.5).train()
    group, first = model.query_group(memory()), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (said,) = model.decode(memory(), (group,), record="all").groups
        layer = said.layers[0]
        assert isinstance(layer.self_attention, Tensor)
        assert isinstance(layer.cross_attention, Tensor)
        queries = group.content.shape[1]
        assert layer.self_attention.shape == (2, 2, queries, queries)
        assert layer.cross_attention.shape == (2, 2, queries, 5)
        for seen in (layer.self_attention, layer.cross_attention):
            torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:-1]))
        assert (layer.cross_attention[0, :, :, -2:] == 0).all()
        first.append(layer.self_attention)
    assert torch.equal(*first)
    model.eval()
    with torch.no_grad():
        plain, recorded = (
            _boxes(model.decode(memory(), (group,), what)) for what in ("nothing", "all")
        )
    assert torch.equal(plain, recorded)


@KINDS
def test_boxes_begin_at_the_references_and_classes_rare(kind: dict[str, object]) -> None:
    model = drawn(kind)
    group = model.query_group(memory())
    (said,) = model.decode(memory(), (group,)).groups
    assert group.reference is not None
    size = torch.full((*group.reference.shape[:2], 2), 0.5)
    expected = torch.cat((group.reference, size), dim=-1)[..., :4]
    for layer in said.layers:
        torch.testing.assert_close(layer.boxes, expected, atol=2e-3, rtol=0)
    assert model.class_head.bias.allclose(torch.tensor(-math.log(99.0)))


def test_every_anchor_is_looked_from_with_every_pattern() -> None:
    model = drawn(PATTERNS)
    learned = model.learned_queries()
    assert learned.position is None
    assert learned.content.shape == (10, 16)
    assert learned.reference is not None
    assert torch.equal(learned.reference[:5], learned.reference[5:])
    assert model.patterns is not None
    assert torch.equal(learned.content[4:6], model.patterns.weight)
    assert model.settings.total_queries == 10


@KINDS
def test_bfloat16_keeps_boxes_in_float32_and_near(kind: dict[str, object]) -> None:
    model = drawn(kind, noise=0.05)
    pictures = images((64, 96), (96, 32))
    with torch.no_grad():
        exact = _boxes(model(pictures))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = _boxes(model(pictures))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0)


def test_tokens_scale_their_positions_by_what_they_have_become() -> None:
    model = drawn(ANCHORS, encoder_layers=1)
    plain = drawn(ANCHORS | {"scale_positions": False}, encoder_layers=1)
    named = {n: t for n, t in model.state_dict().items() if "position_scale" not in n}
    plain.load_state_dict(named)
    scale = model.encoder.position_scale
    assert scale is not None
    with torch.no_grad():
        for layer in scale.layers:
            layer.weight.zero_()
        scale.layers[1].bias.fill_(1.0)
        pictures = images((64, 96))
        torch.testing.assert_close(model.encode(pictures).tokens, plain.encode(pictures).tokens)
        scale.layers[1].bias.fill_(3.0)
        moved = copy.deepcopy(plain.encode(pictures).position)
        assert not torch.allclose(model.encode(pictures).tokens, plain.encode(pictures).tokens)
        assert torch.equal(model.encode(pictures).position, moved)


@KINDS
@pytest.mark.parametrize("layers", [1, 2])
def test_every_trained_part_gets_a_gradient(kind: dict[str, object], layers: int) -> None:
    """DDP waits for the gradient of each; with one decoder layer nothing scales the sines."""
    model = drawn(kind, noise=0.1, decoder_layers=layers).train()
    said = model(images((64, 96))).groups[0].layers
    total = torch.stack([layer.logits.sum() + layer.boxes.sum() for layer in said]).sum()
    torch.autograd.backward(total)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert [name for name, each in trained.items() if each.grad is None] == []


def test_reference_points_of_conditional_attention_learn_at_the_full_rate() -> None:
    assert sampling_parts(drawn(CONDITIONAL)) == ()


def _boxes(output: DetectorOutput) -> Tensor:
    return torch.stack([layer.boxes for layer in output.groups[0].layers])
