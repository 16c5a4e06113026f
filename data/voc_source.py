"""A VOC root as a source of pictures; their XML files are read at once, many at a time.

The 16,551 of 07+12-trainval take 3.5 s CPU (measured on a local disk).

VOC counts pixels from 1 and both ends of a box are inside it; `data.annotations` says the frame in
which the boxes travel.
"""

import posixpath
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from data.annotation_faults import AnnotationFault, CheckedAnnotation, checked, unusable
from data.annotations import BoxAnnotation
from data.source_items import LeftOut, Source, annotated_items, unique_keys
from data.storage import Folder
from data.trees import is_picture, names_in
from data.voc_splits import VocPart, voc_parts

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""VOC's own classes; their ids are 1 to 20 in this order."""

# Reading is waiting where the storage is far away; on a local disk more threads change nothing.
_THREADS = 32


def list_voc(place: Folder, split: str | None = None, names: Sequence[str] | None = None) -> Source:
    """The pictures of a VOC root, of all years of a VOCdevkit, or of one split of them.

    A picture without an annotation (VOC's test sets) has no json and a fault; one that the split
    names and that is not there, or whose annotation cannot be used, is left out with a fault.
    Classes are `names` in their order, by default VOC's 20 where no other name is met, else those
    met in the order of the alphabet; ids begin at 1.
    Raises SourceError where that is no VOC root or has no such split.
    """
    folder, parts = voc_parts(place, split)
    pictures, left_out, faults = list[_Picture](), list[LeftOut](), list[AnnotationFault]()
    for part in parts:
        found, others = _list_part(folder, part)
        pictures += found
        left_out += others
        faults += [_gone(other.name) for other in others if other.reason == _GONE]
    with ThreadPoolExecutor(_THREADS) as pool:
        read = list(pool.map(partial(_read, folder, names), pictures))
    keys = unique_keys(f"{picture.stem}.jpg" for picture in pictures)
    items, spoilt = annotated_items(keys, [picture.name for picture in pictures], read)
    faults += [fault for one in read for fault in one.faults]
    met = {name for one in read if one.annotation for name in one.annotation.names}
    classes = dict(enumerate(_in_order(met) if names is None else names, start=1))
    return Source(folder, "voc", items, (*left_out, *spoilt), classes, faults=tuple(faults))


_GONE = "no such file"


@dataclass(frozen=True)
class _Picture:
    stem: str
    """Name without extension, behind the folder of the year where there are several."""
    name: str
    """Path of the picture in the source's folder."""
    xml: str | None
    """Path of its annotation, where there is one."""


def _list_part(folder: Folder, part: VocPart) -> tuple[list[_Picture], list[LeftOut]]:
    year = part.year
    names = names_in(folder, f"{year}JPEGImages")
    annotations = set(names_in(folder, f"{year}Annotations"))
    by_stem = {posixpath.splitext(name)[0]: name for name in names if is_picture(name)}
    others = [
        LeftOut(f"{year}JPEGImages/{name}", "not a picture")
        for name in names
        if not is_picture(name)
    ]
    pictures = list[_Picture]()
    for stem in part.stems if part.stems is not None else sorted(by_stem):
        if stem not in by_stem:
            others.append(LeftOut(f"{year}JPEGImages/{stem}.jpg", _GONE))
            continue
        xml = f"{year}Annotations/{stem}.xml" if f"{stem}.xml" in annotations else None
        pictures.append(_Picture(year + stem, f"{year}JPEGImages/{by_stem[stem]}", xml))
    return pictures, others


def _gone(name: str) -> AnnotationFault:
    return AnnotationFault("error", "missing picture", name, None, "the split names it: no file")


def _in_order(met: Set[str]) -> Sequence[str]:
    return VOC_CLASSES if met <= set(VOC_CLASSES) else sorted(met)


def _read(folder: Folder, known: Sequence[str] | None, picture: _Picture) -> CheckedAnnotation:
    if picture.xml is None:
        problem = "has no file in Annotations/: a test set without answers cannot be learned from"
        fault = AnnotationFault("error", "missing annotation", picture.name, None, problem)
        return CheckedAnnotation(None, (fault,))
    try:
        text = folder.filesystem.cat_file(folder.at(picture.xml))
        stem = posixpath.splitext(posixpath.basename(picture.xml))[0]
        annotation = _voc_boxes(ElementTree.fromstring(text), stem)
    except (ElementTree.ParseError, ValueError, FileNotFoundError) as error:
        return unusable("unreadable annotation", picture.xml, str(error))
    names = annotation.names
    unknown = [name for name in names if known is not None and name not in known]
    if unknown:
        problem = f"class {unknown[0]!r} is not one of classes={list(known or ())}"
        return unusable("unknown class", picture.xml, problem)
    return checked(picture.xml, annotation, lambda number: f"object {number + 1} ({names[number]})")


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
