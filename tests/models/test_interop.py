"""Weights of others, in and out."""

import argparse
import contextlib
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.backbone import Backbone
from models.detector import Detector
from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.detr import detr_name, detr_settings, load_detr, to_detr_names
from models.patch_queries import PatchDetector, QueryPatches
from tests.models.test_backbone import filled_backbone
from tests.models.test_backbone import settings as backbone_settings
from tests.models.test_detector import detector, images, settings


def resnet18_tensors() -> dict[str, Tensor]:
    return dict(filled_backbone(backbone_settings()).body.state_dict())


def swav_file(folder: Path) -> Path:
    """As published: parallel prefix, projection head, prototypes, BatchNorm's counters."""
    tensors = {f"module.{name}": tensor for name, tensor in resnet18_tensors().items()}
    for name in ("projection_head.0.weight", "projection_head.0.bias", "prototypes.weight"):
        tensors[f"module.{name}"] = torch.ones(2)
    tensors["module.bn1.num_batches_tracked"] = torch.tensor(7)
    torch.save(tensors, folder / "swav.pth.tar")
    return folder / "swav.pth.tar"


def loaded_from(source: str, **changes: object) -> Backbone:
    backbone = Backbone(backbone_settings(**({"weights": source} | changes)))  # type: ignore[arg-type]
    load_backbone(backbone)
    return backbone


def test_swavs_file_loads_and_its_heads_are_left_out_by_name(tmp_path: Path) -> None:
    backbone = Backbone(backbone_settings(weights=str(swav_file(tmp_path))))
    report = load_backbone(backbone)
    assert len(report.loaded) == len(backbone.state_dict()) == 100
    assert report.new == report.reshaped == ()
    assert set(report.left_out) == {
        *("projection_head.0.weight", "projection_head.0.bias"),
        *("prototypes.weight", "bn1.num_batches_tracked"),
    }
    assert torch.equal(backbone.body.conv1.weight, resnet18_tensors()["conv1.weight"])


def test_torchvision_names_load_from_every_kind_of_file(tmp_path: Path) -> None:
    tensors = resnet18_tensors()
    with_head = tensors | {"fc.weight": torch.ones(3, 512), "fc.bias": torch.ones(3)}
    torch.save(with_head, tmp_path / "bare.pth")
    torch.save({"state_dict": with_head, "epoch": 3}, tmp_path / "wrapped.pth")
    safetensors.torch.save_file(with_head, tmp_path / "timm.safetensors")
    with fsspec.open("memory://weights/bare.pth", "wb") as file:
        file.write((tmp_path / "bare.pth").read_bytes())
    for source in (
        *(tmp_path / "bare.pth", tmp_path / "wrapped.pth", tmp_path / "timm.safetensors"),
        *("memory://weights/bare.pth", (tmp_path / "bare.pth").as_uri()),
    ):
        loaded = loaded_from(str(source)).body.state_dict()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_half_precision_files_are_widened_and_layer4_may_be_absent(tmp_path: Path) -> None:
    kept = {name: t.half() for name, t in resnet18_tensors().items() if "layer4" not in name}
    torch.save(kept, tmp_path / "c4.pth")
    backbone = loaded_from(str(tmp_path / "c4.pth"), output="layer3")
    assert backbone.channels == 256
    assert backbone.body.conv1.weight.dtype == torch.float32


def test_layer4_of_a_whole_file_is_left_out_where_layer3_is_the_output(tmp_path: Path) -> None:
    torch.save(resnet18_tensors(), tmp_path / "whole.pth")
    backbone = Backbone(backbone_settings(weights=str(tmp_path / "whole.pth"), output="layer3"))
    assert all(name.startswith("layer4.") for name in load_backbone(backbone).left_out)


def test_the_real_stride_16_resnet50_loads_whole(shared_data: Path) -> None:
    file = shared_data / "weights" / "resnet50_in1k_conv1-layer3_fp16.pth"
    backbone = Backbone(
        backbone_settings("resnet50", weights=str(file), output="layer3", stride_in_1x1=True)
    )
    report = load_backbone(backbone)
    assert len(report.loaded) == 43 * 5
    assert report.left_out == ()


def test_one_error_lists_what_is_missing_unexpected_and_misshapen(tmp_path: Path) -> None:
    tensors = resnet18_tensors()
    del tensors["layer2.0.conv1.weight"]
    tensors["layer9.weight"] = torch.ones(1)
    tensors["conv1.weight"] = torch.ones(64, 3, 3, 3)
    torch.save(tensors, tmp_path / "odd.pth")
    complaint = (
        r"odd.pth does not fit the model: 1 missing: layer2.0.conv1.weight; "
        r"1 unexpected: layer9.weight; "
        r"1 of another shape: conv1.weight \(64, 3, 3, 3\) for \(64, 3, 7, 7\)"
    )
    with pytest.raises(WeightsError, match=complaint):
        loaded_from(str(tmp_path / "odd.pth"))


def test_a_deeper_resnet_does_not_pass_for_a_shallower_one(tmp_path: Path) -> None:
    torch.save(filled_backbone(backbone_settings("resnet34")).body.state_dict(), tmp_path / "34")
    with pytest.raises(WeightsError, match=r"80 unexpected: .* and 68 more"):
        loaded_from(str(tmp_path / "34"))


