"""COCO and VOC as sources of pictures: their boxes travel in each sample as json.

COCO's json is read whole (masks are dropped while parsing, which keeps instances_train2017 under
1 GB); VOC's annotations are read one by one while the shards are written.
"""

import json
import posixpath
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from data.annotations import BoxAnnotation, annotation_json
from data.samples import PICTURE_EXTENSIONS
from data.source_items import BadItemError, LeftOut, PictureFile, Source, SourceError, unique_keys
from data.storage import Folder


def list_coco(place: Folder, pictures: Folder | None) -> Source:
    """Every image of a COCO json, by file name, with all its boxes (none is an empty list).

    The pictures are looked for in `pictures`, else where COCO's own layouts have them:
    annotations/instances_NAME.json stands beside NAME/ or images/NAME/. SourceError where they are
    not, or where the json is none of COCO's.
    """
    folder = pictures or _coco_pictures(place)
    data = _coco_json(place)
    try:
        classes = {entry["id"]: entry["name"] for entry in data.get("categories", [])}
        boxes = defaultdict[int, list[dict[str, Any]]](list)
        for entry in data.get("annotations", []):
            boxes[entry["image_id"]].append(entry)
        images = sorted(data["images"], key=lambda image: image["file_name"])
        texts = [
            annotation_json(_coco_boxes(image, boxes[image["id"]], classes)) for image in images
        ]
        names = [image["file_name"] for image in images]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{place.url} is no COCO detection json ({type(error).__name__}: {error})"
        ) from error
    items = tuple(
        PictureFile(key, name, (("json", text),))
        for key, name, text in zip(unique_keys(names), names, texts, strict=True)
    )
    return Source(folder, "coco", items, (), classes)


def list_voc(place: Folder) -> Source:
    """The pictures of a VOC root, of all years of a VOCdevkit, or of one ImageSets/Main/NAME.txt.

    A picture without an annotation (VOC's test sets) has no json; one that the split names and that
    is not there is left out.
    """
    if place.path.endswith(".txt"):
        root = Folder(_above(place.url, 3), place.filesystem, _above(place.path, 3))
        return _voc_years(root, [""], _split_names(place))
    if place.filesystem.exists(place.at("JPEGImages")):
        return _voc_years(place, [""], None)
    paths = sorted(place.filesystem.ls(place.path, detail=False))
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    years = [
        f"{name}/" for name in names if place.filesystem.exists(place.at(f"{name}/JPEGImages"))
    ]
    if not years:
        raise SourceError(f"{place.url} has no JPEGImages, nor has a folder in it: no VOC root")
    return _voc_years(place, years, None)


def read_voc_annotation(folder: Folder, name: str) -> bytes:
    """The json of a VOC annotation file; BadItemError where it cannot be read."""
    text = folder.filesystem.cat_file(folder.at(name))
    try:
        annotation = _voc_boxes(
            ElementTree.fromstring(text), posixpath.basename(name)[: -len(".xml")]
        )
    except (ElementTree.ParseError, ValueError) as error:
        raise BadItemError(f"annotation {name}: {error}") from error
    return annotation_json(annotation)


def _coco_pictures(place: Folder) -> Folder:
    name = posixpath.basename(place.path)[: -len(".json")].rpartition("_")[2]
    for above in (2, 1):
        root = Folder(_above(place.url, above), place.filesystem, _above(place.path, above))
        for folder in (root.inside(name), root.inside(f"images/{name}")):
            if folder.filesystem.exists(folder.path):
                return folder
    raise SourceError(f"no folder {name}/ beside {place.url}: name it with pictures=URL")


