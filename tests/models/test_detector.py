"""The detector as a whole."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.structures import Images, padding_of


def settings(**changes: object) -> DetectorSettings:
    small: dict[str, object] = {
        "backbone": {"name": "resnet18", "weights": "random", "frozen_precision": "float32"},
        "hidden_dim": 16,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward_dim": 24,
        "num_queries": 5,
        "num_classes": 3,
    }
    return DetectorSettings.model_validate(small | changes)


def detector(seed: int = 0, **changes: object) -> Detector:
    return Detector(settings(**changes), torch.Generator().manual_seed(seed)).eval()


def images(*sizes: tuple[int, int]) -> Images:
    heights_widths = torch.tensor(sizes)
    height, width = heights_widths.amax(0).tolist()
    padding = padding_of(heights_widths, height, width)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(sizes), 3, height, width, generator=generator)
    return Images(pixels * ~padding[:, None], padding, heights_widths)


def test_every_layer_says_logits_and_boxes_for_every_query() -> None:
    said = detector()(images((64, 96), (96, 32)))
    (group,) = said.groups
    assert [tuple(layer.logits.shape) for layer in group.layers] == [(2, 5, 4)] * 2
    assert all(((layer.boxes > 0) & (layer.boxes < 1)).all() for layer in group.layers)
    assert said.memory.spatial_shapes == ((3, 3),)
    assert said.memory.tokens.shape == (2, 9, 16)


def test_memory_knows_which_part_of_the_batch_is_the_picture() -> None:
    memory = detector().encode(images((64, 96), (96, 32)))
    wanted = [[[0, 0, 0], [0, 0, 0], [1, 1, 1]], [[0, 1, 1], [0, 1, 1], [0, 1, 1]]]
    assert memory.padding.view(2, 3, 3).int().tolist() == wanted
    torch.testing.assert_close(memory.valid_ratios, torch.tensor([[[2 / 3, 1.0]], [[1.0, 1 / 3]]]))


def test_the_same_generator_gives_the_same_weights_whatever_the_global_one() -> None:
    first = detector(seed=3).state_dict()
    torch.rand(7)
    second = detector(seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = detector(seed=4).state_dict()
    assert not torch.equal(first["queries.weight"], other["queries.weight"])


def test_every_trainable_weight_is_drawn_from_the_generator() -> None:
    for name, tensor in detector(position="learned", pre_norm=True).named_parameters():
        constant = ("bias" in name and "attention" in name) or "norm" in name
        assert constant or float(tensor.detach().std()) > 0, name


def test_heads_stay_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        (group,) = detector()(images((64, 96))).groups
    assert group.layers[-1].boxes.dtype == torch.float32
    assert group.layers[-1].logits.dtype == torch.float32


def test_what_autocast_computes_is_close_to_float32() -> None:
    model, batch = detector(), images((64, 96))
    with torch.no_grad():
        plain = model(batch).groups[0].layers[-1].boxes
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(batch).groups[0].layers[-1].boxes
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0.02)


def test_dropout_acts_in_training_only() -> None:
    model, batch = detector(dropout=0.5), images((64, 96))

    def boxes() -> Tensor:
        found: Tensor = model(batch).groups[0].layers[-1].boxes
        return found.detach()

    assert torch.equal(boxes(), boxes())
    model.train()
    assert not torch.equal(boxes(), boxes())


def test_every_trainable_weight_gets_a_gradient() -> None:
    model = detector(
        position="learned",
        backbone={"name": "resnet18", "weights": "random", "output": "layer3", "train": True},
    )
    layers = model(images((64, 96))).groups[0].layers
    total = torch.stack([layer.logits.square().sum() + layer.boxes.sum() for layer in layers])
    total.sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_dim": 18, "num_heads": 4}, "hidden_dim=18 cannot be shared evenly.*=128"),
        ({"hidden_dim": 18, "num_heads": 2}, "hidden_dim=18 must be a multiple of 4.*=20"),
        ({"num_head": 4}, "num_head"),
    ],
)
def test_wrong_settings_name_the_key_and_the_way_out(
    changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(**changes)
