"""Where pictures to predict come from: files, globs, folders, lists, URLs, bytes, arrays.

Listing opens no picture, and a picture that is not there is found out when it is read: one broken
picture must not stop the others.
"""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.pictures import BrokenPicture, decode_picture
from data.reading import one_line
from data.samples import PICTURE_EXTENSIONS
from data.source_items import PictureFile, SourceError
from data.sources import list_source
from data.storage import open_folder, transient_errors

ImageInput: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A path, a URL, a file's bytes, a PIL picture, or a uint8 array of height x width x 3 (RGB)."""

_LISTS = (".txt", ".lst", ".list")


@dataclass(frozen=True)
class PictureRef:
    """A picture by its place."""

    url: str
    """Path or URL."""
    name: str
    """Path relative to the folder or glob that it was found by; of a single file its own name."""


def find_pictures(sources: Sequence[str], listed: Iterable[str] = ()) -> tuple[PictureRef, ...]:
    """The pictures of files, URLs, globs, folders and lists, each once, in a defined order.

    A folder gives every picture below it; a `.txt` and `-` (whose lines are `listed`) name a
    picture, glob or folder a line. Files need not exist. Raises SourceError where a folder or glob
    holds no picture.
    """
    refs = (ref for source in sources for ref in _expanded(source, listed))
    return tuple({ref.url: ref for ref in refs}.values())


def read_bytes(url: str) -> bytes:
    """The bytes of a file at a path or any fsspec URL; OSError where it cannot be read."""
    folder = open_folder(url)
    try:
        content: bytes = folder.filesystem.cat_file(folder.path)
    except transient_errors(url) as error:
        if isinstance(error, OSError):
            raise
        raise OSError(one_line(error)) from error
    return content


def decoded(image: ImageInput) -> UInt8[np.ndarray, "height width 3"]:
    """The picture in RGB, EXIF orientation ignored. BrokenPicture with the reason, or OSError."""
    match image:
        case str() | Path():
            return decode_picture(read_bytes(str(image)))
        case bytes():
            return decode_picture(image)
        case Image.Image():
            return _from_pillow(image)
        case _:
            return _checked(image)


def described(image: ImageInput) -> str:
    """The picture in a few words, for messages."""
    match image:
        case str() | Path():
            return str(image)
        case bytes():
            return f"{len(image)} bytes"
        case Image.Image():
            return f"PIL picture of {image.width} x {image.height}"
        case _:
            return f"array {image.shape} {image.dtype}"


def _expanded(source: str, listed: Iterable[str]) -> Iterator[PictureRef]:
    if source == "-":
        yield from find_pictures([line.strip() for line in listed if line.strip()])
    elif source.endswith(_LISTS):
        lines = read_bytes(source).decode().splitlines()
        yield from find_pictures([line.strip() for line in lines if line.strip()])
    elif _is_single(source):
        yield PictureRef(source, posixpath.basename(source.partition("?")[0]))
    elif any(sign in source for sign in "*?["):
        yield from _globbed(source)
    else:
        yield from _in_folder(source)


def _is_single(source: str) -> bool:
    """True where this is one picture by its name, or is at least no folder and no glob."""
    if source.startswith(("http://", "https://")):
        return True
    folder = open_folder(source)
    if any(sign in source for sign in "*?["):
        # A file may well be called `photo [1].jpg`.
        return bool(folder.filesystem.exists(folder.path))
    if source.lower().endswith(tuple(f".{extension}" for extension in PICTURE_EXTENSIONS)):
        return not (folder.is_local and Path(folder.path).is_dir())
    return not folder.filesystem.isdir(folder.path)


def _globbed(pattern: str) -> Iterator[PictureRef]:
    folder = open_folder(pattern)
    paths = [str(path) for path in folder.filesystem.glob(folder.path) if _is_picture(str(path))]
    if not paths:
        raise SourceError(f"no picture matches {pattern}: check the pattern, and quote it")
    root = folder.path[: _first_sign(folder.path)].rpartition("/")[0]
    for path in sorted(paths):
        url = path if folder.is_local else folder.filesystem.unstrip_protocol(path)
        yield PictureRef(url, path.removeprefix(root).lstrip("/"))


def _in_folder(url: str) -> Iterator[PictureRef]:
    source = list_source(url, "folder")
    for item in source.items:
        assert isinstance(item, PictureFile)
        yield PictureRef(f"{source.folder.url}/{item.name}", item.name)


def _is_picture(path: str) -> bool:
    return path.rpartition(".")[2].lower() in PICTURE_EXTENSIONS


def _first_sign(path: str) -> int:
    return min(place for sign in "*?[" if (place := path.find(sign)) >= 0)


def _from_pillow(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise BrokenPicture(f"mode {image.mode} is not converted here; give 8 bits, or the file")
    return np.array(image.convert("RGB"))


def _checked(array: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise BrokenPicture("give uint8 of height x width x 3, RGB, with at least one pixel")
    return array
