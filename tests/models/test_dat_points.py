"""The deformed points of a DAT and what looks at them, in pixels of a picture."""

import pytest
import torch
from torch import Tensor, nn

from models.backbone import Backbone, BackboneSettings
from models.dat_points import deformed_keys
from models.initialise import initialise


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Of three stages; its points lie where its cells do, and no key is liked better."""
    settings = BackboneSettings(
        name="dat_t", weights="random", output="layer3", reference_grid="aligned"
    )
    made = Backbone(settings)
    initialise(made, torch.Generator().manual_seed(0))
    for name, tensor in made.body.named_parameters():
        if name.endswith(("offsets.offset.weight", "bias_table", "key.weight", "key.bias")):
            nn.init.zeros_(tensor)
    return made


def picture() -> Tensor:
    return torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(7))


def test_points_are_in_the_pixels_of_the_picture(backbone: Backbone) -> None:
    layers = deformed_keys(backbone, picture())
    assert [(keys.stage, keys.block) for keys in layers] == [(2, 1), (2, 3), (2, 5)]
    middles = [[8 + 16 * row, 8 + 16 * column] for row in range(3) for column in range(5)]
    for keys in layers:
        assert keys.points_yx.shape == (3, 15, 2)
        assert torch.allclose(keys.reference_yx, torch.tensor(middles).float(), atol=1e-3)
        assert torch.allclose(keys.points_yx, keys.reference_yx.expand(3, -1, -1), atol=1e-3)


@pytest.mark.parametrize("at_yx", [None, (47.0, 0.0)])
def test_attention_sums_to_one_for_each_group(
    backbone: Backbone, at_yx: tuple[float, float] | None
) -> None:
    for keys in deformed_keys(backbone, picture(), at_yx):
        assert torch.allclose(keys.attention, torch.full((3, 15), 1 / 15), atol=1e-5)


def test_looking_leaves_the_backbone_as_it_was(backbone: Backbone) -> None:
    before = backbone(picture())
    modes = [part.training for part in backbone.modules()]
    deformed_keys(backbone, picture())
    assert [part.training for part in backbone.modules()] == modes
    assert not any(part._forward_pre_hooks for part in backbone.modules())
    assert torch.equal(backbone(picture()), before)


def test_other_networks_and_places_beside_the_picture_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"\(48.0, 0.0\) is not in the picture of 48x80 pixels"):
        deformed_keys(backbone, picture(), (48.0, 0.0))
    resnet = Backbone(BackboneSettings(name="resnet18", weights="random"))
    with pytest.raises(ValueError, match=r"name=resnet18 has no deformed points"):
        deformed_keys(resnet, picture())
