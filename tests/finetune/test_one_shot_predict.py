"""Predicting with query crops: each crop a class, each picture encoded once."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.query_crops import CropSettings
from finetune.one_shot import OneShotSettings, shown_as_trained
from finetune.one_shot_predict import find_all, load_one_shot
from finetune.one_shot_shares import normalised_crops
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.interop.checkpoint_files import WeightsError
from models.one_shot import MATCHES, one_shot_detector
from models.patch_queries import PatchDetector
from tests.finetune.small_detector import CLASSES, SETTINGS, small_detector
from tests.models.test_detector import images

INPUT = PictureInput(short_side=64, max_size=106, query_side=32)


def small_model() -> PatchDetector:
    settings = SETTINGS.model_copy(update={"num_classes": None})
    return one_shot_detector(settings, torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = small_model()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    header = artefact_metadata("one_shot", model.detector.settings, None, INPUT, Provenance())
    save_file(model.state_dict(), path, metadata=header)
    return str(path)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def test_several_crops_find_each_what_it_finds_alone(weights: str, tmp_path: Path) -> None:
    (tmp_path / "mug.png").write_bytes(png(noise(20, 40)))
    (tmp_path / "cup.png").write_bytes(png(noise(32, 32, seed=1)))
    files = [str(tmp_path / "mug.png"), str(tmp_path / "cup.png")]
    picture = noise(90, 150, seed=2)
    (both,) = load_one_shot(weights, files, device="cpu").predict(picture, threshold=0.0)
    assert len(both.scores) == 2 * 7
    for label, file in enumerate(files):
        (alone,) = load_one_shot(weights, [file], device="cpu").predict(picture, threshold=0.0)
        own = both.labels == label
        np.testing.assert_allclose(both.scores[own], alone.scores, atol=1e-5)
        np.testing.assert_allclose(both.boxes_xyxy[own], alone.boxes_xyxy, atol=1e-2)
    assert set(both.names) == {"mug", "cup"}
    assert set(both.ids.tolist()) == {1, 2}


@torch.no_grad()
def test_scores_are_the_probability_of_a_match_as_in_training() -> None:
    model, pictures = small_model(), images((64, 96), (64, 96))
    crops = normalised_crops(noise(32, 64).reshape(2, 32, 32, 3), torch.device("cpu"))
    found = find_all(model, pictures, model.patch_features(crops[None]))
    assert found.logits.shape == (2, 14, 3)
    probability = found.logits.softmax(-1)
    for number in range(2):
        asked = crops[number].expand(2, 1, -1, -1, -1)
        last = model(pictures, asked).detection.groups[0].layers[-1]
        queries = slice(7 * number, 7 * number + 7)
        wanted = last.logits.softmax(-1)[..., MATCHES]
        torch.testing.assert_close(probability[:, queries, number], wanted)
        assert (probability[:, queries, 1 - number] == 0).all()


def test_a_crop_that_cannot_be_used_is_named(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"query crop .*absent\.png: no such file"):
        load_one_shot(weights, [str(tmp_path / "absent.png")], device="cpu")
    with pytest.raises(ValueError, match="query crop 10 bytes: "):
        load_one_shot(weights, [b"no picture"], device="cpu")
    with pytest.raises(ValueError, match="no query crop"):
        load_one_shot(weights, [], device="cpu")


def test_crops_of_one_name_need_names_of_their_own(weights: str) -> None:
    crops = [noise(20, 20), noise(20, 20, seed=1)]
    named = load_one_shot(weights, crops, names=["mug", "cup"], device="cpu")
    assert named.classes.names == ("mug", "cup")
    assert load_one_shot(weights, crops, device="cpu").classes.names == ("query 1", "query 2")
    with pytest.raises(ValueError, match="name mug stands for two classes"):
        load_one_shot(weights, crops, names=["mug", "mug"], device="cpu")
    with pytest.raises(ValueError, match="2 query crops and 1 names"):
        load_one_shot(weights, crops, names=["mug"], device="cpu")


def test_weights_that_cannot_be_told_what_to_find_are_refused(tmp_path: Path) -> None:
    model = small_detector()
    header = artefact_metadata("detector", SETTINGS, CLASSES, INPUT, Provenance())
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata=header)
    with pytest.raises(WeightsError, match=r"is a detector .* give a run of task=one_shot"):
        load_one_shot(str(tmp_path / "model.safetensors"), [noise(20, 20)], device="cpu")


def test_crops_have_the_size_of_training_unless_another_is_said() -> None:
    assert shown_as_trained(OneShotSettings(), INPUT).crops.side == 32
    said = OneShotSettings(crops=CropSettings(side=64))
    assert shown_as_trained(said, INPUT).crops.side == 64
    assert shown_as_trained(OneShotSettings(), PictureInput()).crops.side == 128