def _coco_json(place: Folder) -> dict[str, Any]:
    text = place.filesystem.cat_file(place.path)
    try:
        data = json.loads(text, object_hook=_without_mask)
    except ValueError as error:
        raise SourceError(f"{place.url} is no JSON: {error}") from error
    if not isinstance(data, dict) or "images" not in data:
        raise SourceError(f"{place.url} is no COCO detection json: it has no list of images")
    return data


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def _coco_boxes(
    image: dict[str, Any], entries: Sequence[dict[str, Any]], classes: dict[int, str]
) -> BoxAnnotation:
    return BoxAnnotation(
        image_id=image["id"],
        width=int(image["width"]),
        height=int(image["height"]),
        boxes_xyxy=tuple(_corners(*map(float, entry["bbox"])) for entry in entries),
        names=tuple(classes[entry["category_id"]] for entry in entries),
        labels=tuple(entry["category_id"] for entry in entries),
        areas=tuple(float(entry["area"]) for entry in entries),
        crowd=tuple(bool(entry.get("iscrowd", 0)) for entry in entries),
        difficult=(False,) * len(entries),
    )


def _corners(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    # COCO's coordinates have at most 3 decimals; a sum such as 0.1 + 0.2 would carry 17.
    return x, y, round(x + width, 3), round(y + height, 3)


def _voc_years(folder: Folder, years: Sequence[str], stems: Sequence[str] | None) -> Source:
    items, left_out = list[PictureFile](), list[LeftOut]()
    for year in years:
        pictures = _names(folder, f"{year}JPEGImages")
        annotations = set(_names(folder, f"{year}Annotations"))
        by_stem = {posixpath.splitext(name)[0]: name for name in pictures if _is_picture(name)}
        left_out += [
            LeftOut(f"{year}JPEGImages/{name}", "not a picture")
            for name in pictures
            if not _is_picture(name)
        ]
        for stem in stems if stems is not None else sorted(by_stem):
            if stem not in by_stem:
                left_out.append(LeftOut(f"{year}JPEGImages/{stem}.jpg", "no such file"))
                continue
            xml = f"{year}Annotations/{stem}.xml" if f"{stem}.xml" in annotations else None
            items.append(PictureFile(year + stem, f"{year}JPEGImages/{by_stem[stem]}", (), xml))
    keys = unique_keys(f"{item.key}.jpg" for item in items)
    keyed = (
        PictureFile(key, item.name, (), item.annotation)
        for key, item in zip(keys, items, strict=True)
    )
    return Source(folder, "voc", tuple(keyed), tuple(left_out))


def _split_names(place: Folder) -> list[str]:
    lines = place.filesystem.cat_file(place.path).decode().splitlines()
    words = [line.split() for line in lines if line.strip()]
    if any(len(line) != 1 for line in words):
        raise SourceError(
            f"{place.url} is the list of one class; use train.txt, val.txt or the like"
        )
    return list(dict.fromkeys(line[0] for line in words))


def _names(folder: Folder, name: str) -> list[str]:
    """Names of the files in a folder of the source; none where the folder is not there."""
    try:
        paths = folder.filesystem.ls(folder.at(name), detail=False)
    except FileNotFoundError:
        return []
    return sorted(path.rpartition("/")[2] for path in paths if not path.endswith("/"))


def _voc_boxes(root: ElementTree.Element, stem: str) -> BoxAnnotation:
    objects = root.findall("object")
    return BoxAnnotation(
        image_id=stem,
        width=int(_text(root, "size/width")),
        height=int(_text(root, "size/height")),
        boxes_xyxy=tuple(_voc_box(entry) for entry in objects),
        names=tuple(_text(entry, "name") for entry in objects),
        labels=None,
        areas=None,
        crowd=(False,) * len(objects),
        difficult=tuple(entry.findtext("difficult", "0").strip() == "1" for entry in objects),
    )


def _voc_box(entry: ElementTree.Element) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (
        float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    return x0 - 1, y0 - 1, x1, y1


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"<{element.tag}> has no {path}")
    return text.strip()


def _is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower()[1:] in PICTURE_EXTENSIONS


def _above(path: str, levels: int) -> str:
    for _ in range(levels):
        path = posixpath.dirname(path)
    return path
