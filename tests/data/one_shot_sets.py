"""Small pictures whose pixels say what they are: a query crop can be told by its colour."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.annotations import annotation_json
from data.detection_set import DetectionSet
from data.picture_files import FileItem, pack_files
from data.storage import open_folder
from tests.data.labelled import CLASSES, annotation

Objects = Sequence[tuple[str, tuple[float, float, float, float]]]

LEVEL = 80
"""Objects of label n are LEVEL * (n + 1) in red; green is the number of the picture."""

SCENES: tuple[Objects, ...] = (
    (("cat", (2, 2, 20, 22)), ("dog", (24, 4, 44, 20)), ("cat", (4, 24, 18, 38))),
    (("emu", (3, 3, 30, 30)),),
    (("dog", (10, 10, 34, 30)), ("emu", (2, 30, 20, 42))),
    (("cat", (5, 6, 30, 36)),),
    (),
    (("dog", (8, 4, 40, 24)), ("cat", (6, 26, 40, 40))),
)
"""By picture; all are 48 x 44 pixels."""


def scene_set(
    folder: Path, scenes: Sequence[Objects] = SCENES, broken: Sequence[int] = ()
) -> DetectionSet:
    """PNG files of the scenes as a set of cats, dogs and emus."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for number, objects in enumerate(scenes):
        name = f"{number:03}.png"
        picture = b"no picture" if number in broken else _painted(number, objects)
        (folder / name).write_bytes(picture)
        boxes = [tuple(map(float, box)) for _, box in objects]
        found = annotation(48, 44, boxes, [name for name, _ in objects])  # type: ignore[arg-type]
        items.append(FileItem(f"scene{number}", name, annotation_json(found), 48, 44))
    index, files = pack_files(open_folder(str(folder)), items)
    return DetectionSet(str(folder), "coco", index, files, CLASSES)


def told_by(crop: np.ndarray) -> tuple[str, int]:
    """The class that a query crop shows, and the number of the picture it is from."""
    red, green, _ = crop[crop.shape[0] // 2, crop.shape[1] // 2].tolist()
    return CLASSES.names[red // LEVEL - 1], green


def _painted(number: int, objects: Objects) -> bytes:
    picture = np.zeros((44, 48, 3), np.uint8)
    picture[..., 1] = number
    for name, (left, top, right, bottom) in objects:
        box = (slice(int(top), int(bottom)), slice(int(left), int(right)))
        picture[box][..., 0] = LEVEL * (CLASSES.names.index(name) + 1)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_coco(folder: Path, scenes: Sequence[Objects] = SCENES) -> tuple[str, str]:
    """The scenes as a COCO json and the folder of its pictures."""
    scene_set(folder / "pictures", scenes)
    boxes = [(number, name, box) for number, objects in enumerate(scenes) for name, box in objects]
    content = {
        "images": [
            {"id": number, "file_name": f"{number:03}.png", "width": 48, "height": 44}
            for number in range(len(scenes))
        ],
        "annotations": [
            {
                "id": number + 1,
                "image_id": image,
                "category_id": CLASSES.ids[CLASSES.names.index(name)],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": (box[2] - box[0]) * (box[3] - box[1]),
                "iscrowd": 0,
            }
            for number, (image, name, box) in enumerate(boxes)
        ],
        "categories": [
            {"id": id, "name": name} for id, name in zip(CLASSES.ids, CLASSES.names, strict=True)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return str(folder / "instances.json"), str(folder / "pictures")
