"""Where pictures come from: folder trees, class trees, lists, WebDataset tars, COCO and VOC.

Listing is pure in what is there: a defined order (of the paths, or of the list), a unique key for
each picture, and what is left out with the reason. No picture is opened, and no file of a tree is
asked for its size. 100,000 pictures on a local disk take 1.1 s CPU (measured).
"""

import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from typing import assert_never
from urllib.parse import urlsplit

from data.coco_source import list_coco
from data.source_items import (
    BadItemError,
    LeftOut,
    PictureFile,
    PictureInTar,
    Source,
    SourceError,
    SourceItem,
    SourceKind,
    unique_keys,
)
from data.storage import Folder, StorageOptions, open_folder
from data.tar_sources import list_tars, read_from_tar
from data.trees import extension_of, is_picture, top_level, tree
from data.voc_source import list_voc
from data.yolo_source import list_yolo

_LISTS = (".txt", ".lst", ".list")


def list_source(
    url: str,
    kind: SourceKind | None = None,
    pictures: str | None = None,
    ignore: Sequence[str] = (),
    storage_options: StorageOptions | None = None,
) -> Source:
    """All pictures at `url` (a local path or any fsspec URL), and what is left out.

    `kind` is found out from what is there unless it is named: `classes` (root/class/picture),
    `folder` (any tree), `list` (a text file with a path or URL a line), `tars` (a WebDataset tar, a
    folder or a glob of them), `coco` (its json; `pictures` is the folder of the pictures, found
    beside the json where it has its usual name), `voc` (VOC2012, or the VOCdevkit with several
    years, or one ImageSets/Main/NAME.txt), `yolo` (a data.yaml). The URL of the last two may name a
    split: `VOCdevkit#07+12-trainval`, `data.yaml#val`. Files of a tree that match a pattern of
    `ignore` (`*.txt`, `.*`) are not looked at.
    Raises SourceError where nothing is there, or no picture.
    """
    folder, split = open_split(url, storage_options)
    options = dict(storage_options or {})
    chosen = kind or detect_kind(folder)
    if split is not None and chosen not in ("voc", "yolo"):
        raise SourceError(f"{url}: kind={chosen} has no splits to choose by #{split}; leave it out")
    match chosen:
        case "classes" | "folder":
            source = _list_tree(folder, kind, ignore)
        case "list":
            source = _list_lines(folder, options)
        case "tars":
            source = list_tars(folder)
        case "coco":
            source = list_coco(folder, open_folder(pictures, options) if pictures else None)
        case "voc":
            source = list_voc(folder, split)
        case "yolo":
            source = list_yolo(folder, split)
        case _:
            assert_never(chosen)
    if not source.items:
        raise SourceError(f"no picture in {url} (read as kind={chosen}){_first(source.left_out)}")
    return source


def open_split(
    url: str, storage_options: StorageOptions | None = None
) -> tuple[Folder, str | None]:
    """The folder or file of a URL, and the split behind its `#`; a `#` in a real name is none."""
    folder = open_folder(url, storage_options)
    before, mark, split = url.rpartition("#")
    if not mark or "/" in split or folder.filesystem.exists(folder.path):
        return folder, None
    return open_folder(before, storage_options), split


def detect_kind(folder: Folder) -> SourceKind:
    """What a source is by its names: see `list_source`; SourceError where nothing is there."""
    name = posixpath.basename(folder.path)
    if name.endswith(".tar"):
        return "tars"
    if not folder.filesystem.exists(folder.path):
        raise SourceError(f"nothing at {folder.url}: check the path, bucket and credentials")
    if name.endswith(".json"):
        return "coco"
    if name.endswith((".yaml", ".yml")):
        return "yolo"
    if name.endswith(_LISTS):
        return "voc" if "/ImageSets/" in folder.path else "list"
    folders, files = top_level(folder)
    if _looks_like_voc(folder, folders):
        return "voc"
    only_tars = any(file.endswith(".tar") for file in files) and not folders
    return "tars" if only_tars and not any(map(is_picture, files)) else "folder"


