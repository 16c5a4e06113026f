"""A labelled set of pictures, whatever its files: COCO, VOC, YOLO, or shards with annotations.

Every kind becomes the same four things: an index that the exact stream can order, the picture files
where they do not lie in shards, the annotations of `data.annotations` and the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from data.annotations import parse_annotation
from data.index import ShardIndex, read_index
from data.picture_files import FileItem, PictureFiles, pack_files
from data.source_items import PictureFile, Source, SourceError
from data.sources import list_source
from data.storage import StorageOptions
from models.structures import Classes

SetKind = Literal["shards", "coco", "coco_panoptic", "voc", "yolo"]


@dataclass(frozen=True)
class DetectionSet:
    """Pictures with boxes; each sample has an annotation as its `json` part."""

    url: str
    """As the user wrote it, split included."""
    kind: SetKind
    index: ShardIndex
    """Of the shards; of the picture files as if each were a shard of one."""
    files: PictureFiles | None
    """Where the pictures lie in files of their own; None for shards."""
    classes: Classes
    """By rising id; classes without any box are among them."""
    storage_options: StorageOptions = field(default_factory=dict)


def open_detection_set(
    url: str,
    *,
    kind: SetKind | None = None,
    pictures: str | None = None,
    classes: Sequence[str] | None = None,
    storage_options: StorageOptions | None = None,
) -> DetectionSet:
    """The labelled set at `url` (a local path or any fsspec URL), found out or said by `kind`.

    `pictures` is the folder of a COCO json's pictures, found beside the json where it has its usual
    name. Raises SourceError, in one line, where the set is not what it is said to be.
    """
    options = dict(storage_options or {})
    source = list_source(url, "coco", pictures, (), options)
    index, files = pack_files(source.folder, [_file_item(item) for item in source.items])
    return DetectionSet(url, "coco", index, files, source_classes(source), options)


def source_classes(source: Source) -> Classes:
    """The classes of an annotated source, by rising id; SourceError where a name comes twice."""
    ids = tuple(sorted(source.classes))
    try:
        return Classes(tuple(source.classes[id] for id in ids), ids)
    except ValueError as error:
        raise SourceError(f"{source.folder.url}: {error}") from error


def _file_item(item: object) -> FileItem:
    assert isinstance(item, PictureFile)
    text = dict(item.parts)["json"]
    annotation = parse_annotation(text)
    return FileItem(item.key, item.name, text, annotation.width, annotation.height)
