"""Prediction in Python: the same answer however it is asked, in the words of the data."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import decode_picture, resize
from finetune.predict import (
    Device,
    LoadedDetector,
    Predictions,
    device_of,
    load_detector,
    same_size_batches,
)
from models.postprocess import detections
from models.structures import Images, LayerOutput
from tests.finetune.small_detector import CLASSES, INPUT, SETTINGS, small_detector, write_weights


@pytest.fixture(scope="module")
def detector() -> LoadedDetector:
    model = small_detector()

    def find(images: Images) -> LayerOutput:
        layer: LayerOutput = model(images).groups[0].layers[-1]
        return layer

    return LoadedDetector(find, CLASSES, INPUT, torch.device("cpu"))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def assert_alike(first: Predictions, second: Predictions) -> None:
    assert first.labels.tolist() == second.labels.tolist()
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)
    np.testing.assert_allclose(first.boxes_xyxy, second.boxes_xyxy, atol=0.01)


def test_an_answer_does_not_depend_on_the_pictures_beside_it(
    detector: LoadedDetector, shared_data: Path
) -> None:
    pictures = sorted((shared_data / "coco").rglob("*.jpg"))[:9]
    sizes = {decode_picture(path.read_bytes()).shape for path in pictures}
    assert len(sizes) > 2
    together = detector.predict(pictures, threshold=0.0, batch_size=3)
    alone = [detector.predict(path, threshold=0.0, batch_size=1)[0] for path in pictures]
    for one, other in zip(together, alone, strict=True):
        assert_alike(one, other)
    assert together[0].boxes_xyxy.tolist() != together[1].boxes_xyxy.tolist()


def test_boxes_are_those_of_the_last_layer_in_pixels_of_the_given_picture(
    detector: LoadedDetector,
) -> None:
    picture = noise(90, 150)
    resized = resize(picture, 64, 106)
    levels = torch.from_numpy(resized).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    images = Images(
        pixels=(levels - mean) / std,
        padding=torch.zeros(1, 64, 106, dtype=torch.bool),
        sizes=torch.tensor([[64, 106]]),
    )
    with torch.no_grad():
        expected = detections(detector.find(images), torch.tensor([[90, 150]]))
    (found,) = detector.predict(picture, threshold=0.0)
    order = expected.scores[0].argsort(descending=True, stable=True)
    assert (found.height, found.width) == (90, 150)
    assert found.labels.tolist() == expected.labels[0][order].tolist()
    np.testing.assert_allclose(found.scores, expected.scores[0][order], atol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy[0][order], atol=0.01)


def test_classes_come_back_by_the_names_and_ids_of_the_data(detector: LoadedDetector) -> None:
    """Peers' bug 8: sparse category ids round-trip to the same ids in predictions."""
    found = answered(detector, labels=[2, 0, 1, 2], scores=[0.9, 0.2, 0.6, 0.7])
    assert found.labels.tolist() == [2, 2, 1]
    assert found.ids.tolist() == [17, 17, 4]
    assert found.names == ("dog", "dog", "car")
    assert [box["category_id"] for box in found.to_coco(139)] == [17, 17, 4]


def answered(
    detector: LoadedDetector, labels: list[int], scores: list[float], threshold: float = 0.5
) -> Predictions:
    """What is made of an answer with these labels and scores, all boxes at (10, 20, 40, 60)."""

    def find(images: Images) -> LayerOutput:
        queries, batch = len(labels), len(images.sizes)
        probability = torch.zeros(queries, 4)
        probability[torch.arange(queries), torch.tensor(labels)] = torch.tensor(scores)
        probability[:, 3] = 1 - torch.tensor(scores)
        logits = probability.clamp(min=1e-30).log().expand(batch, -1, -1)
        boxes = torch.tensor([0.25, 0.4, 0.3, 0.4]).expand(batch, queries, 4)
        return LayerOutput(torch.zeros(batch, queries, 1), logits, boxes)

    stub = LoadedDetector(find, detector.classes, detector.input, detector.device)
    (found,) = stub.predict(noise(100, 100), threshold)
    return found


def test_coco_results_are_left_top_width_height_of_plain_numbers(detector: LoadedDetector) -> None:
    (box,) = answered(detector, labels=[1], scores=[0.75]).to_coco(7)
    assert set(box) == {"image_id", "category_id", "bbox", "score"}
    assert (box["image_id"], box["category_id"]) == (7, 4)
    assert box["bbox"] == pytest.approx([10, 20, 30, 40], abs=1e-4)
    assert box["score"] == pytest.approx(0.75)
    assert [type(value) for value in (box["image_id"], box["category_id"], box["score"])] == [
        int, int, float,
    ]  # fmt: skip


def test_a_score_equal_to_the_threshold_is_kept(detector: LoadedDetector) -> None:
    assert len(answered(detector, [0, 1], [0.5, 0.4999]).labels) == 1
    assert len(answered(detector, [0, 1], [0.5, 0.4], threshold=1.0).labels) == 0


def test_nothing_found_is_an_empty_answer(detector: LoadedDetector) -> None:
    found = answered(detector, [0], [0.1])
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.to_coco(1) == []


