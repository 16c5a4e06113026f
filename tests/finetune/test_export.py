"""Weights out, and in again."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import save_file

from finetune.artefacts import build_detector, open_weights
from finetune.export import ExportFormat, export
from finetune.weights_report import weights_report
from models.artefact import METADATA_KEY, Provenance, artefact_metadata
from models.interop.checkpoint_files import WeightsError
from models.structures import LayerOutput
from tests.finetune.public_files import formula_file, formula_tensors, pretraining_file
from tests.finetune.small_detector import CLASSES, INPUT, SETTINGS, small_detector, write_weights
from tests.models.test_detector import images
from training.run_folder import open_run_folder

SPARSE = SETTINGS.model_copy(
    update={
        **dict.fromkeys(("encoder_attention", "decoder_attention"), "deformable"),
        **dict.fromkeys(("box_refinement", "two_stage"), True),
        "class_scores": "sigmoid",
        "feature_levels": 4,
        "encoder_layers": 2,
        "hidden_dim": 64,
        "proposal_content": "memory",
        "proposal_classes": "all",
        "rho": 0.3,
    }
)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    write_weights(tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def said(source: str) -> LayerOutput:
    with torch.no_grad():
        return build_detector(open_weights(source))(images((64, 96), (96, 33))).groups[0].layers[-1]


@pytest.mark.parametrize(
    "manifest",
    ["detr_r50", "detr_r18_crowded", "updetr_pretrain_r18_learned", "panoptic_updetr_r50"],
)
def test_official_files_come_back_equal_tensor_by_tensor(tmp_path: Path, manifest: str) -> None:
    source = formula_file(manifest, tmp_path)
    export(source, str(tmp_path / "again.pth"), "detr")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    theirs = formula_tensors(manifest)
    assert again["model"].keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert again["model"][name].dtype == tensor.dtype
        assert torch.equal(again["model"][name], tensor), name


@pytest.mark.parametrize(("form", "name"), [("querypatch", "q"), ("detr", "w.pth"), ("hf", "hf")])
def test_every_form_opens_again_as_the_same_detector(
    tmp_path: Path, weights: str, form: ExportFormat, name: str
) -> None:
    """Peers' bugs 7 and 8: class count and sparse ids survive each form."""
    export(weights, str(tmp_path / name), form)
    again = open_weights(str(tmp_path / name))
    assert again.detector == SETTINGS
    assert (again.classes, again.input, again.guessed) == (CLASSES, INPUT, ())
    assert again.form == form
    assert torch.equal(said(str(tmp_path / name)).boxes, said(weights).boxes)


def test_transformers_loads_the_folder_and_says_the_same(tmp_path: Path, weights: str) -> None:
    export(weights, str(tmp_path / "hf"), "hf")
    theirs, told = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values())
    assert list(theirs.config.id2label.values()) == list(CLASSES.names)
    given = images((64, 96), (96, 33))
    with torch.no_grad():
        found = theirs.eval()(given.pixels, pixel_mask=(~given.padding).long())
    torch.testing.assert_close(found.logits, said(weights).logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.pred_boxes, said(weights).boxes, atol=2e-6, rtol=0)
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 64, "longest_edge": 106}


def test_what_transformers_cannot_say_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source = pretraining_file(tmp_path)
    with pytest.raises(WeightsError, match="is a patch_detector, format hf holds detectors alone"):
        export(source, str(tmp_path / "hf"), "hf")
    settings = SETTINGS.model_copy(update={"pre_norm": True})
    write_weights(tmp_path / "pre.safetensors", settings)
    with pytest.raises(WeightsError, match="cannot express pre_norm=true"):
        export(str(tmp_path / "pre.safetensors"), str(tmp_path / "hf"), "hf")
    assert not (tmp_path / "hf").exists()


def test_our_folder_has_a_header_a_config_and_a_card(tmp_path: Path) -> None:
    told = Provenance(
        run="s3://bucket/runs/a",
        step=1200,
        averaged=True,
        init=("updetr.pth",),
        data="VOCdevkit#07+12-trainval",
        metrics={"eval/ap": 0.4213, "eval/ap50": 0.6},
    )
    header = artefact_metadata("detector", SETTINGS, CLASSES, INPUT, told)
    source = tmp_path / "w.safetensors"
    save_file(small_detector().state_dict(), source, metadata=header)
    export(str(source), str(tmp_path / "out"), "querypatch")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("model.safetensors", "config.json", "README.md"),
    }
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = json.loads(file.metadata()[METADATA_KEY])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored == config
    assert (config["class_ids"], config["provenance"]["step"]) == ([1, 4, 17], 1200)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| eval/ap | 0.4213 |",
        "person (1), car (4), dog (17)",
        "- Run: s3://bucket/runs/a",
        "- Data: VOCdevkit#07+12-trainval",
        "- Weights: the moving average",
        "- Began from: updetr.pth",
        'detector = querypatch.load_detector("THIS_FOLDER")',
    ):
        assert line in card


