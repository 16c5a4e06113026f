"""An Ultralytics data.yaml as a source of pictures, as its users write it.

`train`, `val` and `test` are a folder, a list file, or several of them; the label file of a picture
is at its path with the last `images` replaced by `labels`. A line is `class x y width height` in
shares of the picture, or a polygon, of which the box is taken. The size of each picture is read
from the first bytes of its file, many at a time: 11,540 take 4 s CPU (measured on a local disk).
"""

import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import yaml

from data.annotation_faults import (
    AnnotationFault,
    CheckedAnnotation,
    checked,
    no_permission,
    unusable,
)
from data.annotations import BoxAnnotation
from data.picture_headers import PictureHeader, read_header
from data.pictures import BrokenPicture
from data.source_items import Source, SourceError, annotated_items, unique_keys
from data.storage import Folder
from data.trees import is_picture, tree

_SPLITS = ("train", "val", "test")
_THREADS = 32


def list_yolo(place: Folder, split: str | None = None) -> Source:
    """The pictures of a split of a data.yaml (`train` unless named), with their boxes.

    A picture without a label file has no boxes, as in Ultralytics; that none has a box is a fault.
    One that is not there or is broken, or with a line that cannot be used, is left out, with a
    fault.
    Raises SourceError where that is no data.yaml, or has no such split, or it holds no picture.
    """
    data = _read_yaml(place)
    classes = _classes(place, data)
    paths = _pictures(place, data, split or "train")
    folder = _common_folder(place, paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        read = list(pool.map(partial(_read, folder, classes), paths))
    names = [_below(folder, path) for path in paths]
    items, spoilt = annotated_items(unique_keys(names), names, read)
    faults = tuple(fault for one in read for fault in one.faults)
    if items and not any(one.annotation.names for one in read if one.annotation):
        faults += (_no_boxes(place, paths),)
    return Source(folder, "yolo", items, tuple(spoilt), classes, faults=faults)


def label_path(picture: str) -> str:
    """Path of the label file that belongs to a picture."""
    before, folder, after = posixpath.splitext(picture)[0].rpartition("/images/")
    return f"{before}/labels/{after}.txt" if folder else f"{after}.txt"


def _read_yaml(place: Folder) -> dict[str, Any]:
    try:
        data = yaml.safe_load(place.filesystem.cat_file(place.path))
    except yaml.YAMLError as error:
        raise SourceError(f"{place.url} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or "names" not in data:
        raise SourceError(f"{place.url} is no data.yaml of YOLO: it has no names of classes")
    return data


def _classes(place: Folder, data: Mapping[str, Any]) -> dict[int, str]:
    """Name of each class by the number that the label files give it."""
    names, told = data["names"], data.get("nc")
    classes = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(classes, dict) or not classes:
        raise SourceError(f"{place.url}: names is {names!r}; it is a list, or {{0: NAME, ...}}")
    for id, name in classes.items():
        if type(id) is not int or id < 0:
            raise SourceError(f"{place.url}: class {name!r} has number {id!r}; use 0, 1, 2, ...")
    if told is not None and told != len(classes):
        raise SourceError(f"{place.url}: nc is {told}, but names has {len(classes)}; take nc out")
    return {id: str(name) for id, name in classes.items()}


def _pictures(place: Folder, data: Mapping[str, Any], split: str) -> list[str]:
    """Paths of a split's pictures inside the filesystem, sorted, each once."""
    entry = data.get(split)
    if split not in _SPLITS or not entry:
        there = ", ".join(f"#{name}" for name in _SPLITS if data.get(name)) or "none"
        raise SourceError(f"{place.url} has no split {split!r}; those it has: {there}")
    found = set[str]()
    for one in entry if isinstance(entry, list) else [entry]:
        path = _entry_path(place, str(data.get("path") or ""), str(one))
        found.update(_listed(place, path) if path.endswith(".txt") else _below_folder(place, path))
    if not found:
        raise SourceError(
            f"{place.url}: {split}={entry!r} holds no picture; check path and {split}"
        )
    return sorted(found)


def _entry_path(place: Folder, root: str, entry: str) -> str:
    """Where an entry is: from `path`, which counts from the yaml's own folder.

    Roboflow writes `../train/images` and means `train/images`; it is taken so where the former is
    not there, as Ultralytics does.
    """
    base = _joined(posixpath.dirname(place.path), _in_filesystem(place, root))
    candidates = [_joined(base, _in_filesystem(place, entry))]
    if entry.startswith("../"):
        candidates.append(_joined(base, entry[3:]))
    for path in candidates:
        if place.filesystem.exists(path):
            return path
    raise SourceError(
        f"{place.url}: nothing at {candidates[0]}; path counts from the folder of the yaml, and "
        "train, val and test from path"
    )


def _in_filesystem(place: Folder, path: str) -> str:
    """A path or URL as the set's own filesystem has it."""
    if "://" not in path:
        return path
    stripped: str = place.filesystem._strip_protocol(path)
    return stripped


def _joined(base: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(base, path))


def _below_folder(place: Folder, path: str) -> list[str]:
    return [
        f"{path}/{name}" for name in tree(Folder(path, place.filesystem, path)) if is_picture(name)
    ]


def _listed(place: Folder, path: str) -> list[str]:
    """Pictures of a list file; relative lines count from its own folder."""
    lines = place.filesystem.cat_file(path).decode("utf-8", "surrogateescape").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    base = posixpath.dirname(path)
    return [_joined(base, _in_filesystem(place, name)) for name in names]


def _common_folder(place: Folder, paths: Sequence[str]) -> Folder:
    path = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    url = path if place.is_local else place.filesystem.unstrip_protocol(path)
    return Folder(url, place.filesystem, path)


def _no_boxes(place: Folder, paths: Sequence[str]) -> AnnotationFault:
    """Labels that lie elsewhere would make a set of background, without a word."""
    problem = (
        f"none of {len(paths)} pictures has a box; the label file of {paths[0]} is looked for at "
        f"{label_path(paths[0])}: put the labels there"
    )
    return AnnotationFault("error", "missing annotation", place.url, None, problem)


def _below(folder: Folder, path: str) -> str:
    return path[len(folder.path) :].lstrip("/")


def _read(folder: Folder, classes: Mapping[int, str], path: str) -> CheckedAnnotation:
    name = _below(folder, path)
    try:
        header = read_header(folder, name)
    except FileNotFoundError:
        return unusable("missing picture", name, "no such file")
    except PermissionError as error:
        return unusable("missing picture", name, no_permission(error))
    except BrokenPicture as error:
        return unusable("unreadable picture", name, str(error))
    if header.orientation != 1:
        return unusable("turned picture", name, _TURNED)
    label = label_path(path)
    try:
        text = folder.filesystem.cat_file(label).decode()
    except FileNotFoundError:
        text = ""
    except PermissionError as error:
        return unusable("unreadable annotation", label, no_permission(error))
    except UnicodeDecodeError as error:
        return unusable("unreadable annotation", label, str(error))
    return _parsed(label, text, header, classes)


def _parsed(
    label: str, text: str, header: PictureHeader, classes: Mapping[int, str]
) -> CheckedAnnotation:
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, words) for number, words in lines if words]
    boxes, labels = list[_Box](), list[int]()
    for number, words in lines:
        try:
            labels.append(_class_of(words[0], classes))
            boxes.append(_pixels(_corners([float(word) for word in words[1:]]), header))
        except _UnknownClassError as error:
            return unusable("unknown class", label, str(error), f"line {number}")
        except ValueError as error:
            return unusable("unreadable annotation", label, str(error), f"line {number}")
    names = tuple(classes[id] for id in labels)
    annotation = BoxAnnotation(
        image_id=posixpath.splitext(posixpath.basename(label))[0],
        width=header.width,
        height=header.height,
        boxes_xyxy=tuple(boxes),
        names=names,
        labels=tuple(labels),
        areas=None,
        crowd=(False,) * len(boxes),
        difficult=(False,) * len(boxes),
    )
    return checked(label, annotation, lambda place: f"line {lines[place][0]} ({names[place]})")


