"""Tiny labelled sets as files: what a test says of them, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.data.small_sources import jpeg

Entry = dict[str, Any]


def image(id: int | str, name: str, width: int = 9, height: int = 7) -> Entry:
    return {"id": id, "file_name": name, "width": width, "height": height}


def box(id: int, image_id: int | str, category: int, sides: Sequence[object]) -> Entry:
    """`sides` are COCO's x, y, width, height."""
    return {"id": id, "image_id": image_id, "category_id": category, "bbox": list(sides)}


def write_json(
    path: Path,
    images: Sequence[Entry],
    annotations: Sequence[Entry],
    categories: Mapping[int, str] | Sequence[Entry],
) -> Path:
    """A COCO json, and beside it each picture that it lists, as large as it says."""
    if isinstance(categories, Mapping):
        categories = [{"id": id, "name": name} for id, name in categories.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(images):
        data = jpeg(number, entry["height"], entry["width"])
        (path.parent / entry["file_name"]).write_bytes(data)
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def write_devkit(root: Path, lists: Mapping[str, Mapping[str, Sequence[str]]]) -> Path:
    """A VOCdevkit: stems by year and list, e.g. {"VOC2007": {"test": ["000001"]}}; cow and dog."""
    for year, by_list in lists.items():
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True)
        for name, stems in by_list.items():
            (root / year / f"ImageSets/Main/{name}.txt").write_text("\n".join(stems) + "\n")
            (root / year / f"ImageSets/Main/cow_{name}.txt").write_text(f"{stems[0]}  1\n")
            for stem in stems:
                (root / year / f"JPEGImages/{stem}.jpg").write_bytes(jpeg(len(stem)))
                (root / year / f"Annotations/{stem}.xml").write_text(voc_xml("cow", (2, 3, 9, 7)))
    return root


def voc_xml(name: str, sides: Sequence[object], difficult: int = 0) -> str:
    """One object in a picture of 9 x 7 pixels; `sides` are VOC's xmin, ymin, xmax, ymax."""
    xmin, ymin, xmax, ymax = sides
    return (
        "<annotation><size><width>9</width><height>7</height></size>"
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
        "</bndbox></object></annotation>"
    )


def write_yolo(root: Path, labels: Mapping[str, str | None], yaml: str) -> Path:
    """data.yaml, images/NAME.jpg of 10 x 20 pixels, and labels/NAME.txt where it is not None."""
    for number, (name, text) in enumerate(labels.items()):
        picture, label = root / f"images/{name}.jpg", root / f"labels/{name}.txt"
        for path in (picture, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(jpeg(number, height=20, width=10))
        if text is not None:
            label.write_text(text)
    (root / "data.yaml").write_text(yaml)
    return root / "data.yaml"
