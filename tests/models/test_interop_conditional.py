"""Checkpoints of Conditional DETR and DAB-DETR, of their authors and of transformers."""

import argparse
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from models.artefact import Artefact
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError, read_checkpoint, read_tensors
from models.interop.conditional import (
    conditional_settings,
    from_conditional,
    load_conditional,
    our_name,
    public_names,
    to_conditional_names,
)
from models.interop.hugging_face_conditional import hugging_face_conditional_settings
from models.interop.recognise import recognise
from models.structures import LayerOutput
from tests.models.conditional_small import ANCHORS, CONDITIONAL, PATTERNS, drawn
from tests.models.test_detector import images
from tests.models.test_hugging_face import RESNET18, SMALL, said_by_theirs

MANIFESTS = Path(__file__).parents[1] / "parity" / "manifests"
LEARNED = CONDITIONAL | {"position": "learned"}
KINDS = pytest.mark.parametrize(
    "kind", [CONDITIONAL, LEARNED, PATTERNS], ids=["conditional", "learned positions", "anchors"]
)
ALIAS = "transformer.decoder.bbox_embed.layers.0.weight"


def manifest(name: str) -> dict[str, Tensor]:
    """Its tensors without their values."""
    entries = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: torch.zeros(1).expand(entry["shape"]) for key, entry in entries.items()}


def rebuilt(found: Artefact, seed: int = 9) -> LayerOutput:
    """What the detector of an artefact says."""
    exact = found.detector.backbone.model_copy(update={"frozen_precision": "float32"})
    settings = found.detector.model_copy(update={"backbone": exact})
    model = Detector(settings, torch.Generator().manual_seed(seed)).eval()
    state = model.state_dict()
    model.load_state_dict({n: t.reshape(state[n].shape) for n, t in found.tensors.items()})
    return said(model)


def said(model: Detector) -> LayerOutput:
    with torch.no_grad():
        return model(images((64, 96), (96, 33))).groups[0].layers[-1]


def equal(one: LayerOutput, other: LayerOutput) -> bool:
    return torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)


@pytest.mark.parametrize("name", ["conditional_detr_r50", "dab_detr_r50"])
def test_every_official_tensor_has_one_name_here_and_goes_out_under_all_its_own(name: str) -> None:
    tensors = manifest(name)
    anchors = name.startswith("dab")
    named, repeated = from_conditional(tensors, source=name)
    assert len(repeated) == (6 if anchors else 0)
    back = [public for ours in named for public in public_names(ours, anchors=anchors)]
    assert sorted(back) == sorted(tensors)
    settings, guessed = conditional_settings(tensors, source=name)
    assert (settings.num_queries, settings.num_classes, settings.hidden_dim) == (300, 91, 256)
    assert (settings.query_kind == "anchor", settings.activation) == (
        anchors,
        "prelu" if anchors else "relu",
    )
    assert guessed == ("num_heads", "backbone.dilation", *["position_temperature"] * anchors)


@KINDS
def test_what_we_write_for_the_public_code_comes_back_as_it_was(kind: dict[str, object]) -> None:
    model = drawn(kind, noise=0.1, num_heads=8)
    public = to_conditional_names(model.state_dict(), model.settings)
    assert public["input_proj.weight"].dim() == 4
    assert (ALIAS in public) == ("query_kind" in kind)
    found = recognise(public, {}, "file.pth")
    assert found.detector.num_patterns == model.settings.num_patterns
    assert equal(rebuilt(found), said(model))
    report = load_conditional(drawn(kind, num_heads=8), public, source="file.pth")
    assert (report.new, report.left_out) == ((), ())
    assert bool(report.notes) == ("query_kind" in kind)


def test_a_decoder_of_one_layer_leaves_out_what_scales_the_sines_of_others() -> None:
    model = drawn(CONDITIONAL, noise=0.1, num_heads=8, decoder_layers=1)
    public = to_conditional_names(model.state_dict(), model.settings)
    public |= {
        f"transformer.decoder.query_scale.layers.{layer}.{kind}": torch.zeros(16)
        for layer in (0, 1)
        for kind in ("weight", "bias")
    }
    assert equal(rebuilt(recognise(public, {}, "file.pth")), said(model))


