"""Weights from wherever they lie."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.artefacts import build_detector, fill, open_weights
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.detector import Detector
from models.interop.checkpoint_files import WeightsError
from models.interop.detr import to_detr_names
from models.structures import Classes
from tests.finetune.public_files import (
    formula_file,
    formula_tensors,
    patch_detector,
    pretraining_file,
    pretraining_settings,
)
from tests.finetune.small_detector import CLASSES, INPUT, SETTINGS, small_detector, write_weights
from tests.models.test_detector import images
from tests.models.test_hugging_face import RESNET18, their_model
from training.checkpoint import save_checkpoint
from training.ema import Ema, EmaSettings
from training.optimiser import OptimiserSettings, build_optimiser
from training.recipe import recipe_yaml
from training.run_folder import open_run_folder
from training.snapshot import Position, TrainingState, take_snapshot


def save_run(folder: Path, detector: Detector, *, ema: bool = False, header: bool = True) -> str:
    """A run with one checkpoint, of step 7."""
    told = artefact_metadata("detector", SETTINGS, CLASSES, INPUT, Provenance(run="s3://k:s@b/r"))
    state = TrainingState(
        detector,
        build_optimiser(detector, None, OptimiserSettings()),
        Ema(detector, EmaSettings()) if ema else None,
        told if header else {},
    )
    snapshot = take_snapshot(state, Position(step=7), 1)
    save_checkpoint(open_run_folder(str(folder)), snapshot, {"eval/ap": 0.5}, "digest")
    return str(folder)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_our_own_file_tells_all_of_itself(tmp_path: Path) -> None:
    """Peers' bugs 7 and 8: the class count does not move, ids 1, 4, 17 come back."""
    write_weights(tmp_path / "w.safetensors")
    artefact = open_weights(str(tmp_path / "w.safetensors"))
    assert (artefact.kind, artefact.form, artefact.guessed) == ("detector", "querypatch", ())
    assert artefact.detector == SETTINGS
    assert artefact.classes == CLASSES
    assert artefact.input == INPUT
    built = build_detector(artefact)
    assert not built.training
    assert same_weights(small_detector(), built)


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step_000007"])
def test_a_runs_folder_and_a_checkpoints_tell_step_and_metrics(tmp_path: Path, place: str) -> None:
    save_run(tmp_path / "run", small_detector())
    artefact = open_weights(str(tmp_path / place))
    told = artefact.provenance
    assert (told.step, told.metrics, told.run) == (7, {"eval/ap": 0.5}, "s3://b/r")
    assert (artefact.classes, told.averaged) == (CLASSES, False)
    assert same_weights(small_detector(), build_detector(artefact))


def test_a_runs_moving_average_is_told(tmp_path: Path) -> None:
    save_run(tmp_path / "run", small_detector(), ema=True)
    assert open_weights(str(tmp_path / "run")).provenance.averaged


def test_a_run_from_before_headers_is_told_by_its_recipe(tmp_path: Path) -> None:
    source = save_run(tmp_path / "run", small_detector(), header=False)
    guessed = open_weights(source)
    assert (guessed.detector.num_heads, guessed.guessed) == (8, ("num_heads",))
    model = "\n".join(f"  {line}" for line in recipe_yaml(SETTINGS).splitlines())
    open_run_folder(source).write("recipe.yaml", f"model:\n{model}\n".encode())
    told = open_weights(source)
    assert (told.detector.num_heads, told.guessed, told.classes) == (2, (), None)


def test_one_file_out_of_a_checkpoint_is_enough(tmp_path: Path) -> None:
    save_run(tmp_path / "run", small_detector())
    place = tmp_path / "run" / "checkpoints" / "step_000007" / "model.safetensors"
    artefact = open_weights(str(place))
    assert (artefact.provenance.step, artefact.classes) == (7, CLASSES)


def test_updetrs_pretraining_file_is_told_by_its_tensors(tmp_path: Path) -> None:
    artefact = open_weights(pretraining_file(tmp_path))
    assert (artefact.kind, artefact.form, artefact.classes) == ("patch_detector", "detr", None)
    assert artefact.guessed == ("num_heads",)
    inferred = artefact.detector.model_copy(
        update={"num_heads": 2, "backbone": pretraining_settings().backbone}
    )
    assert inferred == pretraining_settings()
    model = patch_detector(seed=2)
    assert fill(model, artefact, left_out=()).new == ()
    assert same_weights(model, patch_detector(seed=1))
    with pytest.raises(
        WeightsError, match=r"is a patch_detector: .*finetune a detector with init="
    ):
        build_detector(artefact)


