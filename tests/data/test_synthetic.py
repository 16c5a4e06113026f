"""The demo's pictures: reproducible, varied, textured everywhere, with boxes that fit."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.pictures import decode_picture
from data.randomness import sample_generator
from data.synthetic import draw_scene, write_labelled_scenes, write_scenes
from data.textures import TEXTURES, Texture, painted


def test_a_scene_depends_on_seed_and_number_alone() -> None:
    first = draw_scene(3, 7)
    draw_scene(3, 8)
    again = draw_scene(3, 7)
    assert again.jpeg == first.jpeg
    assert again.boxes_xyxy.tolist() == first.boxes_xyxy.tolist()
    digests = {hashlib.sha256(draw_scene(*pair).jpeg).digest() for pair in [(3, 7), (3, 8), (4, 7)]}
    assert len(digests) == 3


def test_scenes_have_many_sizes_and_both_orientations() -> None:
    scenes = [draw_scene(0, number) for number in range(24)]
    assert len({(scene.height, scene.width) for scene in scenes}) > 20
    assert {scene.height > scene.width for scene in scenes} == {True, False}
    for scene in scenes:
        short, long = sorted((scene.height, scene.width))
        assert 180 <= short <= 300
        assert long <= 1.8 * short
        assert decode_picture(scene.jpeg).shape == (scene.height, scene.width, 3)


def test_boxes_lie_in_the_picture_and_belong_to_shapes() -> None:
    for number in range(12):
        scene = draw_scene(1, number)
        assert len(scene.shapes) == len(scene.boxes_xyxy)
        assert 5 <= len(scene.shapes) <= 9
        x0, y0, x1, y1 = scene.boxes_xyxy.T
        assert np.all((x0 >= 0) & (y0 >= 0) & (x1 <= scene.width) & (y1 <= scene.height))
        assert np.all((x1 - x0 > 4) & (y1 - y0 > 4))


def test_no_area_of_a_scene_is_flat() -> None:
    """A random patch must be recognisable: the grey levels of every 32 x 32 cell vary."""
    for number in range(12):
        grey = cv2.cvtColor(decode_picture(draw_scene(2, number).jpeg), cv2.COLOR_RGB2GRAY)
        rows, columns = grey.shape[0] // 32, grey.shape[1] // 32
        cells = grey[: rows * 32, : columns * 32].reshape(rows, 32, columns, 32)
        assert cells.std(axis=(1, 3)).min() > 2.5


@pytest.mark.parametrize("texture", TEXTURES)
def test_every_texture_fills_any_size(texture: Texture) -> None:
    for height, width in ((1, 1), (2, 37), (40, 3)):
        picture = painted(texture, height, width, sample_generator(0, 0, 5))
        assert picture.shape == (height, width, 3)
        assert picture.dtype == np.uint8


def test_scenes_are_written_as_files(tmp_path: Path) -> None:
    write_scenes(tmp_path / "new" / "folder", 5, 3)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in files] == [f"scene_00000{number}.jpg" for number in range(3)]
    assert files[2].read_bytes() == draw_scene(5, 2).jpeg


def test_labelled_scenes_are_a_coco_set_whose_boxes_are_the_scenes(tmp_path: Path) -> None:
    place = write_labelled_scenes(tmp_path, "val", seed=4, count=3)
    assert place == tmp_path / "annotations" / "instances_val.json"
    data = json.loads(place.read_text())
    scene = draw_scene(4, 2)
    third = [entry for entry in data["annotations"] if entry["image_id"] == 3]
    assert [entry["bbox"] for entry in third] == [
        [x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in scene.boxes_xyxy.tolist()
    ]
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    assert tuple(names[entry["category_id"]] for entry in third) == scene.shapes
    assert (tmp_path / "val" / "scene_000002.jpg").read_bytes() == scene.jpeg
    assert len({entry["id"] for entry in data["annotations"]}) == len(data["annotations"])
