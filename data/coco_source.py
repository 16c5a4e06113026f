"""A COCO json as a source of pictures: their boxes travel in each sample as json.

The json is read whole. Polygons are taken out of its text before it is parsed: a json of the size
of instances_train2017 (450 MB, 118,000 pictures, 860,000 boxes) then takes 7 s CPU instead of 17,
and opening the set 20 s and 1.5 GB at its height (measured on two busy cores).
"""

import json
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data.annotation_faults import AnnotationFault, FaultKind, box_faults, first_error_by_file
from data.annotations import BoxAnnotation, annotation_json
from data.source_items import LeftOut, PictureFile, Source, SourceError, unique_keys
from data.storage import Folder

_Entry = dict[str, Any]

_NUMBERS = frozenset((int, float))

# An unescaped quote ends a JSON string, so these bytes are a key wherever they stand. Only lists of
# numbers are matched; a crowd's run lengths are dropped while parsing.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[\[\]\d\s.,eE+-]*\]')


def list_coco(place: Folder, pictures: Folder | None) -> Source:
    """Every image of a COCO json, by file name, with all its boxes (none is an empty list).

    The pictures are looked for in `pictures`, else beside the json and where COCO's own layouts
    have them: annotations/instances_NAME.json stands beside NAME/ or images/NAME/. A picture with
    an object that cannot be used is left out, and the object named in the faults.
    Raises SourceError where the pictures are not there, or the json is none of COCO's.
    """
    data = _coco_json(place)
    try:
        return _source(place, pictures, data)
    except SourceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{place.url} is no COCO detection json ({type(error).__name__}: {error})"
        ) from error


def _source(place: Folder, pictures: Folder | None, data: _Entry) -> Source:
    categories, entries = data.get("categories", []), data.get("annotations", [])
    classes = _classes(place, categories)
    images = sorted(data["images"], key=lambda image: image["file_name"])
    _check_images(place, images)
    faults = list(_repeated_images(images))
    objects, bad_objects = _objects(posixpath.basename(place.path), images, entries, classes)
    faults += bad_objects
    texts = list[bytes]()
    for image in images:
        found = objects.get(image["id"], [])
        annotation = _annotation(image, found, classes)
        faults += box_faults(image["file_name"], annotation, _told(found, classes))
        texts.append(annotation_json(annotation))
    faults += _unused_classes(posixpath.basename(place.path), categories, objects)
    spoilt = first_error_by_file(faults)
    names = [image["file_name"] for image in images]
    items = tuple(
        PictureFile(key, name, (("json", text),), int(image["width"]), int(image["height"]))
        for key, name, text, image in zip(unique_keys(names), names, texts, images, strict=True)
        if name not in spoilt
    )
    left_out = tuple(LeftOut(name, spoilt[name]) for name in dict.fromkeys(names) if name in spoilt)
    folder = pictures or _coco_pictures(place, names)
    return Source(folder, "coco", items, left_out, classes, faults=tuple(faults))


def _coco_json(place: Folder) -> _Entry:
    text = _POLYGONS.sub(b'"segmentation":0', place.filesystem.cat_file(place.path))
    try:
        data = json.loads(text, object_hook=_without_mask)
    except ValueError as error:
        raise SourceError(f"{place.url} is no JSON: {error}") from error
    if not isinstance(data, dict) or "images" not in data:
        raise SourceError(f"{place.url} is no COCO detection json: it has no list of images")
    if data.get("annotations") and "segments_info" in data["annotations"][0]:
        raise SourceError(f"{place.url} is a panoptic json: say kind=coco_panoptic")
    if data.get("annotations") and not data.get("categories"):
        raise SourceError(
            f"{place.url} has annotations but no categories: add the list that says what its "
            'category_id mean, [{"id": 1, "name": "..."}, ...]'
        )
    return data


def _without_mask(entry: _Entry) -> _Entry:
    entry.pop("segmentation", None)
    return entry


def _classes(place: Folder, categories: Sequence[_Entry]) -> dict[int, str]:
    """Name of each class by its id; SourceError where one is no integer or comes twice."""
    for entry in categories:
        if type(entry["id"]) is not int or type(entry["name"]) is not str:
            raise SourceError(
                f"{place.url}: category {entry['name']!r} has id {entry['id']!r}; ids are integers "
                "and names are text"
            )
    for key in ("id", "name"):
        for value, count in Counter(entry[key] for entry in categories).items():
            if count > 1:
                raise SourceError(
                    f"{place.url}: {count} categories have the {key} {value!r}; give each its own"
                )
    return {entry["id"]: entry["name"] for entry in categories}


def _check_images(place: Folder, images: Sequence[_Entry]) -> None:
    for image in images:
        sides = image.get("width"), image.get("height")
        if not _NUMBERS.issuperset(map(type, sides)):
            raise SourceError(
                f"{place.url}: image {image['file_name']} has width {sides[0]!r} and height "
                f"{sides[1]!r}; give both in pixels"
            )
        if type(image["id"]) not in (int, str):
            raise SourceError(
                f"{place.url}: image {image['file_name']} has id {image['id']!r}; ids are integers "
                "or text"
            )


