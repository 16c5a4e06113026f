"""`querypatch evaluate`: any weights on any labelled set."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from data.detection_set import open_detection_set
from data.evaluation_batches import EvaluationSizes
from finetune.evaluate_weights import evaluate_weights, judge_weights
from finetune.evaluation import EvaluationSettings, evaluate_detector
from finetune.evaluation_report import evaluation_json
from models.artefact import ArtefactKind, Provenance, artefact_metadata
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.mask_head import MaskHeadSettings, PanopticDetector
from models.one_shot import one_shot_detector, one_shot_settings
from querypatch import app
from tests.finetune.small_detector import (
    CLASSES,
    INPUT,
    SETTINGS,
    small_detector,
    write_weights,
)
from training.recipe import RecipeError
from training.world import World

CPU = torch.device("cpu")
NAMES = ("dog", "person")
VOC = EvaluationSettings(processes=0, protocols=("voc07",))
SMALL = EvaluationSizes(short_side=INPUT.short_side, max_size=INPUT.max_size)


def test_a_file_is_judged_at_the_size_that_it_names(tmp_path: Path) -> None:
    """The same numbers as the detector that it holds; ids of the data differ from the file's."""
    write_weights(tmp_path / "model.safetensors")
    url = coco_set(tmp_path, NAMES)
    plain = EvaluationSettings(processes=0)
    found = evaluate_weights(str(tmp_path / "model.safetensors"), url, plain, CPU)
    set_by_hand = EvaluationSettings(processes=0, sizes=SMALL)
    world = World.alone(CPU)
    data = open_detection_set(url)
    own = evaluate_detector(small_detector(), data, CLASSES, set_by_hand, world)()
    assert evaluation_json(found) == evaluation_json(own)
    assert found.pictures == 5
    assert found.left_out.keys() <= {"car"}


