"""COCO panoptic as picture files: a json of segments, a folder of PNGs, a folder of pictures.

Boxes are those of the json, the segments' exact pixel extent. The public code takes them from the
masks anew and leaves out the last row and column of pixels (a box from 3 to 7 is 4 wide there, 5
here). Classes are things and stuff, by rising id.
"""

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.annotation_faults import AnnotationFault, box_faults
from data.annotations import BoxAnnotation, annotation_json
from data.picture_files import FileItem
from data.source_items import SourceError, unique_keys
from data.storage import Folder
from models.structures import Classes

_Entry = dict[str, Any]


@dataclass(frozen=True)
class PanopticListing:
    """The pictures of a COCO panoptic json."""

    folder: Folder
    """That holds pictures and PNGs; the items' paths are relative to it."""
    items: tuple[FileItem, ...]
    """By file name; a picture with an object that cannot be used is not among them."""
    classes: Classes
    """With `things`; classes without any segment are among them."""
    faults: tuple[AnnotationFault, ...]


def list_panoptic(
    place: Folder, pictures: Folder | None = None, segments: Folder | None = None
) -> PanopticListing:
    """Every picture of the json at `place`, with its segments.

    Folders that are not given are looked for where COCO has them: for DIR/panoptic_NAME.json the
    pictures in NAME/ or images/NAME/ beside DIR/, the PNGs in panoptic_NAME/ inside DIR/ or beside
    it. Raises SourceError, in one line, where they are not there or the json is no panoptic one.
    """
    data = _panoptic_json(place)
    pictures = pictures or _found(place, "pictures", _picture_folders(place))
    segments = segments or _found(place, "segments", _segment_folders(place))
    folder, picture_path, segment_path = _common_folder(place, pictures, segments)
    try:
        classes = _classes(data["categories"])
        entries = _by_image(place, data["annotations"])
        images = sorted(data["images"], key=lambda image: str(image["file_name"]))
        faults: list[AnnotationFault] = []
        keys = unique_keys([image["file_name"] for image in images])
        items = [
            _item(key, image, entries, classes, (picture_path, segment_path), faults)
            for key, image in zip(keys, images, strict=True)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{place.url} is no COCO panoptic json ({type(error).__name__}: {error})"
        ) from error
    except ValueError as error:
        raise SourceError(f"{place.url}: {error}") from error
    usable = tuple(item for item in items if item is not None)
    return PanopticListing(folder, usable, classes, tuple(faults))


def is_panoptic_json(data: Mapping[str, Any]) -> bool:
    """Whether a parsed json is of COCO panoptic: its annotations list segments."""
    annotations = data.get("annotations")
    return isinstance(annotations, list) and bool(annotations) and "segments_info" in annotations[0]


def _panoptic_json(place: Folder) -> _Entry:
    try:
        data = json.loads(place.filesystem.cat_file(place.path))
    except ValueError as error:
        raise SourceError(f"{place.url} is no JSON: {error}") from error
    if not isinstance(data, dict) or not is_panoptic_json(data):
        raise SourceError(
            f"{place.url} is no COCO panoptic json: its annotations have no segments_info; "
            "for boxes alone say kind=coco"
        )
    return data


def _classes(categories: Sequence[_Entry]) -> Classes:
    rising = sorted(categories, key=lambda category: int(category["id"]))
    return Classes(
        names=tuple(str(category["name"]) for category in rising),
        ids=tuple(int(category["id"]) for category in rising),
        things=tuple(bool(category["isthing"]) for category in rising),
    )


def _by_image(place: Folder, annotations: Sequence[_Entry]) -> dict[int, _Entry]:
    entries: dict[int, _Entry] = {}
    for entry in annotations:
        if entry["image_id"] in entries:
            raise SourceError(
                f"{place.url} has two annotations of image {entry['image_id']}; keep one of them"
            )
        entries[entry["image_id"]] = entry
    return entries


