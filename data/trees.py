"""Files of a folder by their names, without opening one or asking for its size."""

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from data.samples import PICTURE_EXTENSIONS
from data.source_items import SourceError
from data.storage import Folder


def tree(folder: Folder) -> Iterator[str]:
    """Paths of all files below, relative to the folder, in no order; each folder once."""
    if folder.is_local:
        yield from _local_tree(folder.path)
        return
    for path in folder.filesystem.find(folder.path):
        if not path.endswith("/"):
            yield path[len(folder.path) :].lstrip("/")


def top_level(folder: Folder) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files directly in the folder."""
    if folder.is_local:
        _, folders, files = next(os.walk(folder.path, onerror=_raise))
        return folders, files
    entries = folder.filesystem.ls(folder.path, detail=True)
    names = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in entries}
    folders = [name for name, kind in names.items() if kind == "directory"]
    return folders, [name for name, kind in names.items() if kind == "file"]


def names_in(folder: Folder, name: str) -> list[str]:
    """Names of the files in a folder of the folder, sorted; none where it is not there."""
    try:
        paths = folder.filesystem.ls(folder.at(name), detail=False)
    except FileNotFoundError:
        return []
    return sorted(path.rpartition("/")[2] for path in paths if not path.endswith("/"))


def is_picture(name: str) -> bool:
    """By the extension."""
    return extension_of(name) in PICTURE_EXTENSIONS


def extension_of(name: str) -> str:
    """Lower case, and one word for JPEG, so that WebDataset users find every picture as `jpg`."""
    extension = posixpath.splitext(urlsplit(name).path if "://" in name else name)[1].lower()[1:]
    return "jpg" if extension == "jpeg" else extension


def _local_tree(root: str) -> Iterator[str]:
    """By scandir, which needs no stat for a file; each folder once, links included."""
    seen = set[tuple[int, int]]()
    for parent, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        below = os.path.relpath(parent, root)
        yield from (f"{below}/{file}" if below != "." else file for file in files)


def _raise(error: OSError) -> None:
    raise SourceError(f"cannot list {error.filename}: {error.strerror}") from error