def _repeated_images(images: Sequence[_Entry]) -> Iterator[AnnotationFault]:
    """Whose boxes a picture has is not known where two have one id, or two entries one file."""
    ids = Counter(image["id"] for image in images)
    names = Counter(image["file_name"] for image in images)
    for image in images:
        id, name = image["id"], image["file_name"]
        if ids[id] > 1:
            problem = f"image id {id} stands for {ids[id]} pictures; give each its own"
            yield AnnotationFault("error", "duplicate id", name, f"image {id}", problem)
        if names[name] > 1:
            problem = f"the file is listed {names[name]} times; list it once, with all its boxes"
            yield AnnotationFault("error", "duplicate id", name, f"image {id}", problem)


def _objects(
    json_name: str,
    images: Sequence[_Entry],
    entries: Sequence[_Entry],
    classes: Mapping[int, str],
) -> tuple[dict[int | str, list[_Entry]], list[AnnotationFault]]:
    """The usable annotations of each image by its id, and what is wrong with the others."""
    names = {image["id"]: image["file_name"] for image in images}
    objects, faults = defaultdict[int | str, list[_Entry]](list), list[AnnotationFault]()
    seen = set[object]()
    for entry in entries:
        id, name = entry.get("id"), names.get(entry.get("image_id"))
        found = _entry_problem(entry, classes)
        if name is None:
            problem = f"image_id {entry.get('image_id')} is not in the list of images"
            found = "no such image", problem
        elif id is not None and id in seen:
            found = "duplicate id", f"annotation id {id} is given twice; give each its own"
        seen.add(id)
        if found is None:
            objects[entry["image_id"]].append(entry)
        else:
            file = name or json_name
            faults.append(AnnotationFault("error", found[0], file, f"annotation {id}", found[1]))
    return objects, faults


def _entry_problem(entry: _Entry, classes: Mapping[int, str]) -> tuple[FaultKind, str] | None:
    category, box = entry.get("category_id"), entry.get("bbox")
    if type(category) not in _NUMBERS or category not in classes:
        return "unknown class", f"category_id {category!r} is not in the list of categories"
    if type(box) is not list or len(box) != 4:
        return "unreadable annotation", f"bbox is {box!r}, not [x, y, width, height] in pixels"
    if not _NUMBERS.issuperset(map(type, box)):
        return "not a number", f"bbox {box} holds what is not a number"
    return None


def _annotation(
    image: _Entry, entries: Sequence[_Entry], classes: Mapping[int, str]
) -> BoxAnnotation:
    labels = tuple([int(entry["category_id"]) for entry in entries])
    return BoxAnnotation(
        image_id=image["id"],
        width=int(image["width"]),
        height=int(image["height"]),
        boxes_xyxy=tuple([_corners(*entry["bbox"]) for entry in entries]),
        names=tuple([classes[label] for label in labels]),
        labels=labels,
        areas=tuple([_area(entry) for entry in entries]),
        crowd=tuple([bool(entry.get("iscrowd", 0)) for entry in entries]),
        difficult=(False,) * len(entries),
    )


def _corners(
    x: float | int, y: float | int, width: float | int, height: float | int
) -> tuple[float, float, float, float]:
    # COCO's coordinates have at most 3 decimals; a sum such as 0.1 + 0.2 would carry 17.
    return float(x), float(y), round(float(x + width), 3), round(float(y + height), 3)


def _area(entry: _Entry) -> float:
    """Of the mask; of the box where somebody's own json gives none."""
    area = entry.get("area")
    return float(entry["bbox"][2] * entry["bbox"][3] if area is None else area)


def _told(entries: Sequence[_Entry], classes: Mapping[int, str]) -> Callable[[int], str]:
    """How a message names one of these annotations, by its place among them."""
    return lambda number: (
        f"annotation {entries[number].get('id')} ({classes[entries[number]['category_id']]})"
    )


def _unused_classes(
    json_name: str, categories: Sequence[_Entry], objects: Mapping[int | str, Sequence[_Entry]]
) -> Iterator[AnnotationFault]:
    """A class that only heads the others, as Roboflow writes it at id 0, would be learned too.

    Other classes without boxes are well: COCO's own 80 are not all in every part of it.
    """
    for entry in categories:
        others = {other.get("supercategory") for other in categories if other is not entry}
        if others == {entry["name"]} and not _has_boxes(entry["id"], objects):
            problem = (
                "has no boxes and is the supercategory of all others: an export's own entry, no "
                "class; take it out of the categories, or the detector learns one class too many"
            )
            told = f"category {entry['id']} ({entry['name']})"
            yield AnnotationFault("warning", "unused class", json_name, told, problem)


def _has_boxes(id: int, objects: Mapping[int | str, Sequence[_Entry]]) -> bool:
    return any(entry["category_id"] == id for found in objects.values() for entry in found)


def _coco_pictures(place: Folder, names: Sequence[str]) -> Folder:
    """The folder that has the first picture; else the one that is named like the json."""
    split = posixpath.basename(place.path)[: -len(".json")].rpartition("_")[2]
    above = [
        Folder(_above(place.url, level), place.filesystem, _above(place.path, level))
        for level in (1, 2)
    ]
    named = [root.inside(name) for root in reversed(above) for name in (split, f"images/{split}")]
    for folder in (
        *named,
        above[0],
        above[0].inside("images"),
        above[1].inside("images"),
        above[1],
    ):
        if names and folder.filesystem.exists(folder.at(names[0])):
            return folder
    for folder in named:
        if folder.filesystem.exists(folder.path):
            return folder
    raise SourceError(
        f"no folder {split}/ beside {place.url}, and no picture beside it: name it with "
        "pictures=URL"
    )


def _above(path: str, levels: int) -> str:
    for _ in range(levels):
        path = posixpath.dirname(path)
    return path
