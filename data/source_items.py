"""What a source of pictures consists of: pictures with unique keys, and what was left out."""

import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from data.annotation_faults import AnnotationFault, CheckedAnnotation
from data.annotations import annotation_json
from data.storage import Folder, StorageOptions
from data.tar_layout import TarPart

SourceKind = Literal["classes", "folder", "list", "tars", "coco", "voc", "yolo"]

ANNOTATED_KINDS: tuple[SourceKind, ...] = ("coco", "voc", "yolo")
"""Those whose pictures come with boxes; the classes of the others are of whole pictures."""

# A tar header holds 100 bytes of name; the extension needs some of them.
_MAX_KEY_BYTES = 80


class SourceError(ValueError):
    """A source that is not there or not what it was said to be."""


class BadItemError(ValueError):
    """A picture that cannot be used; the message is the reason, without the picture's name."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture that is a file of its own."""

    key: str
    name: str
    """Path relative to the source's folder; the whole path or URL for a list."""
    parts: tuple[tuple[str, bytes], ...] = ()
    """Files that travel beside the picture, as (extension, content)."""
    width: int = 0
    """Of the picture in pixels, as annotated; 0 where that is not known."""
    height: int = 0


@dataclass(frozen=True, slots=True)
class PictureInTar:
    """A picture that lies in a tar with what belongs to it."""

    key: str
    name: str
    """The tar's path relative to the source's folder, a slash, and the key in the tar."""
    tar: str
    parts: tuple[TarPart, ...]


SourceItem = PictureFile | PictureInTar


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that does not become a sample."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """All pictures of a source in a defined order; nothing of them has been read yet."""

    folder: Folder
    kind: SourceKind
    items: tuple[SourceItem, ...]
    left_out: tuple[LeftOut, ...]
    classes: Mapping[int, str] = field(default_factory=dict)
    """Name of each class by its number: of the folders of a class tree, or of the annotations."""
    storage_options: StorageOptions = field(default_factory=dict)
    faults: tuple[AnnotationFault, ...] = ()
    """Of the annotations; a picture with an error among them is left out."""


def annotated_items(
    keys: Sequence[str], names: Sequence[str], annotations: Sequence[CheckedAnnotation]
) -> tuple[tuple[PictureFile, ...], list[LeftOut]]:
    """The pictures with their annotations as `json` parts, and those that are spoilt."""
    items, left_out = list[PictureFile](), list[LeftOut]()
    for key, name, one in zip(keys, names, annotations, strict=True):
        if one.spoilt is not None:
            left_out.append(LeftOut(name, one.spoilt))
        elif one.annotation is None:
            items.append(PictureFile(key, name))
        else:
            text, size = (
                annotation_json(one.annotation),
                (one.annotation.width, one.annotation.height),
            )
            items.append(PictureFile(key, name, (("json", text),), *size))
    return tuple(items), left_out


def unique_keys(names: Iterable[str]) -> list[str]:
    """A readable key for each path: unique, without dots, safe as a file name, at most 80 bytes.

    The folders are part of it, unless the next name begins with them: `n01/n01_7.JPEG` is `n01_7`.
    Where two paths would get one key (upper and lower case count as one, as some filesystems have
    it), the later one gets `-2` and so on.
    """
    keys, used, met = list[str](), set[str](), Counter[str]()
    for name in names:
        wanted = key = _key(name)
        while key.casefold() in used:
            met[wanted] += 1
            key = f"{wanted}-{met[wanted] + 1}"
        used.add(key.casefold())
        keys.append(key)
    return keys


def _key(name: str) -> str:
    words = [word for word in posixpath.splitext(name)[0].split("/") if word not in ("", ".", "..")]
    told = [word for word, after in pairwise(words) if not _says(after, word)]
    text = unicodedata.normalize("NFC", "_".join([*told, *words[-1:]]))
    return _shortened(re.sub(r"[^\w-]+", "-", text).strip("-_") or "picture", name)


def _says(after: str, word: str) -> bool:
    return after.startswith(word) and not after[len(word) : len(word) + 1].isalnum()


def _shortened(key: str, name: str) -> str:
    if len(key.encode()) <= _MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return key.encode()[: _MAX_KEY_BYTES - 9].decode(errors="ignore") + "-" + digest
