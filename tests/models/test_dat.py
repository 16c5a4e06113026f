"""DAT and DAT++ as backbones: pictures of any size, what is trained, and their authors' files.

Their maps, logits and gradients are compared with the public code's in `tests/parity`.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.ops import StochasticDepth

from models.backbone import Backbone, BackboneName, BackboneSettings
from models.classifier import Classifier
from models.dat import Dat, DatName, dat_layout
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.flops import count_classifier
from models.initialise import initialise
from models.interop.backbones import file_names, load_backbone
from models.interop.checkpoint_files import WeightsError
from models.interop.classifiers import classifier_name, load_classifier
from models.interop.deformable import to_deformable_names
from models.interop.detr import refuse_nameless
from models.interop.hugging_face import hugging_face_config
from models.windows import relative_position_index
from tests.models.test_detector import images

TINY = {"encoder_layers": 1, "decoder_layers": 1, "num_classes": 3, "num_queries": 5}


def settings(name: BackboneName = "dat_t", **changes: object) -> BackboneSettings:
    plain = {"name": name, "weights": "random", "frozen_precision": "float32"}
    return BackboneSettings.model_validate(plain | changes)


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    backbone = Backbone(settings(), num_levels=4)
    initialise(backbone, torch.Generator().manual_seed(0))
    return backbone


def picture(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(7))


def test_levels_have_strides_4_to_32_and_pictures_any_size(frozen: Backbone) -> None:
    shapes = [tuple(level.shape[1:]) for level in frozen.levels(picture(70, 100), 4)]
    assert shapes == [(96, 18, 25), (192, 9, 13), (384, 5, 7), (768, 3, 4)]
    assert frozen.level_channels(3) == (192, 384, 768)
    assert torch.equal(frozen.levels(picture(70, 100), 2)[-1], frozen(picture(70, 100)))
    assert frozen(picture(3, 5)).shape == (1, 768, 1, 1)


def test_levels_of_the_second_version_have_the_same_sizes() -> None:
    backbone = Backbone(settings("dat_pp_t"))
    initialise(backbone, torch.Generator().manual_seed(0))
    shapes = [tuple(level.shape[1:]) for level in backbone.levels(picture(70, 100), 4)]
    assert shapes == [(64, 18, 25), (128, 9, 13), (256, 5, 7), (512, 3, 4)]


def test_every_level_leaves_through_a_norm_of_its_own(frozen: Backbone) -> None:
    for level in frozen.levels(picture(64, 64), 4):
        assert torch.allclose(level.mean(1), torch.zeros(()), atol=1e-5)
        assert torch.allclose(level.var(1, unbiased=False), torch.ones(()), atol=1e-2)


def test_filling_up_changes_nothing_where_zeros_were_there_already(frozen: Backbone) -> None:
    """Sizes are rounded up to whole patches and even maps with zeros, not cut off."""
    short = picture(61, 64)
    whole = torch.nn.functional.pad(short, (0, 0, 0, 3))
    assert torch.allclose(frozen.levels(short, 4)[0], frozen.levels(whole, 4)[0])


def test_detectors_train_from_the_second_stage_on() -> None:
    backbone = Backbone(settings(train=True, drop_path=0.0), num_levels=2)
    initialise(backbone, torch.Generator().manual_seed(0))
    torch.autograd.backward([m.square().mean() for m in backbone.levels(picture(64, 64), 2)])
    for name, tensor in backbone.body.named_parameters():
        assert (tensor.grad is not None) == tensor.requires_grad, name
    trained = {n for n, tensor in backbone.body.named_parameters() if tensor.requires_grad}
    parts = {".".join(name.split(".")[:2]) for name in trained}
    assert parts == {"stages.1", "stages.2", "stages.3", "norms.2", "norms.3"}
    depths = [part for part in backbone.train().modules() if isinstance(part, StochasticDepth)]
    assert [part.training for part in depths] == [False] * 2 + [True] * 10


@pytest.mark.parametrize(
    ("name", "chance"),
    [("swin_t", 0.2), ("dat_t", 0.2), ("dat_s", 0.3), ("dat_b", 0.5), ("dat_pp_s", 0.4)],
)
def test_blocks_are_skipped_as_often_as_was_published(name: BackboneName, chance: float) -> None:
    with torch.device("meta"):
        body = Backbone(settings(name)).body
    depths = [part.p for part in body.modules() if isinstance(part, StochasticDepth)]
    assert depths == pytest.approx([chance * n / (len(depths) - 1) for n in range(len(depths))])


def test_bfloat16_stays_within_three_percent_of_float32(frozen: Backbone) -> None:
    low = frozen.body.fold(torch.bfloat16).network(picture(96, 64), 1)[0]
    wanted = frozen(picture(96, 64))
    assert low.dtype == torch.bfloat16
    assert float((low.float() - wanted).norm() / wanted.norm()) < 0.03


def test_the_aligned_grid_is_another_network_of_the_same_weights(frozen: Backbone) -> None:
    other = Backbone(settings(reference_grid="aligned"), num_levels=4)
    other.load_state_dict(frozen.state_dict())
    ours, theirs = (backbone.levels(picture(64, 96), 3) for backbone in (frozen, other))
    assert torch.equal(ours[0], theirs[0])
    assert not torch.allclose(ours[1], theirs[1], atol=1e-3)


def on_meta(name: DatName, size: int = 224) -> Classifier:
    with torch.device("meta"):
        return Classifier(settings(name, train=True, trained_size=size), 1000, torch.Generator())


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("dat_t", 224, 28_319_138),
        ("dat_s", 224, 49_700_402),
        ("dat_b", 224, 87_881_632),
        ("dat_b", 384, 88_178_272),
        ("dat_pp_t", 224, 23_962_876),
        ("dat_pp_s", 224, 53_127_366),
        ("dat_pp_b", 224, 93_690_640),
    ],
)
def test_parameters_are_those_published(name: DatName, size: int, parameters: int) -> None:
    """CVPR 2022, table 1: 29, 50, 88 M. DAT++: 24, 53, 93 M."""
    model = on_meta(name, size)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(
    ("name", "size", "multiply_adds"),
    [
        ("dat_t", 224, 4.589),
        ("dat_s", 224, 9.008),
        ("dat_b", 224, 15.788),
        ("dat_b", 384, 49.772),
        ("dat_pp_t", 224, 4.288),
    ],
)
def test_multiply_adds_are_those_published(name: DatName, size: int, multiply_adds: float) -> None:
    """CVPR 2022, table 1: 4.6, 9.0, 15.8, 49.8 G, here as fvcore counts them. DAT++: 4.3 G."""
    counted = count_classifier(on_meta(name, size), size, size) / 1e9
    assert counted == pytest.approx(multiply_adds, abs=0.0005)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {
            "encoder_attention": "deformable",
            "decoder_attention": "deformable",
            "class_scores": "sigmoid",
            "feature_levels": 4,
            "box_refinement": True,
            "two_stage": True,
            "rho": 0.3,
        },
    ],
    ids=["detr", "sparse detr"],
)
def test_detectors_stand_on_a_dat(kind: dict[str, object]) -> None:
    backbone = {"name": "dat_t", "weights": "random", "frozen_precision": "float32"}
    of = DetectorSettings.model_validate(TINY | kind | {"backbone": backbone})
    detector = Detector(of, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        answer = detector(images((70, 100), (64, 64))).groups[0].layers[-1]
    assert answer.boxes.shape == (2, 5, 4)
    assert answer.logits.isfinite().all()


def test_public_names_of_detectors_have_none_for_a_dat() -> None:
    backbone = {"name": "dat_t", "weights": "random"}
    dense = DetectorSettings.model_validate({"backbone": backbone, "num_classes": 3})
    deformable = {"encoder_attention": "deformable", "decoder_attention": "deformable"}
    sigmoid = deformable | {"class_scores": "sigmoid", "backbone": backbone, "num_classes": 3}
    with pytest.raises(WeightsError, match=r"backbone.name=dat_t is in no public detector"):
        to_deformable_names({}, DetectorSettings.model_validate(sigmoid))
    with pytest.raises(WeightsError, match=r"backbone.name=dat_t with dense attention"):
        refuse_nameless(dense)
    with pytest.raises(WeightsError, match=r"cannot express backbone.name=dat_t"):
        hugging_face_config(dense, None)


def classifier(name: DatName = "dat_t", num_classes: int = 5, **changes: object) -> Classifier:
    return Classifier(settings(name, **changes), num_classes, torch.Generator().manual_seed(1))


def official(model: Classifier) -> dict[str, Tensor]:
    """As published: without output norms but the last, with constants."""
    body = model.backbone.body
    assert isinstance(body, Dat)
    stem = "patch_proj.3.weight" if "pp" in model.backbone.settings.name else ""
    marks = {"patch_proj.0.weight", "stages.0.layer_norms.0.norm.weight", stem}
    names = file_names(model.backbone, dict.fromkeys(marks, torch.ones(1)), "published")
    name_of = classifier_name(model, names)
    tensors = {
        name_of(name): tensor
        for name, tensor in model.state_dict().items()
        if ".norms." not in name or f".norms.{body.num_stages - 1}." in name
    }
    index = {"stages.0.attns.0.relative_position_index": relative_position_index(7)}
    tensors |= index | {"stages.0.attns.1.attn_mask": torch.zeros(64, 49, 49)}
    return tensors | {"stages.3.layer_norms.0.norm.weight": torch.ones(768)}


@pytest.fixture(scope="module")
def published() -> Classifier:
    """Three stages are half the size of a file."""
    return classifier(output="layer3").eval()


@pytest.fixture(scope="module")
def container(published: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tree of settings that the authors keep in their files (yacs.config.CfgNode)."""
    path = tmp_path_factory.mktemp("dat") / "dat_tiny.pth"
    module = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = node  # type: ignore[attr-defined]
    config = node(MODEL=node(NAME="dat_tiny", DAT=node(dims=[96, 192])), BASE=[""])
    config.__immutable__ = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": official(published), "epoch": 299, "config": config}, path)
    return path