_Box = tuple[float, float, float, float]

_TURNED = (
    "EXIF asks to turn it, and boxes of YOLO are of the turned picture while it is read as it is "
    "stored: turn the file itself (exiftran -ai, jpegtran) so that it needs no tag"
)

# Other tools write a few thousandths beyond the edge; more means that these are pixels.
_MOST = 1.5


class _UnknownClassError(ValueError):
    """A class that the data.yaml does not name."""


def _class_of(word: str, classes: Mapping[int, str]) -> int:
    number = float(word)
    if number not in classes:
        raise _UnknownClassError(f"class {word} is not among the names of the data.yaml")
    return int(number)


def _corners(numbers: Sequence[float]) -> _Box:
    """The box of a line in shares of the picture; ValueError where it is none, nor a polygon."""
    wrong = [number for number in numbers if not abs(number) <= _MOST]
    if wrong:
        raise ValueError(f"{wrong[0]:g} is no share of the picture: 0 to 1, no pixels")
    if len(numbers) == 4:
        x, y, width, height = numbers
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(
            f"{len(numbers)} numbers behind the class; 4 are a box, 6 and more a polygon's points"
        )
    xs, ys = numbers[0::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _pixels(box: _Box, header: PictureHeader) -> _Box:
    """In pixels to three decimals, as COCO's own boxes: a share of 6 digits says no more."""
    x0, y0, x1, y1 = box
    width, height = header.width, header.height
    return (
        round(x0 * width, 3),
        round(y0 * height, 3),
        round(x1 * width, 3),
        round(y1 * height, 3),
    )
