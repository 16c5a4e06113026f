"""Checkpoints of Deformable and Sparse DETR, in and out."""

import argparse
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from models.backbone import BackboneSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError, read_checkpoint
from models.interop.deformable import (
    from_deformable,
    layout_of,
    load_deformable,
    our_name,
    public_layout,
    public_names,
    to_deformable_names,
)
from models.interop.deformable_settings import deformable_settings
from models.interop.recognise import recognise
from models.resnet import ResNetName
from models.selection import SelectionSettings
from models.swin import SwinName
from tests.models.test_detector import images
from tests.parity import formula

MANIFESTS = Path(__file__).parents[1] / "parity" / "manifests"

SMALL = DetectorSettings(
    backbone=BackboneSettings(name="resnet18", weights="random", frozen_precision="float32"),
    hidden_dim=32,
    num_heads=8,
    encoder_layers=3,
    decoder_layers=2,
    feedforward_dim=48,
    num_queries=7,
    num_classes=3,
    class_scores="sigmoid",
    encoder_attention="deformable",
    decoder_attention="deformable",
    feature_levels=4,
    encoder_points=2,
    decoder_points=3,
)
REFINED = SMALL.model_copy(update={"box_refinement": True})
TWO_STAGE = REFINED.model_copy(update={"two_stage": True})
SPARSE = TWO_STAGE.model_copy(
    update={"proposal_content": "memory", "proposal_classes": "all", "rho": 0.3}
)
SINGLE_SCALE = SMALL.model_copy(update={"feature_levels": 1})
FIVE_LEVELS = SMALL.model_copy(update={"feature_levels": 5})


def detector(settings: DetectorSettings, seed: int = 1) -> Detector:
    return Detector(settings, torch.Generator().manual_seed(seed)).eval()


def public_tensors(settings: DetectorSettings) -> dict[str, Tensor]:
    """Values of no two tensors alike, so that nothing passes for a copy by chance."""
    return dict(_public_tensors(settings))