def test_copies_of_the_box_head_must_agree() -> None:
    model = drawn(ANCHORS)
    public = to_conditional_names(model.state_dict(), model.settings)
    public[ALIAS] = public[ALIAS] + 1
    with pytest.raises(WeightsError, match=r"bbox_embed.* must be a copy of .*fetch it again"):
        recognise(public, {}, "file.pth")


def test_the_command_line_in_a_file_says_what_tensors_cannot(tmp_path: Path) -> None:
    """DC5's plain weights have temperature 10; nothing is unpickled but a Namespace."""
    model = drawn(ANCHORS, num_heads=4, position_temperature=10.0)
    public = to_conditional_names(model.state_dict(), model.settings)
    args = argparse.Namespace(nheads=4, dilation=False, pe_temperatureH=10, pe_temperatureW=10)
    torch.save({"model": public, "args": args, "epoch": 49}, tmp_path / "file.pth")
    file = read_checkpoint(str(tmp_path / "file.pth"))
    found = recognise(file.tensors, file.metadata, "file.pth", arguments=file.arguments)
    assert (found.detector.num_heads, found.detector.position_temperature) == (4, 10.0)
    assert found.guessed == ()
    assert equal(rebuilt(found), said(model))
    uneven = file.arguments | {"pe_temperatureW": 20}
    with pytest.raises(WeightsError, match="pe_temperatureH=10 and pe_temperatureW=20"):
        conditional_settings(public, source="file.pth", arguments=uneven)


def test_a_cut_or_other_file_is_told_by_what_is_missing() -> None:
    tensors = manifest("dab_detr_r50")
    del tensors["transformer.decoder.ref_anchor_head.layers.0.weight"]
    with pytest.raises(WeightsError, match=r"no whole checkpoint .*ref_anchor_head.* missing"):
        conditional_settings(tensors, source="file.pth")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"class_scores": "softmax"}, "class_scores=softmax with decoder_attention=conditional"),
        ({"activation": "relu"}, "query_kind=anchor, activation=relu"),
        ({"scale_positions": False}, "query_kind=anchor, scale_positions=false"),
    ],
)
def test_what_the_public_code_cannot_hold_is_refused(
    changes: dict[str, object], complaint: str
) -> None:
    settings = drawn(ANCHORS).settings.model_copy(update=changes)
    with pytest.raises(WeightsError, match=f"{complaint}.* format querypatch"):
        to_conditional_names({}, settings)


def test_unknown_names_stay_as_they_are() -> None:
    assert our_name("something.else", anchors=True) == "something.else"
    assert public_names("something.else", anchors=False) == ("something.else",)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("conditional", {}), ("conditional", {"decoder_layers": 1}), ("anchors", {"num_patterns": 2})],
    ids=["conditional", "one layer", "anchors"],
)
def test_what_transformers_saves_says_the_same_here(
    tmp_path: Path, kind: str, changes: dict[str, object]
) -> None:
    torch.manual_seed(3)
    small = dict(SMALL)
    if kind == "anchors":
        small["hidden_size"] = small.pop("d_model")
        make, config = transformers.DabDetrForObjectDetection, transformers.DabDetrConfig
    else:
        make = transformers.ConditionalDetrForObjectDetection
        config = transformers.ConditionalDetrConfig
    resnet = transformers.ResNetConfig(embedding_size=64, **RESNET18)
    theirs = make(config(backbone_config=resnet, **{**small, **changes})).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "backbone" not in name:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    theirs.save_pretrained(tmp_path)
    tensors = read_tensors(str(tmp_path / "model.safetensors"))
    told = json.loads((tmp_path / "config.json").read_text())
    found = recognise(tensors, {}, "folder", config=told)
    ours = rebuilt(found)
    logits, boxes = said_by_theirs(theirs, images((64, 96), (96, 33)))
    torch.testing.assert_close(ours.logits, logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.boxes, boxes, atol=2e-6, rtol=0)
    refused = partial(hugging_face_conditional_settings, found.tensors, source="folder")
    with pytest.raises(WeightsError, match=r"config\.json has activation_function='gelu'"):
        refused({"activation_function": "gelu"})


def test_settings_are_those_that_the_small_detectors_have() -> None:
    for kind in (CONDITIONAL, PATTERNS):
        model = drawn(kind, num_heads=8)
        public = to_conditional_names(model.state_dict(), model.settings)
        read, _ = conditional_settings(public, source="file.pth")
        same = read.model_copy(update={"backbone": model.settings.backbone})
        assert same == DetectorSettings.model_validate(model.settings.model_dump())
