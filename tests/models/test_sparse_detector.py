"""Sparse DETR as a whole: only a selection of the tokens is updated by the encoder."""

import pytest
import torch
from torch import Tensor, nn

from models.detector import Detector
from models.structures import Images, Memory
from tests.models.deformable_small import (
    DEFORMABLE,
    OBJECTNESS,
    RANDOM,
    SPARSE,
    TWO_STAGE,
    drawn,
    feature_maps,
    pictures,
    predictions,
)
from tests.models.test_detector import images

CRITERIA = pytest.mark.parametrize("kind", [SPARSE, OBJECTNESS, RANDOM])
DENSE = {"encoder_layers": 2, "rho": 0.4}
"""The same with the attention of DETR, tokens of one level, learned queries."""


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (SPARSE, {}),
        (OBJECTNESS, {}),
        (RANDOM, {}),
        (SPARSE, {"selection": {"encoder_auxiliary": False}}),
        (SPARSE, {"selection": {"legacy_padding": True}}),
        (RANDOM | {"two_stage": False}, {}),
        (RANDOM | {"two_stage": False}, {"selection": {"criterion": "random"}, "rho": 1.0}),
        (OBJECTNESS | {"two_stage": False}, {"proposal_classes": "binary"}),
        (DENSE, {"class_scores": "softmax"}),
    ],
)
def test_every_weight_gets_a_gradient(kind: dict[str, object], changes: dict[str, object]) -> None:
    backbone = {"name": "resnet18", "weights": "random", "train": True}
    model = drawn(kind, noise=0.1, backbone=backbone, num_queries=40, **changes).train()
    said = model(pictures())
    total = torch.stack([each.square().sum() for each in predictions(said)]).sum()
    total.backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert weight.grad.any(), name


def test_the_state_dict_has_the_names_that_published_weights_are_mapped_to() -> None:
    """Beside those of a two-stage Deformable DETR."""
    two_stage = set(drawn(TWO_STAGE, encoder_layers=3).state_dict())
    parts = {"scorer.norm"} | {f"scorer.layers.{number}" for number in range(4)}
    for layer in range(2):
        parts |= {f"encoder_class_head.{layer}"}
        parts |= {f"encoder_box_head.{layer}.layers.{number}" for number in range(3)}
    wanted = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert set(drawn(SPARSE, encoder_layers=3).state_dict()) - two_stage == wanted
    rated = {"objectness_class_head"} | {f"objectness_box_head.layers.{n}" for n in range(3)}
    wanted = {name for name in wanted if not name.startswith("scorer.")}
    wanted |= {f"{part}.{kind}" for part in rated for kind in ("weight", "bias")}
    assert set(drawn(OBJECTNESS, encoder_layers=3).state_dict()) - two_stage == wanted


def test_heads_of_tokens_begin_at_the_tokens_own_box_with_every_decoder() -> None:
    for kind in (SPARSE, DENSE, DENSE | {"selection": {"criterion": "objectness"}}):
        model = drawn(kind, class_scores="sigmoid")
        for name, part in model.named_modules():
            if name.startswith(("encoder_box_head.0.layers.2", "objectness_box_head.layers.2")):
                assert not part.weight.any(), name
                assert not part.bias.any(), name


@CRITERIA
def test_tokens_that_are_not_selected_come_out_as_they_went_in(kind: dict[str, object]) -> None:
    """Sparse DETR, equation 4 (acceptance check 9.7), to the bit; the others do not."""
    model, given = drawn(kind, noise=0.1), []
    model.encoder.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].tokens))
    memory = model.encode(pictures())
    kept = _kept(memory)
    assert torch.equal(memory.tokens[~kept], given[0][~kept])
    assert (memory.tokens[kept] != given[0][kept]).any(-1).all()
    assert 0 < int(kept.sum()) < kept.numel()


@CRITERIA
def test_a_share_of_each_pictures_own_tokens_is_selected(kind: dict[str, object]) -> None:
    memory = drawn(kind, noise=0.1).encode(pictures())
    valid = (~memory.padding).sum(1)
    wanted = [int(0.3 * int(each)) + 1 for each in valid]
    assert _kept(memory).sum(1).tolist() == wanted
    assert not (_kept(memory) & memory.padding).any()


@pytest.mark.parametrize("kind", [SPARSE, DEFORMABLE, {}])
def test_all_tokens_selected_is_the_encoder_without_a_selection(kind: dict[str, object]) -> None:
    """Acceptance check 9.7: to the bit without padding, else for all tokens but the padding."""
    sparse = drawn(kind, noise=0.1, rho=1.0)
    plain = drawn(kind, rho=None)
    plain.load_state_dict(sparse.state_dict(), strict=False)
    single = images((64, 96))
    assert torch.equal(sparse.encode(single).tokens, plain.encode(single).tokens)
    found, wanted = sparse.encode(pictures()), plain.encode(pictures())
    valid = ~wanted.padding
    torch.testing.assert_close(found.tokens[valid], wanted.tokens[valid])
    assert torch.equal(_kept(found), valid)