def test_detrs_published_head_keeps_its_92_rows_and_gets_cocos_names(tmp_path: Path) -> None:
    """Peers' bug 7: 92 rows are 91 classes and "no object", never 90 or 92."""
    artefact = open_weights(formula_file("detr_r18_crowded", tmp_path))
    assert artefact.detector.num_classes == 91
    assert artefact.classes is not None
    assert (artefact.classes.names[17], artefact.classes.ids[17]) == ("cat", 17)
    assert "classes" in artefact.guessed
    assert (artefact.detector.backbone.name, artefact.detector.pre_norm) == ("resnet18", False)
    assert build_detector(artefact).class_head.weight.shape == (92, 64)


def test_a_public_panoptic_file_is_a_detector_with_a_mask_head(tmp_path: Path) -> None:
    artefact = open_weights(formula_file("panoptic_detr_r50", tmp_path))
    assert (artefact.kind, artefact.detector.num_classes) == ("panoptic", 250)
    assert artefact.masks is not None
    assert artefact.masks.softmax_over == "heads_and_positions"
    theirs = formula_tensors("panoptic_detr_r50")
    built = build_detector(artefact)
    assert torch.equal(built.queries.weight, theirs["detr.query_embed.weight"])
    assert torch.equal(
        artefact.tensors["mask_head.output.weight"], theirs["mask_head.out_lay.weight"]
    )


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_folder_of_transformers_is_read_with_its_config(tmp_path: Path, form: str) -> None:
    labels = {0: "N/A", 1: "cat", 2: "N/A"}
    theirs = their_model(RESNET18, id2label=labels, num_labels=3)
    theirs.save_pretrained(tmp_path)
    if form == "bin":
        file = tmp_path / "model.safetensors"
        torch.save(load_file(file), tmp_path / "pytorch_model.bin")
        file.unlink()
    artefact = open_weights(str(tmp_path))
    assert (artefact.form, artefact.guessed, artefact.detector.num_heads) == ("hf", (), 2)
    assert artefact.classes == Classes(("N/A (0)", "cat", "N/A (2)"), (0, 1, 2))
    exact = artefact.detector.backbone.model_copy(update={"frozen_precision": "float32"})
    detector = build_detector(artefact)
    detector.backbone.settings = exact
    given = images((64, 96), (96, 33))
    with torch.no_grad():
        boxes = theirs(given.pixels, pixel_mask=(~given.padding).long()).pred_boxes
        torch.testing.assert_close(detector(given).groups[0].layers[-1].boxes, boxes)


def test_public_files_are_read_from_any_url(tmp_path: Path) -> None:
    folder = open_run_folder("memory://weights")
    folder.write("updetr.pth", Path(pretraining_file(tmp_path)).read_bytes())
    assert open_weights("memory://weights/updetr.pth").kind == "patch_detector"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("page.pth", b"<html>", "holds no plain tensors"),
        ("cut.safetensors", b"\x08\x00", "not a whole safetensors file"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=complaint) as caught:
        open_weights(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_half_downloaded_file_of_ours_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        open_weights(str(tmp_path / "w.safetensors"))


def test_tensors_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="is no DETR checkpoint"):
        open_weights(str(tmp_path / "w.safetensors"))


def test_a_place_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(WeightsError, match=r"holds no weights: .*model.safetensors or pytorch"):
            open_weights(str(place))


def test_a_foreign_tensor_in_a_detectors_file_is_an_error(tmp_path: Path) -> None:
    tensors = to_detr_names(small_detector()) | {"adapter.weight": torch.ones(2)}
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 unexpected: adapter.weight"):
        build_detector(open_weights(str(tmp_path / "w.pth")))


def test_reading_says_nothing_where_all_is_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_weights(tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING):
        assert open_weights(str(tmp_path / "w.safetensors")).input == PictureInput(
            short_side=64, max_size=106
        )
    assert not caplog.records