def read_item(source: Source, item: SourceItem) -> dict[str, bytes]:
    """The parts of a sample by extension, the picture's own first and unchanged.

    Raises BadItemError with the reason where the picture is gone; other failures of the storage
    (OSError) are not the picture's fault and pass through.
    """
    try:
        match item:
            case PictureFile():
                return _read_file(source, item)
            case PictureInTar():
                return read_from_tar(source.folder, item)
            case _:
                assert_never(item)
    except FileNotFoundError as error:
        raise BadItemError("no such file") from error


def _read_file(source: Source, item: PictureFile) -> dict[str, bytes]:
    filesystem, path = source.folder.filesystem, source.folder.at(item.name)
    if source.kind == "list":
        folder = _folder_of_line(source, item.name)
        filesystem, path = folder.filesystem, folder.path
    return {extension_of(item.name): filesystem.cat_file(path), **dict(item.parts)}


def _list_tree(folder: Folder, kind: SourceKind | None, ignore: Sequence[str]) -> Source:
    names = sorted(name for name in tree(folder) if not _matches(name, ignore))
    pictures = [name for name in names if is_picture(name)]
    others = tuple(LeftOut(name, _not_a_picture(name)) for name in names if not is_picture(name))
    if kind == "folder" or (kind is None and not _is_class_tree(pictures)):
        items = _files(pictures)
        return Source(folder, "folder", items, others)
    if not _is_class_tree(pictures):
        raise SourceError(f"{folder.url} is no class tree (root/class/picture): use kind=folder")
    classes = sorted({name.split("/")[0] for name in pictures})
    items = _files(pictures, classes)
    return Source(folder, "classes", items, others, dict(enumerate(classes)))


def _files(names: Sequence[str], classes: Sequence[str] = ()) -> tuple[PictureFile, ...]:
    parts = {name: _class_parts(number, name) for number, name in enumerate(classes)}
    return tuple(
        PictureFile(key, name, parts.get(name.split("/")[0], ()))
        for key, name in zip(unique_keys(names), names, strict=True)
    )


def _class_parts(number: int, name: str) -> tuple[tuple[str, bytes], ...]:
    """The class as WebDataset users expect it (`cls`, a number) and by name (`json`)."""
    text = json.dumps({"class_id": number, "class_name": name}, separators=(",", ":"))
    return (("cls", str(number).encode()), ("json", text.encode()))


def _is_class_tree(pictures: Sequence[str]) -> bool:
    depths = {name.count("/") for name in pictures}
    return depths == {1} and len({name.split("/")[0] for name in pictures}) > 1


def _list_lines(folder: Folder, options: StorageOptions) -> Source:
    """Pictures by a text file: a path or URL a line, relative ones from the file's own folder."""
    text = folder.filesystem.cat_file(folder.path).decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    pictures = list(dict.fromkeys(name for name in names if is_picture(name)))
    others = [LeftOut(name, _not_a_picture(name)) for name in names if not is_picture(name)]
    again = [LeftOut(name, "listed twice") for name in _repeated(names) if is_picture(name)]
    keys = unique_keys("/".join(urlsplit(name).path.split("/")[-2:]) for name in pictures)
    items = tuple(map(PictureFile, keys, pictures))
    return Source(folder, "list", items, tuple(others + again), storage_options=options)


def _folder_of_line(source: Source, name: str) -> Folder:
    if "://" in name:
        same = name.split("://")[0] == source.folder.url.split("://")[0]
        return open_folder(name, source.storage_options if same else None)
    list_folder = posixpath.dirname(source.folder.path)
    path = posixpath.normpath(posixpath.join(list_folder, name))
    return Folder(name, source.folder.filesystem, path)


def _repeated(names: Iterable[str]) -> Iterator[str]:
    seen = set[str]()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)


def _looks_like_voc(folder: Folder, folders: Sequence[str]) -> bool:
    if "JPEGImages" in folders:
        return True
    years = [name for name in folders if name.startswith("VOC")]
    return any(folder.filesystem.exists(folder.at(f"{year}/JPEGImages")) for year in years)


def _not_a_picture(name: str) -> str:
    extension = posixpath.splitext(name)[1]
    return f"not a picture ({extension or 'no extension'})"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(posixpath.basename(name), pattern) for pattern in patterns)


def _first(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return ""
    shown = ", ".join(f"{bad.name}: {bad.reason}" for bad in left_out[:3])
    return f"; {len(left_out)} other files, e.g. {shown}"
