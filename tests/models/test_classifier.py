"""Classifiers against torchvision's, and their files."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from models.backbone import BackboneSettings
from models.classifier import Classifier
from models.interop.checkpoint_files import WeightsError
from models.interop.classifiers import load_classifier, place_classifier
from models.interop.swin import swin_name, timm_name
from models.windows import WindowAttention, relative_position_index


def classifier(name: str, num_classes: int = 5, **changes: object) -> Classifier:
    chosen = {"name": name, "weights": "random", "frozen_precision": "float32"} | changes
    settings = BackboneSettings.model_validate(chosen)
    return Classifier(settings, num_classes, torch.Generator().manual_seed(0)).eval()


def pictures(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7))


def torchvisions(name: str) -> nn.Module:
    """Random weights with norms and biases that do something."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(name, num_classes=5).eval()
    with torch.no_grad():
        for part, tensor in network.state_dict().items():
            if part.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    return network


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    return torchvisions("swin_t")


def loaded(tensors: Mapping[str, Tensor], name: str) -> Classifier:
    model = classifier(name)
    place_classifier(model, tensors, "published.pth", head="file")
    return model


def test_logits_of_a_swin_are_torchvisions(swin: nn.Module, tmp_path: Path) -> None:
    """Windows are shifted along an axis unless one covers it: here the columns of the last map."""
    torch.save(swin.state_dict(), tmp_path / "swin.pth")
    ours = classifier("swin_t")
    load_classifier(ours, str(tmp_path / "swin.pth"))
    with torch.no_grad():
        assert torch.allclose(ours(pictures(64, 256)), swin(pictures(64, 256)), atol=1e-5)


def test_logits_of_a_resnet_are_torchvisions() -> None:
    network = torchvisions("resnet18")
    ours = loaded(network.state_dict(), "resnet18")
    with torch.no_grad():
        wanted = network(pictures())
        assert torch.allclose(ours(pictures()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("naming", "head"), [(timm_name, "head.fc."), (swin_name, "head.")])
def test_other_names_of_a_swin_bring_the_same_classifier(
    swin: nn.Module, naming: Callable[[str], str], head: str
) -> None:
    """timm's, and those of Swin's authors."""
    theirs = loaded(swin.state_dict(), "swin_t")
    tensors = {
        naming(name.removeprefix("backbone.body.")): tensor
        for name, tensor in theirs.state_dict().items()
        if not name.startswith(("head.", "backbone.body.norms."))
    }
    tensors |= {head + part: tensor for part, tensor in theirs.head.state_dict().items()}
    last = theirs.backbone.body.norms[3].state_dict()
    tensors |= {f"norm.{part}": tensor for part, tensor in last.items()}
    tensors["layers.1.blocks.1.attn.relative_position_index"] = relative_position_index(7)
    wanted = theirs.state_dict()
    for name, tensor in loaded(tensors, "swin_t").state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("name", ["swin_t", "resnet18"])
def test_a_trained_classifier_trains_all_that_reaches_its_logits(name: str) -> None:
    model = classifier(name, train=True, drop_path=0.0).train()
    model(pictures(32, 32)).square().mean().backward()
    untouched = {n for n, tensor in model.named_parameters() if tensor.grad is None}
    frozen = {n for n, tensor in model.named_parameters() if not tensor.requires_grad}
    assert untouched == frozen
    assert all(
        part.startswith(("backbone.body.norms.1.", "backbone.body.norms.2.")) for part in frozen
    )


def test_a_frozen_backbone_leaves_the_head_alone_trained() -> None:
    model = classifier("resnet18")
    trained = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert trained == ["head.weight", "head.bias"]


def test_a_new_head_takes_the_rest_of_a_file(swin: nn.Module) -> None:
    tensors, model = swin.state_dict(), classifier("swin_t", num_classes=3)
    with pytest.raises(WeightsError, match=r"5 classes apart and the model 3; say num_classes=5"):
        place_classifier(model, tensors, "published.pth", head="file")
    head = model.head.weight.clone()
    report = place_classifier(model, tensors, "published.pth", head="new")
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.backbone.body.norms[3].weight, swin.get_parameter("norm.weight"))
    assert {name for name in report.new if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert report.left_out[-2:] == ("head.weight", "head.bias")


def test_a_file_without_a_head_and_one_class_are_refused() -> None:
    bare = torchvisions("resnet18").state_dict()
    del bare["fc.weight"]
    with pytest.raises(WeightsError, match=r"has no fc.weight: it is no classifier's"):
        loaded(bare, "resnet18")
    with pytest.raises(ValueError, match="num_classes=1 leaves nothing to choose"):
        classifier("resnet18", num_classes=1)


def test_classifiers_shift_only_windows_that_do_not_cover_the_map() -> None:
    parts = [part for part in classifier("swin_t").modules() if isinstance(part, WindowAttention)]
    assert len(parts) == 12
    assert not any(part.shifts_covering for part in parts)