def test_pretraining_weights_go_out_with_their_patch_parts(tmp_path: Path) -> None:
    source = pretraining_file(tmp_path)
    export(source, str(tmp_path / "out"), "querypatch")
    again = open_weights(str(tmp_path / "out"))
    assert again.kind == "patch_detector"
    assert again.provenance.init == (source,)
    assert "patch_projection.weight" in again.tensors
    assert "detector.queries.weight" in again.tensors
    assert "init=" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path, weights: str) -> None:
    export(weights, str(tmp_path / "w.pth"), "detr")
    before = (tmp_path / "w.pth").read_bytes()
    with pytest.raises(ValueError, match=r"w.pth exists; give another destination, or ask to"):
        export(weights, str(tmp_path / "w.pth"), "detr")
    assert (tmp_path / "w.pth").read_bytes() == before
    export(weights, str(tmp_path / "w.pth"), "detr", overwrite=True)


@pytest.mark.parametrize(("form", "suffix"), [("detr", ".pth"), ("onnx", ".onnx")])
def test_a_format_of_one_file_wants_its_ending(
    tmp_path: Path, weights: str, form: ExportFormat, suffix: str
) -> None:
    with pytest.raises(ValueError, match=f"ends in {suffix}, e.g. .*/out/detector{suffix}"):
        export(weights, str(tmp_path / "out"), form)


def test_urls_are_written_whole(weights: str) -> None:
    written = export(weights, "memory://exports/a", "querypatch")
    assert written.files[-1] == "memory://exports/a/model.safetensors"
    assert open_weights("memory://exports/a").classes == CLASSES
    export(weights, "memory://exports/a/w.pth", "detr")
    assert open_weights("memory://exports/a/w.pth").classes == CLASSES
    assert open_run_folder("memory://exports/a").names("") == [
        *("README.md", "config.json", "model.safetensors", "w.pth"),
    ]


def test_a_sparse_detector_goes_out_with_every_copy_of_its_heads_and_comes_back(
    tmp_path: Path,
) -> None:
    write_weights(tmp_path / "sparse.safetensors", SPARSE)
    source, public = str(tmp_path / "sparse.safetensors"), str(tmp_path / "sparse.pth")
    export(source, public, "detr")
    theirs = torch.load(public, weights_only=True)["model"]
    names = ("encoder.class_embed.0.bias", "decoder.class_embed.3.bias")
    for name in (*(f"transformer.{name}" for name in names), "class_embed.3.bias"):
        assert torch.equal(theirs[name], theirs["class_embed.3.bias"])
    again = open_weights(public)
    assert (again.detector, again.form, again.guessed) == (SPARSE, "detr", ())
    assert again.notes[0].startswith("40 tensors of the file are copies under further names")
    assert torch.equal(said(public).boxes, said(source).boxes)
    assert "architecture  Sparse DETR (4 levels, rho 0.3, two-stage) on" in weights_report(public)
    with pytest.raises(WeightsError, match="DetrForObjectDetection cannot express deformable"):
        export(source, str(tmp_path / "hf"), "hf")


def test_a_file_that_does_not_fit_its_architecture_is_not_exported(tmp_path: Path) -> None:
    tensors = small_detector().state_dict()
    del tensors["queries.weight"]
    header = artefact_metadata("detector", SETTINGS, CLASSES, INPUT, Provenance())
    save_file(tensors, tmp_path / "w.safetensors", metadata=header)
    with pytest.raises(WeightsError, match=r"1 missing: queries.weight"):
        export(str(tmp_path / "w.safetensors"), str(tmp_path / "out"), "querypatch")
    assert not (tmp_path / "out").exists()


def test_weights_are_shown_with_kind_classes_origin_and_parts(weights: str) -> None:
    lines = weights_report(weights).splitlines()
    assert lines[1] == "kind          detector (querypatch)"
    assert "classes       1 person, 4 car, 17 dog" in lines
    assert any(line.startswith("architecture  DETR on resnet18 (layer4): 1 + 2") for line in lines)
    queries = small_detector().queries.weight
    assert f"queries       {1:>8}{7 * 32:>13,}{float(queries.detach().norm()):>12.4g}" in lines
    everything = sum(tensor.numel() for tensor in small_detector().state_dict().values())
    assert f"{everything:,}" in lines[-1]