def test_random_weights_are_asked_for_by_name_and_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        report = load_backbone(Backbone(backbone_settings(weights="random")))
    assert "frozen resnet18 backbone has random weights" in caplog.text
    assert len(report.new) == 100


def test_files_that_hold_no_state_dict_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "numbers.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    torch.save({"model": {}, "args": SimpleNamespace(lr=1e-4)}, tmp_path / "args.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "word.pth").write_text("hello")
    (tmp_path / "bytes.pth").write_bytes(b"\x80\x02X\x02\x00\x00\x00\xff\xfe.")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(b"\x08\x00")
    for name, complaint in (
        ("numbers.pth", "besides tensors it holds epoch, loss"),
        ("list.pth", "holds a list"),
        ("code.pth", "holds no plain tensors"),
        ("args.pth", r"\(Unsupported global: GLOBAL types.SimpleNamespace was not an allowed"),
        ("page.pth", r"holds no plain tensors that torch.load can read \(Unsupported operand"),
        ("word.pth", "holds no plain tensors"),
        ("bytes.pth", "holds no plain tensors"),
        ("empty.pth", "empty.pth is empty; fetch it again"),
        ("short.safetensors", "no.* whole safetensors file"),
    ):
        with pytest.raises(WeightsError, match=complaint) as caught:
            read_tensors(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_checkpoint_is_an_error_of_one_line_wherever_the_damage_is(
    tmp_path: Path,
) -> None:
    file, draws = tmp_path / "w.pth", random.Random(0)
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draws.randrange(len(damaged))] = draws.randrange(256)
        file.write_bytes(damaged[: draws.randrange(1, len(damaged))])
        with contextlib.suppress(WeightsError):
            read_tensors(str(file))


def test_a_signed_url_of_a_safetensors_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors?X-Amz-Signature=abc"
    save_file({"w": torch.ones(3)}, file)
    assert read_tensors(f"file://{file}")["w"].tolist() == [1, 1, 1]


def test_a_published_checkpoint_with_its_command_line_is_read(tmp_path: Path) -> None:
    tensors = to_detr_names(detector())
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1e-4), "epoch": 1}, file)
    assert set(read_tensors(str(file))) == set(tensors)


def test_public_names_of_a_pre_norm_pretraining_model() -> None:
    built = PatchDetector(
        settings(pre_norm=True, position="learned", num_queries=6),
        QueryPatches(num_patches=3),
        torch.Generator(),
    )
    names = {name: detr_name(name) for name in built.state_dict()}
    part = "detector.decoder.layers.1."
    assert names[f"{part}cross_attention.in_proj_weight"] == (
        "transformer.decoder.layers.1.multihead_attn.in_proj_weight"
    )
    assert names[f"{part}feedforward.widen.bias"] == "transformer.decoder.layers.1.linear1.bias"
    assert names["detector.encoder.norm.weight"] == "transformer.encoder.norm.weight"
    assert names["detector.backbone.body.bn1.bias"] == "backbone.0.body.bn1.bias"
    assert names["detector.learned_positions.rows.weight"] == "backbone.1.row_embed.weight"
    assert names["detector.queries.weight"] == "query_embed.weight"
    assert names["patch_projection.bias"] == "patch2query.bias"
    assert names["reconstruction.layers.1.weight"] == "feature_align.layers.1.weight"
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_an_exported_model_loads_again_and_says_its_architecture(pre_norm: bool) -> None:
    original = detector(seed=1, pre_norm=pre_norm, position="learned")
    tensors = to_detr_names(original)
    inferred = detr_settings(tensors, source="export", num_heads=2)
    assert inferred.model_copy(update={"backbone": original.settings.backbone}) == settings(
        pre_norm=pre_norm, position="learned"
    )
    again = Detector(original.settings, torch.Generator().manual_seed(2)).eval()
    report = load_detr(again, tensors, source="export")
    assert report.reshaped == ("input_projection.weight",)
    boxes = [model(images((64, 96))).groups[0].layers[-1].boxes for model in (original, again)]
    assert torch.equal(boxes[0], boxes[1])


def test_pre_norm_weights_in_a_post_norm_model_are_an_error_not_a_silent_loss() -> None:
    tensors = to_detr_names(detector(pre_norm=True))
    with pytest.raises(WeightsError, match=r"2 unexpected: transformer.encoder.norm.weight"):
        load_detr(detector(), tensors, source="file")


def test_finetuning_takes_a_pretrained_detector_but_its_class_head() -> None:
    pretrained = PatchDetector(
        settings(num_queries=6, num_classes=2), QueryPatches(num_patches=3), torch.Generator()
    )
    finetuned = detector(num_queries=6, num_classes=20)
    tensors = to_detr_names(pretrained)
    with pytest.raises(WeightsError, match=r"2 of another shape: class_embed.weight"):
        load_detr(finetuned, tensors, source="file")
    report = load_detr(finetuned, tensors, source="file", new=("class_head.*",))
    assert report.new == ("class_head.weight", "class_head.bias")
    assert {name.partition(".")[0] for name in report.left_out} == {
        *("patch2query", "feature_align", "class_embed"),
    }
    assert torch.equal(finetuned.queries.weight, pretrained.detector.queries.weight)


def test_tensors_of_something_else_are_no_detr() -> None:
    with pytest.raises(WeightsError, match=r"file is no DETR checkpoint: query_embed.weight, "):
        detr_settings(resnet18_tensors(), source="file")