def _item(
    key: str,
    image: _Entry,
    entries: Mapping[int, _Entry],
    classes: Classes,
    paths: tuple[str, str],
    faults: list[AnnotationFault],
) -> FileItem | None:
    """One picture, or None where something is wrong with it, which is added to the faults."""
    name, entry = str(image["file_name"]), entries.get(image["id"])
    if entry is None:
        problem = f"image {image['id']} has no segments in the json; it is left out"
        faults.append(AnnotationFault("error", "missing annotation", name, None, problem))
        return None
    infos = entry["segments_info"]
    found = _segment_faults(name, infos, classes)
    if not found:
        annotation = _annotation(image, infos, classes)
        found = list(box_faults(name, annotation, lambda place: f"segment {infos[place]['id']}"))
    faults += found
    if any(fault.severity == "error" for fault in found):
        return None
    return FileItem(
        key=key,
        name=posixpath.join(paths[0], name),
        annotation=annotation_json(annotation),
        width=annotation.width,
        height=annotation.height,
        segments=posixpath.join(paths[1], str(entry["file_name"])),
    )


def _segment_faults(name: str, infos: Sequence[_Entry], classes: Classes) -> list[AnnotationFault]:
    faults: list[AnnotationFault] = []
    seen: set[int] = set()
    for info in infos:
        told, id = f"segment {info['id']}", info["id"]
        if info["category_id"] not in classes.ids:
            problem = f"category_id {info['category_id']} is none of the {len(classes.ids)} there"
            faults.append(AnnotationFault("error", "unknown class", name, told, problem))
        if id in seen or not 0 < id < 1 << 24:
            problem = "its id must come once, and be from 1 to 2^24 - 1"
            faults.append(AnnotationFault("error", "duplicate id", name, told, problem))
        seen.add(id)
    return faults


def _annotation(image: _Entry, infos: Sequence[_Entry], classes: Classes) -> BoxAnnotation:
    names = dict(zip(classes.ids, classes.names, strict=True))
    return BoxAnnotation(
        image_id=image["id"],
        width=int(image["width"]),
        height=int(image["height"]),
        boxes_xyxy=tuple(_corners(*map(float, info["bbox"])) for info in infos),
        names=tuple(names[info["category_id"]] for info in infos),
        labels=tuple(int(info["category_id"]) for info in infos),
        areas=tuple(float(info["area"]) for info in infos),
        crowd=tuple(bool(info.get("iscrowd", 0)) for info in infos),
        difficult=(False,) * len(infos),
        segment_ids=tuple(int(info["id"]) for info in infos),
    )


def _corners(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x, y, x + width, y + height


def _picture_folders(place: Folder) -> list[Folder]:
    root, name = _root_and_name(place)
    split = name.removeprefix("panoptic_")
    return [root.inside(split), root.inside(f"images/{split}")]


def _segment_folders(place: Folder) -> list[Folder]:
    root, name = _root_and_name(place)
    beside = Folder(posixpath.dirname(place.url), place.filesystem, posixpath.dirname(place.path))
    return [beside.inside(name), root.inside(name)]


def _root_and_name(place: Folder) -> tuple[Folder, str]:
    """The folder above that of the json, and the json's name without its ending."""
    url, path = (posixpath.dirname(posixpath.dirname(text)) for text in (place.url, place.path))
    name = posixpath.splitext(posixpath.basename(place.path))[0]
    return Folder(url or ".", place.filesystem, path), name


def _found(place: Folder, what: str, candidates: Sequence[Folder]) -> Folder:
    for folder in candidates:
        if folder.filesystem.isdir(folder.path):
            return folder
    places = " nor ".join(folder.url for folder in candidates)
    raise SourceError(f"{place.url}: its {what} are neither in {places}; put or name them there")


def _common_folder(place: Folder, pictures: Folder, segments: Folder) -> tuple[Folder, str, str]:
    """The folder that holds both, and the path of each in it."""
    if type(pictures.filesystem) is not type(segments.filesystem):
        raise SourceError(
            f"{place.url}: pictures in {pictures.url} and segments in {segments.url} lie on two "
            "storages; put them on one"
        )
    common = posixpath.commonpath([pictures.path, segments.path])
    url = common if pictures.is_local else pictures.filesystem.unstrip_protocol(common)
    folder = Folder(url, pictures.filesystem, common.rstrip("/"))
    picture_path, segment_path = (
        posixpath.relpath(each.path, common) for each in (pictures, segments)
    )
    return folder, picture_path, segment_path
