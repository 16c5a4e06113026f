"""Sizes of pictures by the first bytes of their files: nothing is decoded, little is read.

64 KB hold the size of nearly every picture; where they do not (a preview or a colour profile comes
first), the whole file is read.
"""

import errno
import io
from dataclasses import dataclass

from PIL import Image

from data.pictures import FORMATS, PICTURE_DAMAGE, BrokenPicture
from data.storage import Folder

_HEAD_BYTES = 1 << 16
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class PictureHeader:
    """What the first bytes of a picture say."""

    width: int
    """In pixels, as stored."""
    height: int
    orientation: int = 1
    """EXIF's, 1 to 8: how viewers turn and flip it. Nothing here does, as in the public code."""


def read_header(folder: Folder, name: str) -> PictureHeader:
    """The header of a picture in the folder.

    Raises BrokenPicture with the reason where it is no picture or damaged, FileNotFoundError where
    it is not there.
    """
    head = _head(folder, name)
    try:
        return parse_header(head)
    except BrokenPicture:
        if len(head) < _HEAD_BYTES:
            raise
    return parse_header(folder.filesystem.cat_file(folder.at(name)))


def parse_header(data: bytes) -> PictureHeader:
    """The header of the first bytes of a picture; BrokenPicture where they do not hold it."""
    if not data:
        raise BrokenPicture("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # MPO is a JPEG with more pictures behind it, as many phones write. Of a PNG, Pillow
            # would decode all to find it.
            is_jpeg = image.format in ("JPEG", "MPO")
            told = image.getexif().get(_ORIENTATION) if is_jpeg else 1
            orientation = told if isinstance(told, int) and told in range(1, 9) else 1
            return PictureHeader(image.width, image.height, orientation)
    except PICTURE_DAMAGE as error:
        raise BrokenPicture(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _head(folder: Folder, name: str) -> bytes:
    try:
        data: bytes = folder.filesystem.cat_file(folder.at(name), start=0, end=_HEAD_BYTES)
    except OSError as error:
        # S3's answer for an empty object: it has no byte 0.
        if error.errno != errno.EINVAL:
            raise
        data = folder.filesystem.cat_file(folder.at(name))
    return data