def test_sizes_that_are_set_win(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors")
    url = coco_set(tmp_path, NAMES)
    told = EvaluationSettings(processes=0, sizes=EvaluationSizes(short_side=96, max_size=200))
    found = evaluate_weights(str(tmp_path / "model.safetensors"), url, told, CPU)
    data = open_detection_set(url)
    own = evaluate_detector(small_detector(), data, CLASSES, told, World.alone(CPU))()
    assert evaluation_json(found) == evaluation_json(own)


def test_classes_without_names_are_the_data_s_only_where_they_are_equally_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "model.safetensors"
    metadata = artefact_metadata("detector", SETTINGS, None, INPUT, Provenance())
    save_file(small_detector().state_dict(), weights, metadata=metadata)
    settings = EvaluationSettings(processes=0)
    url = coco_set(tmp_path, ("dog", "person", "sheep"))
    assert evaluate_weights(str(weights), url, settings, CPU).missing == ()
    assert "names none of its classes" in caplog.text
    with pytest.raises(ValueError, match=r"names none of its 3 classes, and .* has 2"):
        evaluate_weights(str(weights), coco_set(tmp_path, NAMES), settings, CPU)


def test_boxes_are_asked_of_detectors_alone(tmp_path: Path) -> None:
    weights = write_as("one_shot", small_detector(), tmp_path)
    with pytest.raises(WeightsError, match="one_shot"):
        evaluate_weights(weights, coco_set(tmp_path, NAMES), EvaluationSettings(), CPU)


def test_the_command_s_keys_are_those_of_the_evaluation(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors")
    url, weights = coco_set(tmp_path, NAMES), str(tmp_path / "model.safetensors")
    judged = judge_weights(weights, url, ["protocols=[voc07]", "processes=0"], CPU)
    own = evaluate_weights(weights, url, VOC, CPU)
    assert judged.content == evaluation_json(own)
    assert "voc07_ap50" in judged.text
    with pytest.raises(RecipeError, match="protocol"):
        judge_weights(weights, url, ["protocol=[voc07]"], CPU)


def test_pictures_that_lie_elsewhere_are_judged_and_shown_by_their_folder(tmp_path: Path) -> None:
    """As a run is told by `data.validation_pictures`."""
    weights = tmp_path / "model.safetensors"
    write_weights(weights)
    url = coco_set(tmp_path, NAMES)
    elsewhere = (tmp_path / "val").rename(tmp_path / "elsewhere")
    told = ["--kind", "coco", "--pictures", str(elsewhere)]
    scores, sheet = tmp_path / "scores.json", tmp_path / "data.png"
    judged = ["evaluate", str(weights), url, "processes=0", "--device", "cpu", "-o", str(scores)]
    shown = ["show", "data", url, "--count", "2", "-o", str(sheet)]
    for command in (judged, shown):
        assert CliRunner().invoke(app, command).exit_code == 1
        assert CliRunner().invoke(app, [*command, *told]).exit_code == 0
    assert json.loads(scores.read_text())["pictures"] == 5
    assert sheet.stat().st_size > 0


def test_pretraining_s_weights_know_no_classes(tmp_path: Path) -> None:
    weights = write_as("patch_detector", small_detector(), tmp_path)
    with pytest.raises(WeightsError, match="knows no classes"):
        judge_weights(weights, coco_set(tmp_path, NAMES), [], CPU)


def test_a_one_shot_detector_is_judged_on_seen_and_unseen_classes(tmp_path: Path) -> None:
    settings = one_shot_settings(SETTINGS.model_copy(update={"num_classes": None}))
    model = one_shot_detector(settings, torch.Generator().manual_seed(0))
    weights = write_as("one_shot", model, tmp_path, settings)
    keys = ["processes=0", "one_shot.unseen=[dog]", "one_shot.references=1", "protocols=[voc07]"]
    judged = judge_weights(weights, coco_set(tmp_path, NAMES), keys, CPU)
    assert judged.content["pictures"] == 5
    assert "unseen" in judged.text


def test_a_mask_head_is_judged_by_segments_where_the_data_have_them(
    shared_data: Path, tmp_path: Path
) -> None:
    """And by boxes where they have none."""
    wide = SETTINGS.model_copy(update={"hidden_dim": 128, "num_heads": 8})
    generator = torch.Generator().manual_seed(0)
    model = PanopticDetector(Detector(wide, generator), MaskHeadSettings(), generator)
    weights = write_as("panoptic", model, tmp_path, wide)
    url = str(shared_data / "coco/annotations/panoptic_val2017.json")
    keys = ["processes=0", "max_pictures=2", "segments.threshold=0.1"]
    assert "pq" in judge_weights(weights, url, keys, CPU).content["numbers"]  # type: ignore[operator]
    boxes = judge_weights(weights, coco_set(tmp_path, NAMES), keys[:1], CPU)
    assert "ap50" in boxes.content["numbers"]  # type: ignore[operator]


def write_as(
    kind: ArtefactKind, model: nn.Module, folder: Path, settings: DetectorSettings = SETTINGS
) -> str:
    classes = None if kind in ("one_shot", "patch_detector") else CLASSES
    metadata = artefact_metadata(kind, settings, classes, INPUT, Provenance())
    save_file(model.state_dict(), folder / f"{kind}.safetensors", metadata=metadata)
    return str(folder / f"{kind}.safetensors")


def coco_set(folder: Path, names: tuple[str, ...]) -> str:
    """Five pictures with one box each; class n has the id 2 n + 3."""
    pictures = folder / "val"
    pictures.mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(1, 6):
        width, height = 90 - 5 * number, 70
        Image.new("RGB", (width, height), (40 * number, 90, 20)).save(pictures / f"{number}.jpg")
        image = {"id": number, "file_name": f"{number}.jpg", "width": width, "height": height}
        images.append(image)
        box = [5.0, 8.0, 30.0 + number, 40.0]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 2 * (number % len(names)) + 3,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    categories = [{"id": 2 * n + 3, "name": name} for n, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations" / "instances_val.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)