@lru_cache
def _public_tensors(settings: DetectorSettings) -> dict[str, Tensor]:
    filled = detector(settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return to_deformable_names(filled.state_dict(), settings)


@pytest.mark.parametrize(
    "manifest",
    [
        *("deformable_detr_r50", "deformable_detr_r50_refine", "deformable_detr_r50_two_stage"),
        *("sparse_detr_r50", "sparse_detr_swin_t"),
    ],
)
def test_every_official_tensor_comes_in_once_and_goes_out_under_all_its_names(
    manifest: str,
) -> None:
    entries = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    made = formula.weights(MANIFESTS / f"{manifest}.json", {})
    theirs = {name: torch.from_numpy(np.asarray(value)) for name, value in made.items()}
    settings, _ = deformable_settings(theirs, source=manifest)
    ours, _ = from_deformable(theirs, source=manifest)
    again = to_deformable_names(ours, settings)
    assert again.keys() == entries.keys()
    for name, entry in entries.items():
        assert list(again[name].shape) == entry["shape"], name
        assert str(again[name].dtype) == f"torch.{entry['dtype'].removeprefix('computed:')}", name
        assert name not in theirs or torch.equal(again[name], theirs[name]), name
    layout = layout_of(settings)
    for name in ours:
        first, *copies = public_names(name, layout)
        assert "alias_of" not in entries[first]
        assert all(entries[copy]["alias_of"] == first for copy in copies)
        assert all(our_name(public, layout) == name for public in (first, *copies))


def on_meta(settings: DetectorSettings) -> Detector:
    """Shapes and names without values."""
    with torch.device("meta"):
        return Detector(settings, torch.Generator())


def published(
    changes: Mapping[str, object] = MappingProxyType({}),
    *,
    backbone: ResNetName | SwinName = "resnet50",
    dilation: bool = False,
) -> DetectorSettings:
    """An architecture at its published size."""
    whole = {"feature_levels": 4, "feedforward_dim": 1024, "encoder_layers": 6, "decoder_layers": 6}
    sizes = {"hidden_dim": 256, "num_queries": 300, "num_classes": 91}
    points = {"encoder_points": 4, "decoder_points": 4}
    body = BackboneSettings(name=backbone, train=True, dilation=dilation)
    return SMALL.model_copy(update={**whole, **sizes, **points, "backbone": body, **changes})


ONE_LEVEL = {"feature_levels": 1}
REFINE = {"box_refinement": True}
PROPOSE = {"box_refinement": True, "two_stage": True}
EFFICIENT: dict[str, object] = {**PROPOSE, "proposal_content": "memory", "proposal_classes": "all"}


@pytest.mark.parametrize(
    ("settings", "names", "parameters", "trained"),
    [
        (published(), 561, 40_069_665, 39_847_265),
        (published(REFINE), 597, 40_849_660, 40_627_260),
        (published(PROPOSE), 630, 41_181_529, 40_959_129),
        (published(ONE_LEVEL), 549, 34_066_593, 33_844_193),
        (published(ONE_LEVEL, dilation=True), 549, 34_066_593, 33_844_193),
        (published({**EFFICIENT, "rho": 0.1}), 760, 41_937_205, 41_714_805),
        (published({**EFFICIENT, "rho": 0.5}, backbone="swin_t"), 682, 42_480_239, 42_176_153),
    ],
    ids=["plain", "refine", "two_stage", "single_scale", "dc5", "sparse", "sparse_swin"],
)
def test_published_architectures_have_the_names_and_parameters_of_the_public_code(
    settings: DetectorSettings, names: int, parameters: int, trained: int
) -> None:
    made = on_meta(settings)
    assert len(to_deformable_names(empty(made), settings)) == names
    assert sum(tensor.numel() for tensor in made.parameters()) == parameters
    assert sum(t.numel() for t in made.parameters() if t.requires_grad) == trained


@pytest.mark.parametrize(
    ("settings", "names", "millions"),
    [
        (published(EFFICIENT), 630, "41.05"),
        (published(backbone="swin_t"), 483, "40.61"),
        (published(EFFICIENT, backbone="swin_t"), 552, "41.59"),
    ],
    ids=["efficient", "deformable_swin", "efficient_swin"],
)
def test_forms_of_the_sparse_repository_without_a_scorer_have_its_names(
    settings: DetectorSettings, names: int, millions: str
) -> None:
    made = on_meta(settings)
    assert len(to_deformable_names(empty(made), settings)) == names
    assert f"{sum(tensor.numel() for tensor in made.parameters()) / 1e6:.2f}" == millions


def empty(made: Detector) -> dict[str, Tensor]:
    """The names alone."""
    return {name: torch.empty(0) for name in made.state_dict()}


@pytest.mark.parametrize(
    "settings",
    [SMALL, REFINED, TWO_STAGE, SPARSE, SINGLE_SCALE, FIVE_LEVELS],
    ids=["plain", "refine", "two_stage", "sparse", "single_scale", "five_levels"],
)
def test_an_exported_detector_is_recognised_and_says_the_same(settings: DetectorSettings) -> None:
    tensors = public_tensors(settings)
    arguments = {"nheads": 8, "dilation": False, "num_queries": 7, "rho": 0.3}
    arguments["eff_specific_head"] = settings.proposal_classes == "all"
    inferred, guessed = deformable_settings(tensors, source="export", arguments=arguments)
    assert inferred.model_copy(update={"backbone": settings.backbone}) == settings
    assert guessed == ()
    again = detector(settings, seed=2)
    report = load_deformable(again, tensors, source="export")
    assert (report.new, report.left_out, report.reshaped) == ((), (), ())
    first = detector(settings)
    first.load_state_dict(from_deformable(tensors, source="export")[0])
    boxes = [model(images((160, 192))).groups[0].layers[-1].boxes for model in (first, again)]
    assert torch.equal(boxes[0], boxes[1])


def test_what_the_tensors_cannot_tell_is_guessed_and_listed() -> None:
    tensors = public_tensors(SPARSE)
    found = recognise(tensors, {}, "sparse.pth")
    assert found.detector.rho == 0.3
    assert found.detector.num_queries == 300
    assert found.guessed == (
        *("num_heads", "rho", "backbone.dilation", "proposal_classes", "num_queries"),
    )
    told = recognise(tensors, {}, "sparse.pth", arguments={"rho": 0.1, "nheads": 4})
    assert (told.detector.rho, told.detector.num_heads) == (0.1, 4)
    assert told.detector.encoder_points == 4
    assert told.guessed == ("backbone.dilation", "proposal_classes", "num_queries")


def test_a_public_file_with_its_command_line_and_counters_is_read(tmp_path: Path) -> None:
    tensors = public_tensors(SPARSE)
    counters = {"transformer.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    arguments = argparse.Namespace(rho=0.4, nheads=8, eff_specific_head=False, num_queries=7)
    content = {"model": tensors | counters, "args": arguments, "epoch": 49, "optimizer": {}}
    torch.save(content, tmp_path / "sparse.pth")
    file = read_checkpoint(str(tmp_path / "sparse.pth"))
    assert file.arguments == vars(arguments)
    found = recognise(file.tensors, {}, "sparse.pth", arguments=file.arguments)
    assert (found.detector.rho, found.detector.proposal_classes) == (0.4, "binary")
    assert not any("total" in name for name in found.tensors)
    assert found.notes == (
        "56 tensors of the file are copies under further names, and agree: "
        "bbox_embed, class_embed, transformer.decoder.bbox_embed, transformer.decoder.class_embed",
    )


def test_a_head_of_91_classes_is_cocos_and_says_that_this_is_a_guess() -> None:
    found = recognise(public_tensors(SMALL.model_copy(update={"num_classes": 91})), {}, "x.pth")
    assert found.classes is not None
    assert found.classes.names[18] == "dog"
    assert "classes" in found.guessed


@pytest.mark.parametrize(
    ("settings", "copy"),
    [
        (SMALL, "class_embed.1.bias"),
        (REFINED, "bbox_embed.1.layers.2.bias"),
        (SPARSE, "transformer.decoder.class_embed.4.weight"),
    ],
)
def test_copies_that_differ_are_one_clear_line(settings: DetectorSettings, copy: str) -> None:
    tensors = public_tensors(settings)
    tensors[copy] = tensors[copy] + 1
    with pytest.raises(WeightsError, match=f"x.pth: .*{copy}.* must be a copy of") as caught:
        from_deformable(tensors, source="x.pth")
    assert "\n" not in str(caught.value)


def test_heads_of_which_some_are_shared_and_some_are_not_are_refused() -> None:
    tensors = public_tensors(SMALL.model_copy(update={"decoder_layers": 3}))
    tensors["bbox_embed.2.layers.0.weight"] = tensors["bbox_embed.2.layers.0.weight"] + 1
    with pytest.raises(WeightsError, match=r"some of the box heads bbox_embed.0 to bbox_embed.2"):
        public_layout(tensors, source="x.pth")


@pytest.mark.parametrize("settings", [SMALL, REFINED, TWO_STAGE, SPARSE])
def test_a_file_whose_copies_were_taken_out_is_recognised(settings: DetectorSettings) -> None:
    """As safetensors keep shared tensors: under the first of their names by the alphabet."""
    tensors = public_tensors(settings)
    layout = layout_of(settings)
    kept = {min(public_names(our_name(name, layout), layout)): t for name, t in tensors.items()}
    assert len(kept) < len(tensors)
    assert public_layout(kept, source="x") == layout
    ours, repeated = from_deformable(kept, source="x")
    assert repeated == ()
    assert ours.keys() == detector(settings).state_dict().keys()


def test_a_cut_file_is_named() -> None:
    tensors = public_tensors(SMALL)
    del tensors["class_embed.0.weight"]
    with pytest.raises(
        WeightsError, match=r"x.pth is no Deformable DETR checkpoint: class_embed.0"
    ):
        recognise(tensors, {}, "x.pth")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"encoder_attention": "dense", "feature_levels": 1}, "encoder_attention=dense with deco"),
        (
            {"rho": 0.3, "selection": SelectionSettings(criterion="objectness")},
            "selection.criterion=objectness has no public names",
        ),
    ],
)
def test_what_the_public_code_has_no_names_for_is_refused(
    changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(WeightsError, match=complaint):
        to_deformable_names({}, TWO_STAGE.model_copy(update=changes))
