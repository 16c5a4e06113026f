"""`querypatch predict`: what it writes, what it refuses, what it leaves out and says so."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from finetune.drawing import colour_of
from finetune.picture_loading import numbered_pictures
from finetune.picture_sources import find_pictures
from finetune.predict import LoadedDetector
from finetune.predict_pictures import (
    IMAGES,
    PREDICTIONS,
    PredictionReport,
    check_free,
    predict_pictures,
    write_predictions,
)
from models.structures import Images, LayerOutput
from tests.finetune.small_detector import CLASSES, INPUT


def half_of_the_picture(images: Images) -> LayerOutput:
    """A dog in the left half, surely; a person in the whole, perhaps."""
    batch = len(images.sizes)
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]).expand(batch, 2, 4)
    probability = torch.tensor([[0.02, 0.02, 0.9, 0.06], [0.4, 0.1, 0.1, 0.4]])
    return LayerOutput(torch.zeros(batch, 2, 1), probability.log().expand(batch, 2, 4), boxes)


DETECTOR = LoadedDetector(half_of_the_picture, CLASSES, INPUT, torch.device("cpu"))


def write(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(path)


def predicted(
    folder: Path, out: Path, threshold: float = 0.5, batch_size: int = 2
) -> PredictionReport:
    return write_predictions(DETECTOR, find_pictures([str(folder)]), out, threshold, batch_size)


def test_numbers_as_file_names_are_the_image_ids(tmp_path: Path) -> None:
    write(tmp_path / "in" / "000000000139.jpg", 400, 600)
    write(tmp_path / "in" / "000000000285.png", 200, 300)
    report = predicted(tmp_path / "in", tmp_path / "out")
    results = json.loads((tmp_path / "out" / PREDICTIONS).read_text())
    assert [box["image_id"] for box in results] == [139, 285]
    assert [box["category_id"] for box in results] == [17, 17]
    assert results[0]["bbox"] == pytest.approx([0, 0, 300, 400], abs=1e-3)
    assert results[1]["bbox"] == pytest.approx([0, 0, 150, 200], abs=1e-3)
    assert results[0]["score"] == pytest.approx(0.9)
    assert (report.num_pictures, report.num_boxes, report.left_out) == (2, 2, ())


def test_other_names_are_numbered_and_the_numbers_explained(tmp_path: Path) -> None:
    write(tmp_path / "in" / "2008_000001.jpg", 20, 30)
    write(tmp_path / "in" / "b.jpg", 40, 50)
    predicted(tmp_path / "in", tmp_path / "out", threshold=0.3)
    key = json.loads((tmp_path / "out" / IMAGES).read_text())
    assert [(image["id"], image["file_name"]) for image in key["images"]] == [
        (1, "2008_000001.jpg"),
        (2, "b.jpg"),
    ]
    assert key["images"][1]["width"] == 50
    assert key["categories"] == [
        {"id": 1, "name": "person"},
        {"id": 4, "name": "car"},
        {"id": 17, "name": "dog"},
    ]
    results = json.loads((tmp_path / "out" / PREDICTIONS).read_text())
    assert [(box["image_id"], box["category_id"]) for box in results] == [
        (1, 17), (1, 1), (2, 17), (2, 1),
    ]  # fmt: skip


def test_pycocotools_reads_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "7.jpg", 20, 30)
    predicted(tmp_path / "in", tmp_path / "out")
    truth = COCO()
    truth.dataset = json.loads((tmp_path / "out" / IMAGES).read_text()) | {"annotations": []}
    truth.createIndex()
    loaded = truth.loadRes(str(tmp_path / "out" / PREDICTIONS))
    assert loaded.getAnnIds(imgIds=[7], catIds=[17]) == [1]
    capsys.readouterr()


def test_each_picture_is_drawn_below_the_name_it_had(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jpg", 500, 640)
    write(tmp_path / "in" / "sub" / "a.jpg", 500, 640)
    write(tmp_path / "in" / "c.png", 500, 640)
    write(tmp_path / "in" / "c.bmp", 500, 640)
    write(tmp_path / "in" / "a.jpeg", 500, 640)
    predicted(tmp_path / "in", tmp_path / "out")
    drawn = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in (".jpg", ".png")
    }
    assert drawn == {"a.jpg", "a-2.jpg", "sub/a.jpg", "c.png", "c.jpg"}
    with Image.open(tmp_path / "out" / "c.png") as picture:
        assert picture.size == (640, 500)
        assert picture.getpixel((0, 300)) == colour_of(2)
        assert picture.getpixel((500, 300)) == (128, 128, 128)


def test_a_url_without_a_name_has_a_drawing_all_the_same() -> None:
    urls = ["https://host/?id=3", "https://host/a/?id=4", "https://host/b.png?id=5"]
    entries = numbered_pictures(find_pictures(urls))
    assert [entry.drawn for entry in entries] == ["picture.jpg", "picture-2.jpg", "b.png"]


def test_a_broken_picture_is_left_out_and_named_and_the_rest_is_done(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jpg", 20, 30)
    write(tmp_path / "in" / "c.jpg", 20, 30)
    (tmp_path / "in" / "b.jpg").write_bytes(b"\xff\xd8 cut off")
    told: list[tuple[int, int]] = []
    refs = (
        *find_pictures([str(tmp_path / "in")]),
        *find_pictures([str(tmp_path / "gone.jpg")]),
    )
    report = write_predictions(
        DETECTOR, refs, tmp_path / "out", 0.5, 1, lambda done, total: told.append((done, total))
    )
    assert report.num_pictures == 2
    assert [Path(one.url).name for one in report.left_out] == ["b.jpg", "gone.jpg"]
    assert str(report.left_out[1]) == f"{tmp_path}/gone.jpg: no such file"
    assert told[-1] == (4, 4)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    key = json.loads((tmp_path / "out" / IMAGES).read_text())
    assert [Path(one["url"]).name for one in key["left_out"]] == ["b.jpg", "gone.jpg"]


def test_nothing_is_written_over_unless_it_is_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_free(out, overwrite=False)
    out.mkdir()
    check_free(out, overwrite=False)
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out is not empty; name another folder, or .*overwrite"):
        predict_pictures("no weights", ["a.jpg"], out)
    check_free(out, overwrite=True)
    with pytest.raises(ValueError, match=r"precious\.txt is a file"):
        check_free(out / "precious.txt", overwrite=True)


def test_mistakes_are_found_before_the_weights_are_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures: name files, folders"):
        predict_pictures("no weights", ["-"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"threshold=2\.0"):
        predict_pictures("no weights", ["a.jpg"], tmp_path / "out", threshold=2.0)


def test_more_pictures_than_wait_at_once_all_come_through(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / "in" / f"{number + 1}.png", 20 + number % 5, 30 + number)
    report = predicted(tmp_path / "in", tmp_path / "out", batch_size=2)
    assert report.num_pictures == 30
    results = json.loads((tmp_path / "out" / PREDICTIONS).read_text())
    assert sorted(box["image_id"] for box in results) == list(range(1, 31))
    for box in results:
        width = 30 + box["image_id"] - 1
        assert box["bbox"][2] == pytest.approx(width / 2, abs=1e-3)


def test_credentials_of_urls_are_not_written_down(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (5, 3)).save(stream, "PNG")
    refs = find_pictures(["https://user:secret@localhost:1/a.png?signature=secret"])
    report = write_predictions(DETECTOR, refs, tmp_path / "out", 0.5, 1)
    assert len(report.left_out) == 1
    assert "secret" not in (tmp_path / "out" / IMAGES).read_text()
