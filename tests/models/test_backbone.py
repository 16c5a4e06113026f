"""The ResNet against torchvision's, and its frozen path against the plain one."""

import copy

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import Backbone, BackboneSettings, feature_padding, frozen_dtype
from models.initialise import initialise
from models.resnet import FrozenBatchNorm, ResNetName


def settings(name: ResNetName = "resnet18", **changes: object) -> BackboneSettings:
    plain = {"name": name, "weights": "random", "frozen_precision": "float32"}
    return BackboneSettings.model_validate(plain | changes)


def filled_backbone(of: BackboneSettings) -> Backbone:
    """Random weights, and BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    backbone = Backbone(of)
    initialise(backbone, generator)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm):
            for constants in (module.weight, module.running_var):
                constants.uniform_(0.5, 1.5, generator=generator)
            for constants in (module.bias, module.running_mean):
                constants.normal_(0, 0.1, generator=generator)
    return backbone


def plain_network(backbone: Backbone) -> nn.Sequential:
    """torchvision's network with the weights of ours: convolution, then BatchNorm, in float32."""
    of = backbone.settings
    match of.name:
        case "resnet18":
            network = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
        case _:
            network = torchvision.models.resnet50(
                weights=None,
                norm_layer=FrozenBatchNorm2d,
                replace_stride_with_dilation=[False, False, of.dilation],
            )
    for module in network.modules():
        if of.stride_in_1x1 and isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    network.load_state_dict(backbone.body.state_dict(), strict=False)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    last = nn.Identity() if of.output == "layer3" else network.layer4
    return nn.Sequential(stem, network.layer1, network.layer2, network.layer3, last)


def picture(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "of",
    [
        settings("resnet18"),
        settings("resnet50", dilation=True),
        settings("resnet50", stride_in_1x1=True, output="layer3"),
    ],
    ids=["resnet18", "dc5", "c4 with the stride in the 1x1"],
)
def test_features_equal_torchvisions_plain_float32_network(of: BackboneSettings) -> None:
    backbone = filled_backbone(of)
    wanted = plain_network(backbone)(picture()).detach()
    found = backbone(picture())
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_frozen_features_in_bfloat16_stay_within_two_percent_of_plain_float32() -> None:
    """Measured: 1.1 % of the features' size, on a random ResNet-50."""
    backbone = filled_backbone(settings("resnet50", frozen_precision="bfloat16"))
    wanted = plain_network(backbone)(picture()).detach()
    found = backbone(picture())
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.02


def test_a_trained_backbone_has_torchvisions_gradients() -> None:
    backbone = filled_backbone(settings("resnet18", train=True))
    network = plain_network(backbone)
    backbone(picture(32, 64)).square().mean().backward()
    network(picture(32, 64)).square().mean().backward()
    ours = backbone.body.get_parameter("layer3.0.conv2.weight").grad
    theirs = network.get_parameter("3.0.conv2.weight").grad
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("train", [False, True])
def test_levels_end_with_what_forward_gives_at_strides_8_16_32(train: bool) -> None:
    backbone = filled_backbone(settings("resnet50", train=train))
    levels = backbone.levels(picture(64, 96), 3)
    shapes = [tuple(level.shape[1:]) for level in levels]
    assert shapes == [(512, 8, 12), (1024, 4, 6), (2048, 2, 3)]
    assert backbone.level_channels(3) == (512, 1024, 2048)
    assert torch.equal(levels[-1], backbone(picture(64, 96)))
    assert [level.requires_grad for level in levels] == [train] * 3


def test_levels_are_stages_of_the_plain_network_counted_from_the_output() -> None:
    backbone = filled_backbone(settings("resnet18", output="layer3"))
    shallow, deep = backbone.levels(picture(32, 64), 2)
    wanted = plain_network(backbone)[:3](picture(32, 64)).detach()
    torch.testing.assert_close(shallow, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert backbone.level_channels(2) == (shallow.shape[1], deep.shape[1]) == (128, 256)


@pytest.mark.parametrize("count", [0, 4])
def test_more_levels_than_stages_are_refused(count: int) -> None:
    backbone = Backbone(settings("resnet18", output="layer3"))
    with pytest.raises(ValueError, match="output=layer3, which has 1 to 3"):
        backbone.levels(picture(32, 64), count)
    with pytest.raises(ValueError, match=f"{count} levels were asked of a resnet18"):
        backbone.level_channels(count)


def test_detr_trains_layer2_to_layer4_and_a_frozen_backbone_nothing() -> None:
    trained = Backbone(settings(train=True))
    stages = {
        name.split(".")[1] for name, tensor in trained.named_parameters() if tensor.requires_grad
    }
    assert stages == {"layer2", "layer3", "layer4"}
    assert not any(tensor.requires_grad for tensor in Backbone(settings()).parameters())


def test_frozen_features_have_no_graph_even_for_pixels_that_want_one() -> None:
    pixels = picture(32, 64).requires_grad_()
    assert not filled_backbone(settings())(pixels).requires_grad


def test_autocast_does_not_change_the_precision_of_frozen_features() -> None:
    backbone = filled_backbone(settings())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbone(picture(32, 64)), backbone(picture(32, 64)).float())


def test_folded_weights_are_no_part_of_the_state() -> None:
    backbone = filled_backbone(settings())
    before = list(backbone.state_dict())
    backbone(picture(32, 64))
    assert list(backbone.state_dict()) == before
    assert len(before) == 20 + 20 * 4


def test_folded_weights_follow_every_change_of_the_weights() -> None:
    backbone = filled_backbone(settings())
    other = Backbone(settings())
    initialise(other, torch.Generator().manual_seed(5))
    first, wanted = backbone(picture(32, 64)), other(picture(32, 64))
    assert not torch.equal(first, wanted)
    backbone.load_state_dict(other.state_dict())
    assert torch.equal(backbone(picture(32, 64)), wanted)
    backbone.body.bn1.bias.add_(1.0)
    assert not torch.equal(backbone(picture(32, 64)), wanted)
    backbone.body.bn1.bias.sub_(1.0)
    backbone.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(backbone(picture(32, 64)), wanted)
    assert torch.equal(copy.deepcopy(other)(picture(32, 64)), wanted)


def test_unchanged_weights_are_folded_once() -> None:
    backbone = filled_backbone(settings())
    assert backbone.fold() is backbone.fold()


def test_automatic_precision_is_bfloat16_only_where_the_hardware_has_it() -> None:
    capabilities = torch.cpu.get_capabilities()
    has_it = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    wanted = torch.bfloat16 if has_it else torch.float32
    assert frozen_dtype("auto", torch.device("cpu")) == wanted
    assert frozen_dtype("auto", torch.device("meta")) == torch.float32
    assert frozen_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_the_padding_of_features_is_that_of_the_nearest_pixel() -> None:
    padding = torch.zeros(1, 4, 6, dtype=torch.bool)
    padding[:, :, 3:] = True
    padding[:, 3:] = True
    assert feature_padding(padding, 2, 3).int().tolist() == [[[0, 0, 1], [0, 0, 1]]]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "resnet18", "dilation": True}, "dilation=true needs bottleneck blocks"),
        ({"name": "resnet34", "stride_in_1x1": True}, "stride_in_1x1=true needs bottleneck"),
        ({"dilation": True, "output": "layer3"}, "changes layer4 alone"),
    ],
)
def test_impossible_resnets_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        BackboneSettings.model_validate({"weights": "random"} | changes)
