"""One-shot detection's model: the pretrained one with a single patch."""

import pytest
import torch
from torch import Tensor

from models.interop.detr import load_detr, to_detr_names
from models.one_shot import MATCHES, matches_only, one_shot_detector, one_shot_settings, search
from models.patch_queries import PatchDetector, QueryPatches
from tests.models.conditional_small import PATTERNS
from tests.models.test_detector import images, settings

KINDS = pytest.mark.parametrize("kind", [{}, PATTERNS], ids=["dense", "anchors with patterns"])


def model(**kind: object) -> PatchDetector:
    told = settings(**(kind | {"num_classes": None}))
    return one_shot_detector(told, torch.Generator().manual_seed(0)).eval()


def crops(count: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@KINDS
@torch.no_grad()
def test_searching_one_memory_for_many_crops_finds_what_forward_finds_for_each(
    kind: dict[str, object],
) -> None:
    built, pictures, asked = model(**kind), images((64, 96), (96, 32)), crops(3)
    memory = built.detector.encode(pictures)
    found = search(built, memory, built.patch_features(asked))
    assert len(found) == 3
    for number, layer in enumerate(found):
        slow = built(pictures, asked[:, number : number + 1]).detection.groups[0].layers[-1]
        torch.testing.assert_close(layer.boxes, slow.boxes)
        torch.testing.assert_close(layer.logits, slow.logits)


@torch.no_grad()
def test_the_crop_goes_to_every_query_and_queries_see_each_other() -> None:
    built = model()
    features = built.patch_features(crops(1))
    group = built.query_group(features, None)
    assert group.intra_mask is None
    wanted = built.patch_projection(features) + built.detector.queries.weight
    torch.testing.assert_close(group.position, wanted)


@KINDS
def test_training_needs_no_draws_and_reaches_every_trained_weight(kind: dict[str, object]) -> None:
    """Unused branches would hang or break several workers (peers' bug 5)."""
    built = model(**kind).train()
    layers = built(images((64, 96), (96, 32)), crops(1)).detection.groups[0].layers
    torch.stack([layer.logits.sum() + layer.boxes.sum() for layer in layers]).sum().backward()
    silent = [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_pretrained_weights_fit_whole_the_class_head_and_patch2query_included() -> None:
    pretrained = PatchDetector(
        settings(num_classes=2), QueryPatches(num_patches=5), torch.Generator().manual_seed(9)
    )
    tensors = to_detr_names(pretrained)
    assert tensors["class_embed.weight"].shape[0] == MATCHES + 2
    built = model()
    report = load_detr(built, tensors, source="pretrained.pth")
    assert report.new == ()
    assert set(report.left_out) == {name for name in tensors if name.startswith("feature_align")}
    assert torch.equal(built.patch_projection.weight, pretrained.patch_projection.weight)


def test_another_class_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_classes=20: one-shot .* leave num_classes out"):
        one_shot_settings(settings(num_classes=20))


@torch.no_grad()
def test_two_logits_say_the_probability_of_a_match_that_three_say() -> None:
    layer = model()(images((64, 96)), crops(1, batch=1)).detection.groups[0].layers[-1]
    two = matches_only(layer, "softmax")
    assert two.logits.shape[-1] == 2
    torch.testing.assert_close(two.logits.softmax(-1)[..., 0], layer.logits.softmax(-1)[..., 1])
    assert two.boxes is layer.boxes


@torch.no_grad()
def test_sigmoid_scores_keep_the_probability_of_a_match() -> None:
    """Two logits instead of three: a deformable transformer of pretraining says yes or no."""
    built = one_shot_detector(
        settings(num_classes=None, class_scores="sigmoid"), torch.Generator().manual_seed(0)
    )
    layer = built.eval()(images((64, 96)), crops(1, batch=1)).detection.groups[0].layers[-1]
    assert layer.logits.shape[-1] == 2
    two = matches_only(layer, "sigmoid").logits.softmax(-1)[..., 0]
    torch.testing.assert_close(two, layer.logits[..., MATCHES].sigmoid())