@CRITERIA
def test_a_picture_is_encoded_the_same_whatever_the_others_of_its_batch(
    kind: dict[str, object],
) -> None:
    """Public bug 7.2.3: a larger picture makes more rows, which nobody reads."""
    model, both = drawn(kind, noise=0.1), pictures()
    twice = Images(both.pixels[[1, 1]], both.padding[[1, 1]], both.sizes[[1, 1]])
    beside, alike = model.encode(both), model.encode(twice)
    assert torch.equal(_kept(beside)[1], _kept(alike)[0])
    torch.testing.assert_close(beside.tokens[1], alike.tokens[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(beside.selection.indices[1], alike.selection.indices[1])


@CRITERIA
def test_the_order_of_a_batch_is_only_an_order(kind: dict[str, object]) -> None:
    model, batch = drawn(kind, noise=0.1), pictures()
    turned = Images(batch.pixels.flip(0), batch.padding.flip(0), batch.sizes.flip(0))
    first, second = model(batch), model(turned)
    assert torch.equal(_kept(second.memory).flip(0), _kept(first.memory))
    boxes = (each.groups[0].layers[-1].boxes for each in (first, second))
    torch.testing.assert_close(next(boxes), next(boxes).flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SPARSE, OBJECTNESS])
def test_padding_changes_no_answer(kind: dict[str, object]) -> None:
    """Acceptance check 9.4 and public bug 7.2.10, but for the group norms of the levels."""
    model = drawn(kind, noise=0.1)
    alone, padded = _alone_and_padded(model)
    valid = ~padded.padding
    assert torch.equal(_kept(padded)[valid], _kept(alone)[0])
    torch.testing.assert_close(padded.tokens[valid], alone.tokens[0], rtol=1e-4, atol=1e-5)
    boxes = []
    for memory in (alone, padded):
        (group,) = model.decode(memory, (model.query_group(memory),)).groups
        boxes.append(group.layers[-1].boxes)
    torch.testing.assert_close(boxes[0], boxes[1], rtol=0, atol=1e-4)


def test_scores_of_the_released_code_depend_on_padding() -> None:
    """Public bug 7.2.10, kept by legacy_padding=true."""
    for legacy in (False, True):
        model = drawn(SPARSE, noise=0.1, selection={"legacy_padding": legacy})
        alone, padded = _alone_and_padded(model)
        scores = padded.selection.scores[~padded.padding]
        assert torch.allclose(scores, alone.selection.scores[0], atol=1e-5) != legacy


def test_scores_come_from_the_features_that_will_propose() -> None:
    """Reference, 3.3: one projection before the encoder, on tokens with their positions, and after.

    So what the scores learn from reaches it, the positions of levels and the input projections.
    """
    model = drawn(SPARSE, noise=0.1, selection={"encoder_auxiliary": False}).train()
    memory = model.encode(pictures())
    learning = (
        model.proposal_tokens.projection.weight,
        model.level_embedding,
        *(level.convolution.weight for level in model.input_projections),
    )
    for gradient in torch.autograd.grad(memory.selection.scores.square().sum(), learning):
        assert gradient.any()


@pytest.mark.parametrize("kind", [SPARSE, OBJECTNESS])
def test_what_only_training_needs_is_left_out_of_inference(kind: dict[str, object]) -> None:
    """Public bug 7.2.4: auxiliary heads, boxes of scored tokens, recorded attention."""
    model, called = drawn(kind), set()
    for name, part in model.named_modules():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    said = model(pictures())
    assert not [name for name in called if name.startswith(_TRAINING_ONLY)]
    assert said.memory.encoder_layers == ()
    assert said.memory.objectness is None
    assert said.groups[0].layers[0].cross_attention is None
    said = model.train()(pictures())
    assert [name for name in called if name.startswith(_TRAINING_ONLY)]
    assert len(said.memory.encoder_layers) == 1


_TRAINING_ONLY = ("encoder_class_head", "encoder_box_head", "objectness_box_head")


@CRITERIA
def test_the_encoders_tokens_say_boxes_after_every_layer_but_the_last(
    kind: dict[str, object],
) -> None:
    """Section 3.4: on the selected tokens, around the tokens' own boxes, in training."""
    model = drawn(kind, encoder_layers=3, dropout=0.0).train()
    memory = model.encode(pictures())
    assert len(memory.encoder_layers) == 2
    height, width = memory.spatial_shapes[0]
    first, kept = memory.encoder_layers[0], memory.selection.kept
    assert first.logits.shape == (*memory.selection.indices.shape, 3)
    on_finest = kept[0] & (memory.selection.indices[0] < height * width)
    boxes, places = first.boxes[0][on_finest], memory.selection.indices[0][on_finest]
    inside = boxes[:, 2] < 1
    assert inside.any()
    torch.testing.assert_close(boxes[inside][:, 2:], torch.full_like(boxes[inside][:, 2:], 0.05))
    rows = (places[inside] // width + 0.5) / (64 / 8)
    torch.testing.assert_close(boxes[inside][:, 1], rows)


def test_a_learning_selection_records_the_decoders_attention_in_training_alone() -> None:
    for kind, learns in ((SPARSE, True), (OBJECTNESS, False), (RANDOM, False)):
        model = drawn(kind).train()
        for layer in model(pictures()).groups[0].layers:
            assert (layer.cross_attention is not None) == learns
            assert layer.self_attention is None


def test_objectness_selects_the_tokens_that_look_most_like_an_object() -> None:
    """Section 3.3, baseline OS: the best class before the encoder, never "no object"."""
    model = drawn(OBJECTNESS, noise=0.1, class_scores="softmax", dropout=0.0).train()
    memory = model.encode(images((64, 96)))
    assert memory.objectness.logits.shape[-1] == 4
    best = memory.objectness.logits[0, :, :3].amax(-1).topk(39).indices.sort().values
    assert torch.equal(memory.selection.indices[0], best)
    assert memory.selection.scores is None


def test_chance_selects_the_same_tokens_until_it_trains() -> None:
    model, batch = drawn(RANDOM), pictures()
    first, second = model.encode(batch), model.encode(batch)
    assert torch.equal(first.selection.indices, second.selection.indices)
    model.train()
    assert not torch.equal(
        model.encode(batch).selection.indices, model.encode(batch).selection.indices
    )


@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0])
def test_the_same_weights_serve_every_rho(rho: float) -> None:
    """Section 4.3, dynamic sparsification."""
    trained, batch = drawn(SPARSE, noise=0.1), images((64, 96))
    other = drawn(SPARSE, rho=rho)
    other.load_state_dict(trained.state_dict())
    memory = other.encode(batch)
    tokens = memory.tokens.shape[1]
    assert int(_kept(memory).sum()) == min(int(rho * tokens) + 1, tokens)
    torch.testing.assert_close(memory.selection.scores, trained.encode(batch).selection.scores)
    best = memory.selection.scores[0].topk(int(_kept(memory).sum())).indices.sort().values
    assert torch.equal(memory.selection.indices[0], best)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (17, 130)])
