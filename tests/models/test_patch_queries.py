"""UP-DETR's query patches (section 3.2)."""

import pytest
import torch
from torch import Tensor

from models.patch_queries import (
    PatchDetector,
    PatchDraws,
    PatchOutput,
    QueryPatches,
    draw_patch_queries,
    hidden_queries,
)
from tests.models.conditional_small import ANCHORS, CONDITIONAL, PATTERNS
from tests.models.test_detector import images, settings

DEFORMABLE = {
    "encoder_attention": "deformable",
    "decoder_attention": "deformable",
    "feature_levels": 2,
    "hidden_dim": 32,
    "box_refinement": True,
    "class_scores": "sigmoid",
    "dropout": 0.0,
}
SPARSE = {
    **DEFORMABLE,
    "rho": 0.4,
    "selection": {"encoder_auxiliary": False},
}


def model(num_queries: int = 6, **changes: object) -> PatchDetector:
    patches = QueryPatches.model_validate({"num_patches": 3} | changes)
    built = PatchDetector(
        settings(num_queries=num_queries), patches, torch.Generator().manual_seed(0)
    )
    return built.eval()


def deformable(kind: dict[str, object], **changes: object) -> PatchDetector:
    """With what training moves away from zero: box heads, and where attention looks."""
    patches = QueryPatches.model_validate({"num_patches": 3} | changes)
    built = PatchDetector(
        settings(num_queries=6, **kind), patches, torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in built.detector.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name or "box_head" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return built.eval()


def patches(count: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def last_boxes(said: PatchOutput) -> Tensor:
    return said.detection.groups[0].layers[-1].boxes.detach()


def test_queries_see_their_own_patch_group_and_no_other() -> None:
    hidden = hidden_queries(4, 2)
    assert hidden.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(("num_queries", "num_patches"), [(100, 20), (100, 100), (6, 1), (60, 6)])
def test_every_query_sees_its_group_for_any_number_of_patches(
    num_queries: int, num_patches: int
) -> None:
    """The public mask leaves rows without a visible query beyond num_patches ** 2 = num_queries."""
    visible = (~hidden_queries(num_queries, num_patches)).sum(1)
    assert (visible == num_queries // num_patches).all()


def test_more_patches_than_queries_each_give_finite_boxes() -> None:
    built = model(num_queries=6, num_patches=6)
    assert last_boxes(built(images((64, 96)), patches(6, batch=1))).isfinite().all()


def test_queries_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_queries=7 .* num_patches=3; .* num_queries=6"):
        hidden_queries(7, 3)


def test_a_patch_is_searched_by_its_own_queries_only() -> None:
    built = model()
    changed = patches()
    changed[:, 1] += 1.0
    before = last_boxes(built(images((64, 96), (96, 64)), patches()))
    after = last_boxes(built(images((64, 96), (96, 64)), changed))
    moved = (before != after).any(-1).any(0)
    assert moved.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("kind", [DEFORMABLE, SPARSE, CONDITIONAL, ANCHORS])
def test_patch_groups_do_not_see_each_other_in_any_decoder(
    kind: dict[str, object],
) -> None:
    built, blind = deformable(kind), deformable(kind, attention_mask=False)
    changed = patches()
    changed[:, 1] += 1.0
    pictures = images((64, 96), (96, 64))
    for model, all_move in ((built, False), (blind, True)):
        before, after = last_boxes(model(pictures, patches())), last_boxes(model(pictures, changed))
        moved = (before != after).any(-1).any(0)
        assert moved.tolist() == [all_move] * 2 + [True] * 2 + [all_move] * 2


def test_a_deformable_query_holds_its_patch_as_content_and_looks_where_it_always_looks() -> None:
    built = deformable(DEFORMABLE)
    learned = built.detector.learned_queries()
    features = built.patch_features(patches())
    group = built.query_group(features, None)
    searched = built.patch_projection(features[1, 2])
    torch.testing.assert_close(group.content[1, 5], searched + learned.content[5])
    assert group.reference is not None
    assert learned.reference is not None
    for picture in range(2):
        assert group.position is not None
        assert learned.position is not None
        assert torch.equal(group.position[picture], learned.position)
        assert torch.equal(group.reference[picture], learned.reference)


@pytest.mark.parametrize("kind", [CONDITIONAL, ANCHORS])
def test_a_query_with_a_point_or_an_anchor_holds_its_patch_as_content(
    kind: dict[str, object],
) -> None:
    built = deformable(kind)
    learned = built.detector.learned_queries()
    features = built.patch_features(patches())
    group = built.query_group(features, None)
    torch.testing.assert_close(group.content[1, 5], built.patch_projection(features[1, 2]))
    assert (group.position is None) == (kind == ANCHORS)
    assert group.reference is not None
    assert learned.reference is not None
    assert torch.equal(group.reference[1], learned.reference)


def test_patterns_are_refused_where_patches_would_each_get_one_alone() -> None:
    with pytest.raises(ValueError, match=r"num_patterns=2 with num_patches=3 .*num_patterns=0"):
        deformable(PATTERNS)
    built = deformable(PATTERNS, num_patches=1)
    assert built.query_group(built.patch_features(patches(1)), None).content.shape[1] == 12


def test_shuffling_moves_content_position_and_reference_of_a_query_together() -> None:
    built = deformable(DEFORMABLE, shuffle=True).train()
    order = torch.tensor([5, 0, 1, 2, 3, 4])
    features = built.patch_features(patches())
    plain = built.query_group(features, PatchDraws(torch.zeros(2, 6).bool(), torch.arange(6)))
    moved = built.query_group(features, PatchDraws(torch.zeros(2, 6).bool(), order))
    assert plain.reference is not None
    assert moved.reference is not None
    assert torch.equal(moved.content, plain.content[:, order])
    assert plain.position is not None
    assert moved.position is not None
    assert torch.equal(moved.position, plain.position[:, order])
    assert torch.equal(moved.reference, plain.reference[:, order])


def test_a_deformable_query_that_loses_its_patch_keeps_its_own_content() -> None:
    built = deformable(DEFORMABLE).train()
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[1, 4] = False
    group = built.query_group(built.patch_features(patches()), PatchDraws(keep, torch.arange(6)))
    own = built.detector.learned_queries().content
    assert torch.equal(group.content[1, 4], own[4])
    assert not torch.equal(group.content[0, 4], own[4])


def test_without_the_attention_mask_groups_feel_each_other() -> None:
    built = model(attention_mask=False)
    changed = patches()
    changed[:, 1] += 1.0
    before = last_boxes(built(images((64, 96), (96, 64)), patches()))
    after = last_boxes(built(images((64, 96), (96, 64)), changed))
    assert (before != after).any(-1).all()


def test_evaluation_takes_fewer_patches_and_answers_them_as_among_all() -> None:
    built = model()
    few = built(images((64, 96), (96, 64)), patches()[:, :2])
    every = built(images((64, 96), (96, 64)), patches())
    assert last_boxes(few).shape == (2, 4, 4)
    torch.testing.assert_close(last_boxes(few), last_boxes(every)[:, :4])


def test_features_and_reconstructions_have_the_depth_of_the_cnn() -> None:
    said = model()(images((64, 96), (96, 64)), patches())
    assert said.patch_features.shape == (2, 3, 512)
    assert said.reconstructions is not None
    assert said.reconstructions.shape == (2, 2, 6, 512)
    assert model(reconstruction=False)(images((64, 96)), patches(batch=1)).reconstructions is None


def test_a_query_that_loses_its_patch_keeps_its_own_vector() -> None:
    built = model().train()
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[1, 4] = False
    draws = PatchDraws(keep, torch.arange(6))
    features = built.patch_features(patches())
    position = built.query_group(features, draws).position
    assert torch.equal(position[1, 4], built.detector.queries.weight[4])
    searched = built.patch_projection(features[1, 2])
    torch.testing.assert_close(position[1, 5], searched + built.detector.queries.weight[5])


def test_shuffling_moves_the_query_vectors_and_not_the_patches() -> None:
    built = model(shuffle=True).train()
    order = torch.tensor([5, 0, 1, 2, 3, 4])
    draws = PatchDraws(torch.ones(2, 6, dtype=torch.bool), order)
    features = built.patch_features(patches())
    position = built.query_group(features, draws).position
    searched = built.patch_projection(features[0, 0])
    torch.testing.assert_close(position[0, 0], searched + built.detector.queries.weight[5])


def test_masking_per_query_hides_single_queries_and_per_patch_whole_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    single = QueryPatches(num_patches=4, mask_ratio=0.25)
    keep = draw_patch_queries(single, 12, 500, generator).keep
    assert abs(float(keep.float().mean()) - 0.75) < 0.02
    assert (keep.view(500, 4, 3).sum(-1) % 3 != 0).any()

    whole = QueryPatches(num_patches=4, mask_ratio=0.25, mask_unit="per_patch")
    keep = draw_patch_queries(whole, 12, 500, generator).keep
    assert abs(float(keep.float().mean()) - 0.75) < 0.03
    assert (keep.view(500, 4, 3).sum(-1) % 3 == 0).all()


def test_draws_depend_on_the_generator_alone() -> None:
    shuffled = QueryPatches(num_patches=4, shuffle=True)
    first, second = (
        draw_patch_queries(shuffled, 12, 3, torch.Generator().manual_seed(8)) for _ in range(2)
    )
    assert torch.equal(first.keep, second.keep)
    assert torch.equal(first.order, second.order)
    assert sorted(first.order.tolist()) == list(range(12)) != first.order.tolist()


@pytest.mark.parametrize("detach", [False, True])
def test_a_trained_cnn_is_changed_by_its_own_targets_only_where_asked(detach: bool) -> None:
    trained = settings(
        num_queries=6, backbone={"name": "resnet18", "weights": "random", "train": True}
    )
    built = PatchDetector(
        trained,
        QueryPatches(num_patches=3, mask_ratio=0, detach_features=detach),
        torch.Generator().manual_seed(0),
    )
    assert built(images((64, 96)), patches(batch=1)).patch_features.requires_grad != detach


@pytest.mark.parametrize(
    ("training", "count", "draws", "complaint"),
    [
        (True, 2, True, "got 2 patches .* give exactly 3"),
        (False, 4, False, "got 4 patches .* give at most 3"),
        (True, 3, False, "needs draws; make them with draw_patch_queries"),
        (False, 2, True, "draws are for all 3 patches, got 2"),
    ],
)
def test_patches_and_draws_that_do_not_fit_are_refused(
    training: bool, count: int, draws: bool, complaint: str
) -> None:
    built = model().train(training)
    given = draw_patch_queries(built.patches, 6, 1, torch.Generator()) if draws else None
    with pytest.raises(ValueError, match=complaint):
        built(images((64, 96)), patches(count, batch=1), given)