def test_every_form_of_a_picture_gives_the_same_answer(
    detector: LoadedDetector, tmp_path: Path
) -> None:
    picture = noise(50, 70)
    path = tmp_path / "a.png"
    path.write_bytes(png(picture))
    forms = [path, str(path), f"file://{path}", png(picture), Image.fromarray(picture), picture]
    answers = detector.predict(forms, threshold=0.0, batch_size=1)
    assert len(answers) == len(forms)
    for answer in answers:
        assert answer.boxes_xyxy.tolist() == answers[0].boxes_xyxy.tolist()
    for form in forms:
        assert len(detector.predict(form, threshold=0.0)) == 1


def test_answers_come_in_the_order_of_the_pictures(detector: LoadedDetector) -> None:
    pictures = [noise(40 + 10 * (n % 3), 60, n) for n in range(7)]
    answers = detector.predict(pictures, threshold=0.0, batch_size=2)
    assert [answer.height for answer in answers] == [40, 50, 60, 40, 50, 60, 40]
    for picture, answer in zip(pictures, answers, strict=True):
        assert_alike(answer, detector.predict(picture, threshold=0.0)[0])


def test_no_picture_gives_no_answer(detector: LoadedDetector) -> None:
    assert detector.predict([]) == []


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (31, 9)])
def test_a_picture_smaller_than_the_stride_is_answered(
    detector: LoadedDetector, size: tuple[int, int]
) -> None:
    """Peers' bug 17: batch size 1 and images smaller than the stride work."""
    (found,) = detector.predict(noise(*size), threshold=0.0, batch_size=1)
    assert np.isfinite(found.boxes_xyxy).all()
    assert (found.height, found.width) == size


def test_exif_orientation_is_ignored_as_in_training(detector: LoadedDetector) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(noise(50, 70)).save(stream, "JPEG", exif=exif)
    (found,) = detector.predict(stream.getvalue())
    assert (found.height, found.width) == (50, 70)


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [
        (b"no picture", r"images\[1\] \(10 bytes\): no picture of a known format"),
        (np.zeros((5, 6, 3), np.float32), r"\(array \(5, 6, 3\) float32\): give uint8 of height x"),
        (np.zeros((3, 5, 6), np.uint8), r"array \(3, 5, 6\) uint8"),
        (np.zeros((5, 6), np.uint8), r"array \(5, 6\) uint8"),
        (np.zeros((0, 6, 3), np.uint8), "at least one pixel"),
        (Image.new("I;16", (4, 3)), r"PIL picture of 4 x 3\): mode I;16"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(
    detector: LoadedDetector, picture: object, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        detector.predict([noise(9, 9), picture])  # type: ignore[list-item]


def test_requests_that_cannot_be_are_named(detector: LoadedDetector) -> None:
    with pytest.raises(ValueError, match=r"threshold=1\.5 is no probability"):
        detector.predict([], threshold=1.5)
    with pytest.raises(ValueError, match="batch_size=0 holds no picture"):
        detector.predict([], batch_size=0)


def test_batches_hold_one_size_and_lose_nothing() -> None:
    items = [(n, "abc"[n * n % 3]) for n in range(40)]
    batches = list(same_size_batches(items, lambda item: item[1], 4, max_waiting=6))
    assert sorted(item for batch in batches for item in batch) == items
    for batch in batches:
        assert len({size for _, size in batch}) == 1
        assert len(batch) <= 4
        assert batch == sorted(batch)


def test_a_stream_of_different_sizes_is_not_kept_waiting_for_ever() -> None:
    taken: list[int] = []

    def stream() -> "list[int]":
        for number in range(30):
            taken.append(number)
            yield number

    first = next(same_size_batches(stream(), lambda number: number, 8, max_waiting=5))
    assert first == [0]
    assert len(taken) == 6


def test_weights_in_a_file_are_a_detector_with_its_classes_and_sizes(
    detector: LoadedDetector, tmp_path: Path
) -> None:
    write_weights(tmp_path / "weights.safetensors")
    loaded = load_detector(str(tmp_path / "weights.safetensors"), "cpu")
    assert (loaded.classes, loaded.input) == (CLASSES, INPUT)
    picture = noise(80, 90)
    assert_alike(
        loaded.predict(picture, threshold=0.0)[0], detector.predict(picture, threshold=0.0)[0]
    )


def test_a_trained_backbone_is_run_as_a_frozen_one_in_its_precision(tmp_path: Path) -> None:
    answers = []
    for train in (False, True):
        backbone = SETTINGS.backbone.model_copy(update={"train": train})
        write_weights(
            tmp_path / "w.safetensors", SETTINGS.model_copy(update={"backbone": backbone})
        )
        loaded = load_detector(str(tmp_path / "w.safetensors"), "cpu")
        answers += loaded.predict(noise(80, 90), threshold=0.0)
    assert_alike(answers[0], answers[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    assert device_of("auto") == torch.device("cpu")
    wanted: Device = "cuda"
    with pytest.raises(ValueError, match="torch sees no GPU here; use device=cpu"):
        device_of(wanted)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_near_float32_on_the_cpu(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights.safetensors")
    picture = noise(80, 90)
    (exact,), (mixed,) = (
        load_detector(str(tmp_path / "weights.safetensors"), device).predict(picture, threshold=0.0)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(np.sort(mixed.scores), np.sort(exact.scores), atol=0.02)
    assert mixed.boxes_xyxy.dtype == np.float32