@CRITERIA
def test_any_size_of_picture_goes_in_training_too(
    kind: dict[str, object], size: tuple[int, int]
) -> None:
    model = drawn(kind, num_queries=300).train()
    said = model(images(size, (40, 40)))
    assert all(each.isfinite().all() for each in predictions(said))
    assert said.groups[0].layers[-1].boxes.shape[1] == min(300, said.memory.tokens.shape[1])


def test_twelve_layers_of_encoder_train() -> None:
    """Section 4.3, deeper encoders: eleven auxiliary heads beside the proposals."""
    model = drawn(SPARSE, encoder_layers=12).train()
    said = model(pictures())
    assert len(said.memory.encoder_layers) == 11
    torch.stack([each.square().sum() for each in predictions(said)]).sum().backward()
    for layer in model.encoder.layers:
        gradient = layer.feedforward.widen.weight.grad
        assert gradient.isfinite().all()
        assert gradient.any()


@CRITERIA
def test_bfloat16_says_finite_boxes(kind: dict[str, object]) -> None:
    model = drawn(kind, noise=0.02).train()
    with torch.autocast("cpu", torch.bfloat16):
        said = model(pictures())
    for each in predictions(said):
        assert each.dtype == torch.float32
        assert each.isfinite().all()


def test_two_calls_answer_bit_for_bit() -> None:
    for kind in (SPARSE, OBJECTNESS, RANDOM):
        model, batch = drawn(kind, noise=0.1), pictures()
        for before, after in zip(predictions(model(batch)), predictions(model(batch)), strict=True):
            assert torch.equal(before, after)


def _kept(memory: Memory) -> Tensor:
    selection = memory.selection
    assert selection is not None
    return torch.zeros_like(memory.padding).scatter(1, selection.indices, selection.kept)


def _alone_and_padded(model: Detector) -> tuple[Memory, Memory]:
    """A picture of 2x3 cells of stride 32 by itself and in 4x4 cells; no group norms."""
    for level in model.input_projections:
        level.norm = nn.Identity()
    alone = torch.zeros(1, 64, 96, dtype=torch.bool)
    beside = torch.ones(1, 128, 128, dtype=torch.bool)
    beside[:, :64, :96] = False
    maps = feature_maps(2, 3)
    wider = tuple(
        nn.functional.pad(one, (0, 16 // 2**n - one.shape[-1], 0, 16 // 2**n - one.shape[-2]))
        for n, one in enumerate(maps)
    )
    return model.encode_features(maps, alone), model.encode_features(wider, beside)
