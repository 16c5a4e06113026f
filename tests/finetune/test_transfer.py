"""What a finetuning run takes from pretrained weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.transfer import initial_detector, resolve_model
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.backbone import BackboneSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.interop.detr import to_detr_names
from models.interop.swin import swin_name
from models.structures import Classes
from tests.finetune.public_files import (
    formula_file,
    formula_tensors,
    patch_detector,
    pretraining_file,
    pretraining_settings,
)
from tests.finetune.small_detector import SETTINGS, small_detector, write_weights
from tests.models.test_hugging_face import RESNET18, their_model

VOC_LIKE = Classes(("aeroplane", "person", "tvmonitor", "windmill"), (1, 2, 3, 4))


def recipe(backbone: dict[str, object] | None = None, **given: object) -> DetectorSettings:
    """What a recipe says of the detector, and nothing else."""
    return DetectorSettings.model_validate({"backbone": backbone or {}, **given})


def own_file(folder: Path, classes: Classes, seed: int = 1) -> tuple[str, Detector]:
    """A finetuned detector of ours, and its file."""
    settings = SETTINGS.model_copy(update={"num_classes": len(classes.names)})
    detector = Detector(settings, torch.Generator().manual_seed(seed))
    told = Provenance(init=("s3://b/pretrained", "swav.pth"))
    metadata = artefact_metadata("detector", settings, classes, PictureInput(), told)
    save_file(detector.state_dict(), folder / "own.safetensors", metadata=metadata)
    return str(folder / "own.safetensors"), detector


def backbone_file(folder: Path, seed: int = 9) -> tuple[str, dict[str, Tensor]]:
    """A ResNet-18 by itself."""
    tensors = dict(small_detector(seed).backbone.body.state_dict())
    torch.save(tensors, folder / "resnet18.pth")
    return str(folder / "resnet18.pth"), tensors


def test_pretraining_carries_over_all_but_the_class_head_and_what_patches_need(
    tmp_path: Path,
) -> None:
    """UP-DETR's `--pretrain`: transformer, box head, query embeddings in their order."""
    source = pretraining_file(tmp_path)
    detector, report = initial_detector(recipe(num_heads=2), source, VOC_LIKE, seed=5)
    theirs = patch_detector().detector.state_dict()
    ours = detector.state_dict()
    carried = [name for name in ours if not name.startswith("class_head.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in carried)
    assert set(report.loaded) == set(carried)
    assert report.new == ("class_head.weight", "class_head.bias")
    assert {name.partition(".")[0] for name in report.left_out} == {
        *("class_head", "patch_projection", "reconstruction"),
    }
    assert report.reshaped == ("input_projection.weight",)
    fresh = Detector(detector.settings, torch.Generator().manual_seed(5)).state_dict()
    assert torch.equal(ours["class_head.weight"], fresh["class_head.weight"])


def test_the_files_architecture_is_taken_and_training_keys_are_the_recipes(
    tmp_path: Path,
) -> None:
    """Peers' bug 7: the class count is that of the data, never the file's."""
    said = recipe({"train": True}, num_heads=2, dropout=0.0)
    resolved = resolve_model(said, pretraining_file(tmp_path), VOC_LIKE)
    wanted = pretraining_settings().model_copy(
        update={
            "num_classes": 4,
            "dropout": 0.0,
            "backbone": BackboneSettings(name="resnet18", train=True),
        }
    )
    assert resolved == wanted


def test_resolving_twice_changes_nothing(tmp_path: Path) -> None:
    """A resumed run reads its resolved recipe, in which every key is given."""
    source = pretraining_file(tmp_path)
    once = resolve_model(recipe(num_heads=2), source, VOC_LIKE)
    stored = DetectorSettings.model_validate_json(json.dumps(once.model_dump(mode="json")))
    assert resolve_model(stored, source, VOC_LIKE) == once


def test_a_key_that_disagrees_with_the_file_is_an_error_with_both_values(tmp_path: Path) -> None:
    said = recipe({"name": "resnet50"}, num_heads=2, num_queries=100, pre_norm=False)
    with pytest.raises(WeightsError) as caught:
        resolve_model(said, pretraining_file(tmp_path), VOC_LIKE)
    message = str(caught.value)
    assert "model.pre_norm=False in the recipe, True in the file" in message
    assert "model.num_queries=100 in the recipe, 6 in the file" in message
    assert "model.backbone.name=resnet50 in the recipe, resnet18 in the file" in message
    assert "\n" not in message


def test_a_class_count_that_disagrees_with_the_data_is_an_error(tmp_path: Path) -> None:
    """Peers' bug 7: neither 91 for 80 classes nor one more or less."""
    with pytest.raises(WeightsError, match=r"model.num_classes=5, but the data have 4 classes"):
        resolve_model(recipe(num_classes=5), pretraining_file(tmp_path), VOC_LIKE)
    random = recipe({"weights": "random"}, num_classes=3)
    with pytest.raises(WeightsError, match=r"leave model.num_classes out"):
        resolve_model(random, None, VOC_LIKE)


def test_what_a_public_file_cannot_tell_is_said_and_may_be_given(tmp_path: Path) -> None:
    source = pretraining_file(tmp_path)
    guessed, report = initial_detector(recipe(), source, VOC_LIKE, seed=0)
    assert guessed.settings.num_heads == 8
    assert (
        "num_heads=8: the file cannot tell; give model.num_heads if it is another" in report.notes
    )
    assert resolve_model(recipe(num_heads=4), source, VOC_LIKE).num_heads == 4


def test_class_rows_go_over_by_name_and_no_object_with_them(tmp_path: Path) -> None:
    given = Classes(("person", "tv", "airplane"), (1, 72, 5))
    source, theirs = own_file(tmp_path, given)
    detector, report = initial_detector(recipe(), source, VOC_LIKE, seed=5)
    fresh = Detector(detector.settings, torch.Generator().manual_seed(5))
    for ours, old, new in (
        (detector.class_head.weight, theirs.class_head.weight, fresh.class_head.weight),
        (detector.class_head.bias, theirs.class_head.bias, fresh.class_head.bias),
    ):
        wanted = torch.stack([old[2], old[0], old[1], new[3], old[3]])
        assert torch.equal(ours, wanted)
    assert "class head: 3 of 4 classes by name; new: windmill" in report.notes
    assert {"class_head.weight", "class_head.bias"} <= set(report.reshaped)
    assert report.new == ()
    assert report.chain == (source, "s3://b/pretrained", "swav.pth")


def test_the_same_classes_carry_the_whole_head_whatever_their_ids(tmp_path: Path) -> None:
    source, theirs = own_file(tmp_path, Classes(("a", "b", "c"), (1, 4, 17)))
    detector, _ = initial_detector(recipe(), source, Classes(("a", "b", "c"), (1, 2, 3)), seed=5)
    assert torch.equal(detector.class_head.weight, theirs.class_head.weight)


def test_no_common_class_makes_the_head_new(tmp_path: Path) -> None:
    source, _ = own_file(tmp_path, Classes(("a", "b"), (1, 2)))
    _, report = initial_detector(recipe(), source, VOC_LIKE, seed=5)
    assert report.new == ("class_head.weight", "class_head.bias")
    assert f"class head: new, {source} names none of these classes" in report.notes


def test_detrs_coco_head_gives_its_rows_to_voc(tmp_path: Path) -> None:
    """The official file: label n is COCO's id n, and row 91 is "no object"."""
    source = formula_file("detr_r18_crowded", tmp_path)
    detector, report = initial_detector(recipe(), source, VOC_LIKE, seed=5)
    assert (
        "class head: 3 of 4 classes by name (taken to be COCO's, by their number); new: windmill"
        in report.notes
    )
    theirs = formula_tensors("detr_r18_crowded")["class_embed.weight"]
    rows = [0, 1, 2, 4]
    assert torch.equal(detector.class_head.weight[rows], theirs[[5, 1, 72, 91]])


def test_transformers_weights_start_a_run(tmp_path: Path) -> None:
    theirs = their_model(RESNET18, id2label={0: "person", 1: "tv", 2: "kite"})
    theirs.save_pretrained(tmp_path)
    detector, report = initial_detector(recipe(), str(tmp_path), VOC_LIKE, seed=5)
    head = theirs.class_labels_classifier.weight
    assert torch.equal(detector.class_head.weight[[1, 2, 4]], head[[0, 1, 3]])
    assert torch.equal(detector.queries.weight, theirs.model.query_position_embeddings.weight)
    assert "backbone: that of init" in report.notes


def test_the_backbone_is_inits_unless_the_recipe_names_another(tmp_path: Path) -> None:
    source, theirs = own_file(tmp_path, VOC_LIKE)
    detector, _ = initial_detector(recipe(), source, VOC_LIKE, seed=5)
    assert torch.equal(detector.backbone.body.conv1.weight, theirs.backbone.body.conv1.weight)
    other, tensors = backbone_file(tmp_path)
    detector, report = initial_detector(recipe({"weights": other}), source, VOC_LIKE, seed=5)
    assert torch.equal(detector.backbone.body.conv1.weight, tensors["conv1.weight"])
    assert f"backbone: that of model.backbone.weights={other}, not that of init" in report.notes


def test_a_classifiers_swin_in_place_of_inits_leaves_init_its_output_norms(tmp_path: Path) -> None:
    backbone = BackboneSettings(name="swin_t", output="layer3", weights="random")
    settings = SETTINGS.model_copy(update={"num_classes": 4, "backbone": backbone})
    theirs, other = (Detector(settings, torch.Generator().manual_seed(seed)) for seed in (1, 9))
    theirs.backbone.body.norms.requires_grad_(False)[2].weight.fill_(2.0)
    metadata = artefact_metadata("detector", settings, VOC_LIKE, PictureInput(), Provenance())
    save_file(theirs.state_dict(), tmp_path / "own.safetensors", metadata=metadata)
    tensors = other.backbone.body.state_dict()
    bare = {swin_name(name): tensors[name] for name in tensors if not name.startswith("norms.")}
    torch.save({"model": bare}, tmp_path / "swin.pth")
    said = recipe({"weights": str(tmp_path / "swin.pth")})
    detector, report = initial_detector(said, str(tmp_path / "own.safetensors"), VOC_LIKE, seed=5)
    body = detector.backbone.body.state_dict()
    table = "stages.2.blocks.1.attention.relative_position_bias_table"
    assert torch.equal(body[table], tensors[table])
    assert body["norms.2.weight"].eq(2.0).all()
    assert "backbone.body.norms.2.weight" in report.loaded
    assert any("except norms.1.weight" in note for note in report.notes)


def test_from_scratch_only_the_backbone_is_loaded(tmp_path: Path) -> None:
    source, tensors = backbone_file(tmp_path)
    said = SETTINGS.model_copy(
        update={
            "num_classes": None,
            "backbone": SETTINGS.backbone.model_copy(update={"weights": source}),
        }
    )
    detector, report = initial_detector(said, None, VOC_LIKE, seed=5)
    assert detector.settings.num_classes == 4
    assert set(report.loaded) == {f"backbone.body.{name}" for name in tensors}
    assert set(report.loaded) | set(report.new) == set(detector.state_dict())
    assert "from scratch: no init" in report.notes
    again, _ = initial_detector(said, None, VOC_LIKE, seed=5)
    assert all(
        torch.equal(tensor, again.state_dict()[name])
        for name, tensor in detector.state_dict().items()
    )


def test_neither_init_nor_backbone_weights_is_an_error() -> None:
    with pytest.raises(WeightsError, match=r"neither init nor model.backbone.weights is given"):
        initial_detector(recipe(), None, VOC_LIKE, seed=0)


def test_tensors_that_fit_nowhere_are_an_error_and_no_silent_loss(tmp_path: Path) -> None:
    tensors = to_detr_names(small_detector()) | {"neck.weight": torch.ones(2)}
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected: neck.weight"):
        initial_detector(recipe(num_heads=2), str(tmp_path / "w.pth"), VOC_LIKE, seed=0)


def test_the_report_counts_by_part_and_is_json(tmp_path: Path) -> None:
    _, report = initial_detector(recipe(num_heads=2), pretraining_file(tmp_path), VOC_LIKE, seed=0)
    content = json.loads(json.dumps(report.content()))
    parts = content["parts"]
    assert parts["class head"]["new"] == ["class_head.weight", "class_head.bias"]
    assert parts["projection"]["reshaped"] == ["input_projection.weight"]
    assert len(parts["patch parts"]["left out"]) == 6
    assert len(parts["backbone"]["loaded"]) == 100
    assert "others" not in parts
    table = report.table().splitlines()
    assert table[0].split() == ["loaded", "reshaped", "new", "left", "out"]
    assert "class head                 -         -         2         2" in table
    assert any(line.startswith("class head: new") for line in table)


def test_ours_without_a_run_is_taken_too(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    detector, _ = initial_detector(
        recipe(), str(tmp_path / "w.safetensors"), Classes(("dog",), (1,)), seed=0
    )
    assert torch.equal(detector.class_head.weight, small_detector().class_head.weight[[2, 3]])
