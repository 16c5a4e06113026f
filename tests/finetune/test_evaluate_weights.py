"""`querypatch evaluate`: any weights on any labelled set."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.detection_set import open_detection_set
from data.evaluation_batches import EvaluationSizes
from finetune.evaluate_weights import evaluate_weights
from finetune.evaluation import EvaluationSettings, evaluate_detector
from finetune.evaluation_report import evaluation_json
from models.artefact import Provenance, artefact_metadata
from models.interop.checkpoint_files import WeightsError
from tests.finetune.small_detector import (
    CLASSES,
    INPUT,
    SETTINGS,
    small_detector,
    write_weights,
)
from training.world import World

CPU = torch.device("cpu")
NAMES = ("dog", "person")
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


def test_weights_that_are_no_detector_s_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    metadata = artefact_metadata("one_shot", SETTINGS, None, INPUT, Provenance())
    save_file(small_detector().state_dict(), weights, metadata=metadata)
    with pytest.raises(WeightsError, match="one_shot"):
        evaluate_weights(str(weights), coco_set(tmp_path, NAMES), EvaluationSettings(), CPU)


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
