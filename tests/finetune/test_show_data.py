"""The sheet of labelled pictures: what training sees, every picture that could not be said."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.source_items import SourceError
from data.synthetic import write_labelled_scenes
from finetune.show_data import DrawnData, draw_data
from training.recipe import RecipeError

PLAIN = ("kind=none", "short_sides=[96]", "max_size=160")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO json of 9 drawn pictures."""
    return write_labelled_scenes(tmp_path_factory.mktemp("scenes"), "train", seed=0, count=9)


def test_a_sheet_shows_as_many_pictures_as_were_asked_for(scenes: Path, tmp_path: Path) -> None:
    drawn = draw_data(str(scenes), tmp_path / "deep" / "sheet.png", 3, PLAIN)
    assert (drawn.num_pictures, drawn.skipped) == (3, ())
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.width == 12 + 3 * 432


def test_every_box_is_drawn_where_nothing_is_cut(scenes: Path, tmp_path: Path) -> None:
    drawn = draw_data(str(scenes), tmp_path / "sheet.png", 99, PLAIN)
    annotations = json.loads(scenes.read_text())["annotations"]
    assert drawn == DrawnData(9, len(annotations), ())


def test_the_same_seed_draws_the_same_sheet(scenes: Path, tmp_path: Path) -> None:
    sheets = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.png"
        draw_data(str(scenes), path, 4, ("short_sides=[96,128]", "max_size=213"), seed=seed)
        with Image.open(path) as sheet:
            sheets.append(np.array(sheet))
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])


def test_a_broken_picture_is_named_and_the_rest_drawn(tmp_path: Path) -> None:
    scenes = write_labelled_scenes(tmp_path / "scenes", "train", seed=1, count=3)
    broken = sorted((tmp_path / "scenes").rglob("*.jpg"))[1]
    broken.write_bytes(b"\xff\xd8 cut off")
    drawn = draw_data(str(scenes), tmp_path / "sheet.png", 3, PLAIN)
    assert drawn.num_pictures == 2
    assert len(drawn.skipped) == 1
    assert drawn.skipped[0].startswith(broken.stem)


def test_mistakes_are_named(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    with pytest.raises(RecipeError, match="flipp"):
        draw_data(str(scenes), out, 3, ("flipp=0.5",))
    with pytest.raises(ValueError, match="count=0 draws nothing"):
        draw_data(str(scenes), out, 0)
    with pytest.raises(SourceError, match="nothing"):
        draw_data(str(tmp_path / "nowhere"), out)
    assert not out.exists()


def test_real_panoptic_pictures_show_their_segments(shared_data: Path, tmp_path: Path) -> None:
    annotations = shared_data / "coco" / "annotations"
    tinted = draw_data(str(annotations / "panoptic_val2017.json"), tmp_path / "p.png", 2, PLAIN)
    boxes = draw_data(str(annotations / "instances_val2017.json"), tmp_path / "b.png", 2, PLAIN)
    assert (tinted.num_pictures, boxes.num_pictures) == (2, 2)
    assert tinted.num_boxes > 2
