"""A labelled set of pictures, whatever its files: COCO, VOC, YOLO, or shards with annotations.

Every kind becomes the same four things: an index that the exact stream can order, the picture files
where they do not lie in shards, the annotations of `data.annotations`, and the classes. Labels
count from 0 by rising id, so that no id, however sparse, can stand for "no object" in a head.
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, assert_never

from data.annotation_faults import AnnotationFault
from data.coco_source import list_coco
from data.index import INDEX_NAME, ShardIndex, read_index
from data.panoptic_source import list_panoptic
from data.picture_files import FileItem, PictureFiles, pack_files
from data.source_items import PictureFile, Source, SourceError
from data.sources import detect_kind, open_split
from data.storage import Folder, StorageOptions, open_folder
from data.voc_source import list_voc
from data.write_records import read_classes
from data.yolo_source import list_yolo
from models.structures import Classes

SetKind = Literal["shards", "coco", "coco_panoptic", "voc", "yolo", "classes"]
"""`classes` are shards whose pictures have one class each and no boxes."""


@dataclass(frozen=True)
class DetectionSet:
    """Pictures with boxes; each sample has an annotation as its `json` part."""

    url: str
    """As the user wrote it, split included."""
    kind: SetKind
    index: ShardIndex
    """Of the shards; of the picture files as if they were one shard."""
    files: PictureFiles | None
    """Where the pictures lie in files of their own; None for shards."""
    classes: Classes
    """By rising id; classes without any box are among them."""
    storage_options: StorageOptions = field(default_factory=dict)


@dataclass(frozen=True)
class SetListing:
    """A labelled set of picture files, and all that is wrong with its annotations."""

    kind: SetKind
    folder: Folder
    items: tuple[FileItem, ...]
    """The pictures whose annotations can be used."""
    classes: Classes
    faults: tuple[AnnotationFault, ...]


def open_detection_set(
    url: str,
    *,
    kind: SetKind | None = None,
    pictures: str | None = None,
    classes: Sequence[str] | None = None,
    storage_options: StorageOptions | None = None,
) -> DetectionSet:
    """The labelled set at `url` (a local path or any fsspec URL), found out or said by `kind`.

    `coco` and `coco_panoptic` are a json (`pictures` is the folder of its pictures, found beside
    it where it has its usual name), `voc` a root or a VOCdevkit, `yolo` a data.yaml, the last two
    with `#SPLIT` behind them where one is meant; `shards` is a folder with an index, `classes` one
    of a class tree. `classes` are the names in order, for VOC and shards that do not name them:
    with ids from 1, or from 0 where whole pictures have one.
    Raises SourceError, in one line, where the set is not what it is said to be, or has an error in
    its annotations; ShardIndexError where shards have no index.
    """
    options = dict(storage_options or {})
    chosen = kind or detect_set_kind(url, options)
    if chosen == "shards" or chosen == "classes":
        index = read_index(url, options)
        named = _of_shards(url, classes, options, of_pictures=chosen == "classes")
        return DetectionSet(url, chosen, index, None, named, options)
    listing = list_detection_set(url, chosen, pictures, classes, options)
    errors = [fault for fault in listing.faults if fault.severity == "error"]
    if errors:
        raise SourceError(
            f"{url}: {errors[0]} ({len(errors)} such errors; `querypatch data check {url}` names "
            "them all)"
        )
    index, files = pack_files(listing.folder, listing.items)
    return DetectionSet(url, chosen, index, files, listing.classes, options)


def list_detection_set(
    url: str,
    kind: Literal["coco", "coco_panoptic", "voc", "yolo"],
    pictures: str | None,
    classes: Sequence[str] | None,
    storage_options: StorageOptions,
) -> SetListing:
    """The pictures, classes and faults of a set of picture files; no picture but YOLO's is opened.

    Raises SourceError where the set is not of that kind, or has no picture.
    """
    if classes is not None and kind != "voc":
        raise SourceError(f"{url}: kind={kind} names its own classes; leave classes out")
    folder, split = open_split(url, storage_options)
    if split is not None and kind not in ("voc", "yolo"):
        raise SourceError(f"{url}: kind={kind} has no splits to choose by #{split}; leave it out")
    beside = open_folder(pictures, storage_options) if pictures else None
    match kind:
        case "coco_panoptic":
            found = list_panoptic(folder, beside)
            listing = SetListing(kind, found.folder, found.items, found.classes, found.faults)
        case "coco":
            listing = _listing(url, kind, list_coco(folder, beside))
        case "voc":
            listing = _listing(url, kind, list_voc(folder, split, classes))
        case "yolo":
            listing = _listing(url, kind, list_yolo(folder, split))
        case _:
            assert_never(kind)
    if not listing.items and not listing.faults:
        raise SourceError(f"no picture in {url} (read as kind={kind})")
    return listing


def aligned(validation: Classes, training: Classes) -> Classes:
    """The classes by which a validation set is judged: those that were learned, by their names.

    A class that only training has is well: nothing of it is to be found. Raises SourceError where
    the validation data name others, which no detector of this training can find.
    """
    unknown = [name for name in validation.names if name not in training.names]
    if unknown:
        raise SourceError(
            f"the validation data have classes that the training data do not name: "
            f"{', '.join(unknown)}; the training data have {', '.join(training.names)}: give both "
            "the same names"
        )
    return training


def detect_set_kind(url: str, storage_options: StorageOptions | None = None) -> SetKind:
    """What a labelled set is by its names; SourceError where it is none."""
    folder, _ = open_split(url, storage_options)
    name = posixpath.basename(folder.path)
    if name.endswith(".json"):
        return "coco_panoptic" if "panoptic" in name else "coco"
    if folder.filesystem.exists(folder.at(INDEX_NAME)):
        return "shards"
    kind = detect_kind(folder)
    match kind:
        case "voc" | "yolo" | "coco":
            return kind
        case "tars":
            raise SourceError(f"{url} holds tars without an index: `querypatch shards index {url}`")
        case _:
            raise SourceError(
                f"{url} is no labelled set: name a COCO json, a VOC root, a data.yaml, or a folder "
                "of annotated shards"
            )


def _of_shards(
    url: str,
    names: Sequence[str] | None,
    storage_options: StorageOptions,
    *,
    of_pictures: bool,
) -> Classes:
    """The classes by the report of the writing, or as they were said."""
    if names is not None:
        classes = dict(enumerate(names, start=0 if of_pictures else 1))
    else:
        classes = read_classes(open_folder(url, storage_options), of_pictures=of_pictures)
    if not classes:
        raise SourceError(
            f"{url}: the shards do not name their classes (report.json): say classes=[NAME, ...]"
        )
    return _by_id(url, classes)


def _listing(url: str, kind: SetKind, source: Source) -> SetListing:
    if not source.classes:
        raise SourceError(f"{url} names no class: nothing can be learned from it")
    classes = _by_id(url, source.classes)
    items = tuple(_file_item(item) for item in source.items if isinstance(item, PictureFile))
    return SetListing(kind, source.folder, items, classes, source.faults)


def _file_item(item: PictureFile) -> FileItem:
    return FileItem(item.key, item.name, dict(item.parts).get("json", b""), item.width, item.height)


def _by_id(url: str, names: Mapping[int, str]) -> Classes:
    ids = tuple(sorted(names))
    try:
        return Classes(tuple(names[id] for id in ids), ids)
    except ValueError as error:
        raise SourceError(f"{url}: {error}") from error
