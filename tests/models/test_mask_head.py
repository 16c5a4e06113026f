"""The mask head; that it equals the public code's is shown by tests/parity."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone, BackboneSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.panoptic import (
    detector_tensors,
    is_panoptic,
    load_panoptic,
    panoptic_settings,
    to_panoptic_names,
)
from models.interop.panoptic_classes import coco_panoptic_250
from models.mask_head import MaskHead, MaskSource, PanopticDetector
from models.matching import MatchingCosts
from tests.models.panoptic_small import SETTINGS, panoptic_detector, some_targets, two_pictures
from tests.parity import formula

PARITY = Path(__file__).parents[1] / "parity"


def test_the_last_of_the_stages_is_what_the_backbone_gives() -> None:
    settings = BackboneSettings(name="resnet18", weights="random", frozen_precision="float32")
    for output, strides in (("layer4", [4, 8, 16, 32]), ("layer3", [4, 8, 16])):
        chosen = settings.model_copy(update={"output": output})
        backbone = Backbone(chosen)
        pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        stages = backbone.stages(pixels)
        assert torch.equal(stages[-1], backbone(pixels))
        assert [96 // stage.shape[3] for stage in stages] == strides
        assert [stage.shape[1] for stage in stages] == [64, 128, 256, 512][: len(stages)]


def test_stages_of_a_trained_backbone_carry_gradients() -> None:
    backbone = Backbone(BackboneSettings(name="resnet18", weights="random", train=True))
    torch.autograd.backward(backbone.stages(torch.ones(1, 3, 32, 32))[1].sum())
    parameters = dict(backbone.body.named_parameters())
    assert parameters["layer2.0.conv1.weight"].grad is not None
    assert parameters["layer1.0.conv1.weight"].grad is None


def test_masks_of_some_queries_are_those_of_all_queries_selected() -> None:
    model = panoptic_detector()
    source = model.detect(two_pictures())
    picture, query = torch.tensor([1, 0, 1]), torch.tensor([6, 2, 0])
    some = model.masks(source, picture, query)
    everything = _masks_of_all(model, source)
    assert torch.allclose(some, everything[picture, query], atol=1e-6)

    weight = torch.randn(some.shape, generator=torch.Generator().manual_seed(1))
    fast = torch.autograd.grad((some * weight).sum(), _trained(model), retain_graph=True)
    slow = torch.autograd.grad((everything[picture, query] * weight).sum(), _trained(model))
    for ours, defined in zip(fast, slow, strict=True):
        assert torch.allclose(ours, defined, atol=1e-4 * (1 + float(defined.abs().max())))


def test_the_shared_first_convolution_is_that_of_the_joined_channels() -> None:
    head = MaskHead(128, 8, (256, 128, 64))
    projected = torch.randn(2, 128, 3, 5, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(3, 8, 3, 5, generator=torch.Generator().manual_seed(1))
    picture = torch.tensor([1, 1, 0])
    first = head.convolutions[0]
    assert isinstance(first, nn.Conv2d)
    joined = torch.cat((projected[picture], attention), dim=1)
    plain = F.conv2d(joined, first.weight, first.bias, padding=1)
    assert torch.allclose(head._first(projected, attention, picture), plain, atol=1e-5)


@pytest.mark.parametrize("over", ["positions", "heads_and_positions"])
def test_attention_sums_to_one_over_what_the_settings_say(over: str) -> None:
    model = panoptic_detector("positions" if over == "positions" else "heads_and_positions")
    attention = model.detect(two_pictures()).attention
    axes = (3, 4) if over == "positions" else (2, 3, 4)
    sums = attention.sum(axes)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert (attention[1, :, :, :, 2:] > 0).all()


def test_nothing_of_the_detector_is_trained() -> None:
    model = panoptic_detector()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"attention", "mask_head"}


def test_without_targets_there_is_one_mask_and_a_whole_graph() -> None:
    model = panoptic_detector()
    found = model(two_pictures(), some_targets(0, 0), MatchingCosts())
    assert found.matching.pairs_per_layer == 0
    assert found.logits.shape == (1, 16, 24)
    torch.autograd.backward(found.logits.sum())
    assert all(parameter.grad is not None for parameter in _trained(model))


def test_there_is_a_mask_at_stride_4_for_each_matched_pair() -> None:
    found = panoptic_detector()(two_pictures(), some_targets(3, 1), MatchingCosts())
    assert found.logits.shape == (4, 16, 24)
    assert found.matching.picture.tolist() == [0, 0, 0, 1]


def test_a_width_that_groups_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_dim=64 and num_heads=8 do not fit"):
        MaskHead(64, 8, (256, 128, 64))


def test_a_mask_head_works_on_the_features_of_layer3() -> None:
    backbone = SETTINGS.backbone.model_copy(update={"output": "layer3"})
    model = panoptic_detector(settings=SETTINGS.model_copy(update={"backbone": backbone}))
    found = model(two_pictures(), some_targets(1, 0), MatchingCosts())
    assert found.logits.shape == (1, 16, 24)


def test_official_tensors_come_back_byte_for_byte() -> None:
    made = formula.weights(PARITY / "manifests" / "panoptic_detr_r50.json", {})
    tensors = {key: torch.from_numpy(value) for key, value in made.items()}
    settings, _ = panoptic_settings(tensors, source="formula")
    assert (settings.num_heads, settings.num_classes) == (8, 250)
    model = panoptic_detector(settings=settings)
    report = load_panoptic(model, tensors, source="formula")
    assert report.new == report.left_out == ()
    back = to_panoptic_names(model)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("pre_norm", "over"), [(False, "heads_and_positions"), (True, "positions")]
)
def test_the_softmax_of_public_files_is_that_of_their_family(pre_norm: bool, over: str) -> None:
    model = panoptic_detector(settings=SETTINGS.model_copy(update={"pre_norm": pre_norm}))
    tensors = to_panoptic_names(model)
    settings, head = panoptic_settings(tensors, source="small.pth")
    assert is_panoptic(tensors)
    assert settings.pre_norm is pre_norm
    assert head.softmax_over == over


def test_a_detector_without_a_mask_head_is_named() -> None:
    tensors = detector_tensors(to_panoptic_names(panoptic_detector()))
    with pytest.raises(WeightsError, match=r"a\.pth holds no mask head"):
        panoptic_settings(tensors, source="a.pth")


def test_the_published_heads_have_cocos_names_at_their_ids() -> None:
    classes = coco_panoptic_250()
    assert len(set(classes.names)) == 250
    assert [classes.names[id] for id in (1, 90, 92, 100, 184, 200)] == [
        *("person", "toothbrush", "banner", "cardboard", "tree-merged", "rug-merged"),
    ]
    assert sum(not name.startswith("N/A") for name in classes.names) == 133
    assert classes.things is not None
    assert classes.things[90]
    assert not classes.things[92]


def _masks_of_all(model: PanopticDetector, source: MaskSource) -> Tensor:
    queries = torch.arange(source.attention.shape[1])
    pictures = range(len(source.attention))
    return torch.stack(
        [model.masks(source, torch.full_like(queries, picture), queries) for picture in pictures]
    )


def _trained(model: PanopticDetector) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
