"""What the tests of labelled pictures share: small picture files with boxes, and their set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.annotations import BoxAnnotation, annotation_json
from data.detection_set import DetectionSet
from data.index import ShardIndex
from data.picture_files import FileItem, PictureFiles, pack_files
from data.samples import Sample
from data.storage import open_folder
from models.structures import Classes
from tests.data.tars import jpeg

CLASSES = Classes(("cat", "dog", "emu"), (1, 4, 17))

Box = tuple[float | int, float | int, float | int, float | int]


def annotation(
    width: int,
    height: int,
    boxes_xyxy: Sequence[Box] = (),
    names: Sequence[str] = (),
    crowd: Sequence[bool] | None = None,
    difficult: Sequence[bool] | None = None,
) -> BoxAnnotation:
    """Boxes of a picture; no crowds and nothing difficult unless said."""
    no = (False,) * len(names)
    return BoxAnnotation(
        image_id=7,
        width=width,
        height=height,
        boxes_xyxy=tuple(_floats(*box) for box in boxes_xyxy),
        names=tuple(names),
        labels=None,
        areas=None,
        crowd=no if crowd is None else tuple(crowd),
        difficult=no if difficult is None else tuple(difficult),
    )


def sample_with(found: BoxAnnotation, picture: bytes | None = None) -> Sample:
    """A sample with a JPEG of the annotated size, unless another picture is given."""
    data = jpeg(found.width, found.height, 0) if picture is None else picture
    return Sample(3, "p3", "p3.jpg", {"jpg": data, "json": annotation_json(found)})


def write_files(
    folder: Path, count: int, broken: Sequence[int] = (), missing: Sequence[int] = ()
) -> tuple[ShardIndex, PictureFiles]:
    """`count` pictures of varied aspect; picture n has n % 4 boxes of class n % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [_write_file(folder, id, id in broken, id in missing) for id in range(count)]
    return pack_files(open_folder(str(folder)), items)


def files_set(folder: Path, count: int, broken: Sequence[int] = ()) -> DetectionSet:
    """The pictures of `write_files` as a set."""
    index, files = write_files(folder, count, broken)
    return DetectionSet(str(folder), "coco", index, files, CLASSES)


def _floats(*sides: float | int) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, sides)
    return left, top, right, bottom


def _write_file(folder: Path, id: int, is_broken: bool, is_missing: bool) -> FileItem:
    generator = np.random.default_rng(id)
    width, height = (int(side) for side in generator.integers(24, 60, 2))
    boxes = [(1.0 + n, 2.0, 9.5 + 2 * n, 20.25) for n in range(id % 4)]
    name = f"{id:04}.jpg"
    if not is_missing:
        data = b"no picture" if is_broken else jpeg(width, height, id)
        (folder / name).write_bytes(data)
    found = annotation(width, height, boxes, [CLASSES.names[id % 3]] * len(boxes))
    return FileItem(f"p{id}", name, annotation_json(found), width, height)