def test_the_authors_container_brings_a_classifier_without_running_its_code(
    published: Classifier, container: Path
) -> None:
    model = classifier(output="layer3").eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    report = load_classifier(model, str(container))
    assert "yacs" not in sys.modules
    assert set(report.left_out) == {
        "stages.0.attns.0.relative_position_index",
        "stages.0.attns.1.attn_mask",
        "stages.3.layer_norms.0.norm.weight",
    }
    with torch.no_grad():
        assert torch.equal(model(picture(64, 64)), published(picture(64, 64)))


def test_a_detectors_backbone_leaves_the_classifier_out(container: Path) -> None:
    backbone = Backbone(settings(weights=str(container), output="layer3"))
    report = load_backbone(backbone)
    assert {"cls_head.weight", "cls_norm.norm.weight"} < set(report.left_out)
    assert {name for name in report.new if not name.startswith("norms.")} == set()


@pytest.mark.parametrize("output", ["layer3", "layer4"])
def test_our_own_classifier_becomes_the_backbone_of_a_detector(output: str, tmp_path: Path) -> None:
    model = classifier(num_classes=2)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    backbone = Backbone(settings(weights=str(tmp_path / "own.pth"), output=output))
    report = load_backbone(backbone)
    wanted = model.backbone.body.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in backbone.body.state_dict().items())
    assert report.new == ()
    assert {"head.weight", "head.bias"} <= set(report.left_out)


