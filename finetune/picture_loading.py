"""Pictures on their way to a prediction: numbered, read and resized by threads, broken ones named.

A bounded number of pictures is on its way at any time, so memory does not grow with their count.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from data.pictures import BrokenPicture, decode_picture
from data.storage import StorageError
from finetune.picture_sources import PictureRef, read_bytes
from finetune.predict import PreparedPicture, prepare
from models.artefact import PictureInput
from models.urls import public_url

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class LeftOutPicture:
    """A picture that could not be used."""

    url: str
    reason: str

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}"


@dataclass(frozen=True)
class NumberedPicture:
    """A picture with its number in the results and the name of its drawing."""

    ref: PictureRef
    image_id: int
    drawn: str


@dataclass(frozen=True)
class LoadedPicture:
    """A picture that is ready for the detector."""

    entry: NumberedPicture
    content: bytes
    """The file: decoded again to be drawn on, since waiting pictures of 20 megapixels fill RAM."""
    prepared: PreparedPicture


def numbered_pictures(refs: Sequence[PictureRef]) -> list[NumberedPicture]:
    """File names that are all numbers, COCO's way, are the image ids; else they count from 1."""
    stems = [PurePosixPath(ref.name).stem for ref in refs]
    are_ids = all(map(str.isdecimal, stems)) and len({int(stem) for stem in stems}) == len(stems)
    ids = [int(stem) for stem in stems] if are_ids else list(range(1, len(refs) + 1))
    names = _drawing_names(refs)
    return [NumberedPicture(*one) for one in zip(refs, ids, names, strict=True)]


def loaded_pictures(
    pool: ThreadPoolExecutor,
    entries: Sequence[NumberedPicture],
    size: PictureInput,
    ahead: int,
    left_out: list[LeftOutPicture],
) -> Iterator[LoadedPicture]:
    """The pictures that could be loaded, in order; the others are put on `left_out`."""
    for load in _in_order(pool, lambda entry: _load(entry, size), entries, ahead):
        if isinstance(load, LeftOutPicture):
            left_out.append(load)
        else:
            yield load


def write_whole(path: Path, text: str) -> None:
    """The file, or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(path)


def _drawing_names(refs: Sequence[PictureRef]) -> list[str]:
    """Unique paths below the output folder; a PNG stays one, the rest become JPEG."""
    taken: set[str] = set()
    names = []
    for ref in refs:
        parts = [part for part in PurePosixPath(ref.name).parts if part not in ("/", "..")]
        # A URL may have no name but a query: https://host/?id=3.
        path = PurePosixPath(*parts or ("picture",))
        ending = ".png" if path.suffix.lower() == ".png" else ".jpg"
        stem = str(path.with_suffix(""))
        name, count = f"{stem}{ending}", 1
        # Case is ignored, as it is by the file systems of two of three laptops.
        while name.lower() in taken:
            count += 1
            name = f"{stem}-{count}{ending}"
        taken.add(name.lower())
        names.append(name)
    return names


def _load(entry: NumberedPicture, size: PictureInput) -> LoadedPicture | LeftOutPicture:
    try:
        content = read_bytes(entry.ref.url)
        return LoadedPicture(entry, content, prepare(decode_picture(content), size))
    except FileNotFoundError:
        return LeftOutPicture(public_url(entry.ref.url), "no such file")
    except (BrokenPicture, StorageError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return LeftOutPicture(public_url(entry.ref.url), reason)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T], ahead: int
) -> Iterator[U]:
    """`map` by the threads of a pool, at most `ahead` items before the one that is taken."""
    started: deque[Future[U]] = deque()
    for item in items:
        started.append(pool.submit(function, item))
        if len(started) > ahead:
            yield started.popleft().result()
    while started:
        yield started.popleft().result()
