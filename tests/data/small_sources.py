"""Tiny picture files for the tests of sources and shards."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image


def jpeg(number: int, height: int = 7, width: int = 9) -> bytes:
    """A small JPEG whose pixels depend on `number`."""
    pixels = np.random.default_rng(number).integers(256, size=(height, width, 3), dtype=np.uint8)
    data: bytes = simplejpeg.encode_jpeg(pixels)
    return data


def png(height: int = 5, width: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(root: Path, names: Iterable[str]) -> Path:
    """One JPEG for each name, all different."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, width=9 + number % 5))
    return root


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """A tar as others write it: pax headers, times, owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = files.items() if isinstance(files, Mapping) else files
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in pairs:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uname = len(data), 1_700_000_000, "somebody"
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_coco(root: Path, names: Iterable[str]) -> Path:
    """annotations/instances_train.json beside train/, one box in each picture but the first."""
    pictures = list(names)
    write_pictures(root / "train", pictures)
    images = [
        {"id": 100 + number, "file_name": name, "height": 7, "width": 9 + number % 5}
        for number, name in enumerate(pictures)
    ]
    boxes = [
        {
            "id": number,
            "image_id": 100 + number,
            "category_id": 90,
            "bbox": [1.1, 2, 3.2, 4],
            "area": 11.5,
            "iscrowd": number % 2,
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        }
        for number in range(1, len(pictures))
    ]
    data = {
        "images": images,
        "annotations": boxes,
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    }
    path = root / "annotations" / "instances_train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    return path


def write_voc(root: Path, stems: Iterable[str]) -> Path:
    """A VOC year; the last picture has no annotation, as in VOC's test sets."""
    names = list(stems)
    write_pictures(root / "JPEGImages", (f"{stem}.jpg" for stem in names))
    (root / "Annotations").mkdir()
    for stem in names[:-1]:
        (root / "Annotations" / f"{stem}.xml").write_text(VOC_XML)
    splits = root / "ImageSets" / "Main"
    splits.mkdir(parents=True)
    (splits / "val.txt").write_text("\n".join(names[:2]) + "\n")
    (splits / "cow_val.txt").write_text("\n".join(f"{stem}  1" for stem in names[:2]))
    return root


VOC_XML = """<annotation><filename>x.jpg</filename>
<size><width>9</width><height>7</height><depth>3</depth></size>
<object><name>cow</name><difficult>1</difficult>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>7</ymax></bndbox></object>
<object><name>dog</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>5.5</ymax></bndbox></object>
</annotation>"""
