"""A small COCO panoptic set on disk: coloured rectangles before a sky and a sea."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.detection_set import DetectionSet, open_detection_set
from data.panoptic_maps import encode_segment_ids

CATEGORIES = (
    {"id": 17, "name": "cat", "isthing": 1, "supercategory": "animal"},
    {"id": 4, "name": "dog", "isthing": 1, "supercategory": "animal"},
    {"id": 200, "name": "sea", "isthing": 0, "supercategory": "water"},
    {"id": 180, "name": "sky", "isthing": 0, "supercategory": "outdoor"},
)
COLOURS = {17: (230, 40, 40), 4: (240, 220, 30), 200: (20, 60, 200), 180: (150, 220, 250)}


def write_panoptic(root: Path, count: int, split: str = "train2017") -> Path:
    """The json of `count` pictures of 48 x 64; every third one has a crowd of dogs."""
    for folder in ("annotations", split, f"panoptic_{split}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        name = f"{number:012d}"
        ids, infos = _segments(number)
        _picture(ids, infos).save(root / split / f"{name}.jpg", quality=95)
        (root / f"panoptic_{split}" / f"{name}.png").write_bytes(encode_segment_ids(ids))
        images.append({"id": number, "file_name": f"{name}.jpg", "height": 48, "width": 64})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": infos})
    path = root / "annotations" / f"panoptic_{split}.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    return path


def panoptic_set(root: Path, count: int, split: str = "train2017") -> DetectionSet:
    """The same, opened."""
    return open_detection_set(str(write_panoptic(root, count, split)), kind="coco_panoptic")


def _segments(number: int) -> tuple[np.ndarray, list[dict[str, object]]]:
    rng = np.random.default_rng(number)
    horizon = int(rng.integers(16, 32))
    ids = np.full((48, 64), 1_000_000 + number, np.int32)
    ids[horizon:] = 70_000 + number
    categories = {1_000_000 + number: 180, 70_000 + number: 200}
    for place, category in enumerate((17, 4)):
        top, left = int(rng.integers(4, 26)), int(rng.integers(2, 12)) + 30 * place
        ids[top : top + 16, left : left + 20] = 300 + place
        categories[300 + place] = category
    crowds = {301} if number % 3 == 2 else set()
    return ids, [_info(ids, id, category, id in crowds) for id, category in categories.items()]


def _info(ids: np.ndarray, id: int, category: int, is_crowd: bool) -> dict[str, object]:
    rows, columns = np.nonzero(ids == id)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    return {
        "id": id,
        "category_id": category,
        "iscrowd": int(is_crowd),
        "bbox": box,
        "area": len(rows),
    }


def _picture(ids: np.ndarray, infos: list[dict[str, object]]) -> Image.Image:
    pixels = np.zeros((*ids.shape, 3), np.uint8)
    for info in infos:
        pixels[ids == info["id"]] = COLOURS[int(str(info["category_id"]))]
    return Image.fromarray(pixels)