def test_files_of_other_networks_are_refused_with_the_way_out(container: Path) -> None:
    for wrong, complaint in (
        ({"name": "dat_pp_t"}, r"holds a DAT of CVPR 2022, and backbone.name=dat_pp_t; say name=d"),
        ({"trained_size": 384}, r"pictures of 224 pixels, and .*=384; say trained_size=224"),
        ({"name": "resnet18"}, r"holds a DAT, and backbone.name=resnet18; give the file of a ResN"),
        ({"name": "swin_t"}, r"holds a DAT, and backbone.name=swin_t; give the file of a Swin-T"),
        ({"name": "dat_s", "output": "layer3"}, r"does not fit the model: \d+ missing"),
    ):
        with torch.device("meta"):
            backbone = Backbone(settings(**{"weights": str(container)} | wrong))
        with pytest.raises(WeightsError, match=complaint):
            load_backbone(backbone)


def test_a_resnets_file_is_no_dats(tmp_path: Path) -> None:
    resnet = Backbone(settings("resnet18")).body.state_dict()
    torch.save(resnet, tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"holds a ResNet, and backbone.name=dat_t; give"):
        load_backbone(Backbone(settings(weights=str(tmp_path / "resnet.pth"))))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "swin_t", "trained_size": 384}, "trained_size=384 is of a DAT, and name=swin_t"),
        ({"name": "resnet50", "reference_grid": "aligned"}, "reference_grid=aligned is of a DAT"),
        ({"dilation": True}, "dilation=true needs bottleneck blocks, which name=dat_t"),
    ],
)
def test_what_is_not_of_the_network_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        settings(**changes)


def test_dat_b_of_384_pixels_has_windows_of_12_cells() -> None:
    with torch.device("meta"):
        body = Backbone(settings("dat_b", trained_size=384)).body
    state = body.state_dict()
    assert state["stages.0.blocks.0.attention.relative_position_bias_table"].shape == (23**2, 4)
    assert state["stages.2.blocks.1.attention.bias_table"].shape == (16, 47, 47)
    assert dat_layout("dat_b").channels == (128, 256, 512, 1024)
