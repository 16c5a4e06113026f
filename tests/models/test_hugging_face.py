"""transformers' DETR, in and out: equal outputs both ways."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from models.detector import Detector
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.hugging_face import (
    from_hugging_face,
    hugging_face_classes,
    hugging_face_config,
    hugging_face_settings,
    to_hugging_face,
)
from models.structures import Classes, Images, LayerOutput
from tests.models.test_detector import detector, images, settings

SMALL = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 5,
    "num_labels": 3,
}
RESNET18 = {
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
RESNET50 = {
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "out_features": ["stage4"],
}


def their_model(backbone: dict[str, object], **changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    resnet = transformers.ResNetConfig(embedding_size=64, **backbone)
    config = transformers.DetrConfig(backbone_config=resnet, **{**SMALL, **changes})
    return transformers.DetrForObjectDetection(config).eval()


def saved(model: transformers.PreTrainedModel, folder: Path) -> dict[str, object]:
    model.save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def ours_of(folder: Path) -> Detector:
    """Built from a folder's files alone."""
    named = from_hugging_face(read_tensors(str(folder / "model.safetensors")))
    config = json.loads((folder / "config.json").read_text())
    told = hugging_face_settings(named, config, source="folder")
    exact = told.backbone.model_copy(update={"frozen_precision": "float32"})
    built = Detector(told.model_copy(update={"backbone": exact}), torch.Generator()).eval()
    named["input_projection.weight"] = named["input_projection.weight"].flatten(1)
    built.load_state_dict(named)
    return built


def said_by_ours(model: Detector, given: Images) -> LayerOutput:
    with torch.no_grad():
        return model(given).groups[0].layers[-1]


def said_by_theirs(model: transformers.PreTrainedModel, given: Images) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        said = model(given.pixels, pixel_mask=(~given.padding).long())
    return said.logits, said.pred_boxes


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        (RESNET18, {}),
        (RESNET18, {"position_embedding_type": "learned"}),
        (RESNET50 | {"downsample_in_bottleneck": True}, {}),
    ],
    ids=["resnet18", "learned positions", "resnet50 with its stride in 1x1"],
)
def test_what_transformers_saves_says_the_same_here(
    tmp_path: Path, backbone: dict[str, object], changes: dict[str, object]
) -> None:
    theirs = their_model(backbone, **changes)
    saved(theirs, tmp_path)
    given = images((64, 96), (96, 33))
    ours = said_by_ours(ours_of(tmp_path), given)
    logits, boxes = said_by_theirs(theirs, given)
    torch.testing.assert_close(ours.logits, logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.boxes, boxes, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "resnet18"},
        {"name": "resnet50"},
        {"name": "resnet50", "output": "layer3", "stride_in_1x1": True},
    ],
    ids=["resnet18", "resnet50", "layer3"],
)
def test_transformers_loads_what_we_write_and_says_the_same(
    tmp_path: Path, backbone: dict[str, object]
) -> None:
    exact = {"weights": "random", "frozen_precision": "float32", **backbone}
    ours = detector(seed=2, backbone=exact)
    tensors = to_hugging_face(ours.state_dict(), 16)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = hugging_face_config(ours.settings, Classes(("a", "b", "c"), (1, 4, 17)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, told = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(told.values())
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    given = images((64, 96), (96, 33))
    logits, boxes = said_by_theirs(theirs.eval(), given)
    wanted = said_by_ours(ours, given)
    torch.testing.assert_close(logits, wanted.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(boxes, wanted.boxes, atol=2e-6, rtol=0)


def test_names_out_are_those_of_their_own_files(tmp_path: Path) -> None:
    saved(their_model(RESNET18), tmp_path)
    theirs = read_tensors(str(tmp_path / "model.safetensors"))
    ours = to_hugging_face(from_hugging_face(theirs), 16)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_timms_backbone_has_torchvisions_names() -> None:
    """As in the files on the hub: `model.backbone.conv_encoder.model.layer1.0.conv1.weight`."""
    begin = "model.backbone.conv_encoder.model."
    named = from_hugging_face(
        {f"{begin}layer1.0.downsample.1.bias": torch.ones(2), f"{begin}bn1.weight": torch.ones(3)}
    )
    assert named.keys() == {
        *("backbone.body.layer1.0.downsample.1.bias", "backbone.body.bn1.weight")
    }


def test_a_configuration_that_this_detr_does_not_do_is_refused(tmp_path: Path) -> None:
    config = saved(their_model(RESNET18), tmp_path)
    named = from_hugging_face(read_tensors(str(tmp_path / "model.safetensors")))
    for change, complaint in (
        ({"model_type": "conditional_detr"}, "model_type='conditional_detr', .* needs 'detr'"),
        ({"activation_function": "gelu"}, "activation_function='gelu'"),
        ({"decoder_attention_heads": 4}, "decoder_attention_heads=4, this DETR needs 2"),
    ):
        with pytest.raises(WeightsError, match=complaint):
            hugging_face_settings(named, config | change, source="folder")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pre_norm": True}, "pre_norm=true"),
        (
            {"backbone": {"name": "resnet50", "weights": "random", "dilation": True}},
            "backbone.dilation=true without timm",
        ),
    ],
)
def test_what_transformers_cannot_express_is_an_error(
    changes: dict[str, object], what: str
) -> None:
    with pytest.raises(WeightsError, match=f"cannot express {what}.*; export with format"):
        hugging_face_config(settings(**changes), None)


def test_classes_are_read_where_they_are_named_and_repeated_names_told_apart() -> None:
    named = {"id2label": {"0": "N/A", "1": "cat", "2": "N/A"}}
    assert hugging_face_classes(named, 3) == Classes(("N/A (0)", "cat", "N/A (2)"), (0, 1, 2))
    assert hugging_face_classes({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, 2) is None
    assert hugging_face_classes({"id2label": {"0": "cat"}}, 2) is None
    assert hugging_face_classes({}, 2) is None
