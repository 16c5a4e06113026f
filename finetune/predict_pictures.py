"""`querypatch predict`: pictures in, drawn pictures and COCO results out.

Threads read, decode, resize and draw while the model runs; a bounded number of pictures is on its
way at any time, so memory does not grow with their count. In the output folder: each picture with
its boxes, `predictions.json` (COCO's results format, the class ids of the data) and `images.json`
(which picture each `image_id` is, the classes, and what was left out).
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from PIL import Image

from data.pictures import BrokenPicture, decode_picture
from finetune.drawing import draw_boxes
from finetune.picture_sources import PictureRef, find_pictures, read_bytes
from finetune.predict import (
    CocoResult,
    Device,
    LoadedDetector,
    Predictions,
    PreparedPicture,
    check_request,
    load_detector,
    predict_batch,
    prepare,
    same_size_batches,
)
from models.artefact import PictureInput, without_credentials

PREDICTIONS = "predictions.json"
IMAGES = "images.json"
JPEG_QUALITY = 92

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
class PredictionReport:
    """What became of the pictures."""

    num_pictures: int
    """Pictures with an answer."""
    num_boxes: int
    left_out: tuple[LeftOutPicture, ...]
    """Not empty: the command ends with status 1."""
    out: Path


@dataclass(frozen=True)
class _Numbered:
    """A picture with its number in the results and the name of its drawing."""

    ref: PictureRef
    image_id: int
    drawn: str


@dataclass(frozen=True)
class _Loaded:
    entry: _Numbered
    content: bytes
    """The file: decoded again to be drawn on, since waiting pictures of 20 megapixels fill RAM."""
    prepared: PreparedPicture


def predict_pictures(
    weights: str,
    sources: Sequence[str],
    out: Path,
    *,
    threshold: float = 0.5,
    batch_size: int = 8,
    device: Device = "auto",
    overwrite: bool = False,
    listed: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> PredictionReport:
    """Finds objects in the pictures of `sources` (see `find_pictures`) and writes them to `out`.

    `listed` are the lines that `-` stands for; `progress` is told (done, total). A picture that
    cannot be used is left out and named in the report. Raises ValueError before anything is loaded
    where `out` holds files already, unless `overwrite`, or where there are no pictures.
    """
    check_request(threshold, batch_size)
    check_free(out, overwrite)
    refs = find_pictures(sources, listed)
    if not refs:
        raise ValueError("no pictures: name files, folders, globs, URLs, or - for a list on stdin")
    detector = load_detector(weights, device)
    return write_predictions(detector, refs, out, threshold, batch_size, progress)


def write_predictions(
    detector: LoadedDetector,
    refs: Sequence[PictureRef],
    out: Path,
    threshold: float,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> PredictionReport:
    """The same with any detector, for instance one that was told by a crop what to look for."""
    entries = _numbered(refs)
    found: dict[int, Predictions] = {}
    left_out: list[LeftOutPicture] = []
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        loads = _in_order(pool, lambda entry: _load(entry, detector.input), entries, 2 * batch_size)
        usable = _usable(loads, left_out)
        drawings: deque[Future[None]] = deque()
        for batch in same_size_batches(usable, lambda one: one.prepared.size, batch_size):
            answers = predict_batch(detector, [one.prepared for one in batch], threshold)
            for one, answer in zip(batch, answers, strict=True):
                found[one.entry.image_id] = answer
                drawings.append(pool.submit(_draw, one, answer, out))
            while len(drawings) > 2 * batch_size:
                drawings.popleft().result()
            if progress is not None:
                progress(len(found) + len(left_out), len(entries))
        for drawing in drawings:
            drawing.result()
    if progress is not None:
        progress(len(entries), len(entries))
    _write_whole(out / PREDICTIONS, _a_box_a_line(_results(entries, found)))
    _write_whole(out / IMAGES, json.dumps(_key(detector, entries, found, left_out), indent=1))
    num_boxes = sum(len(answer.scores) for answer in found.values())
    return PredictionReport(len(found), num_boxes, tuple(left_out), out)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ValueError where `out` holds anything, unless it may be written over."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for the drawn pictures")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name another folder, or allow it with --overwrite")


def _numbered(refs: Sequence[PictureRef]) -> list[_Numbered]:
    """File names that are all numbers, COCO's way, are the image ids; else they count from 1."""
    stems = [PurePosixPath(ref.name).stem for ref in refs]
    are_ids = all(map(str.isdecimal, stems)) and len({int(stem) for stem in stems}) == len(stems)
    ids = [int(stem) for stem in stems] if are_ids else list(range(1, len(refs) + 1))
    names = _drawing_names(refs)
    return [_Numbered(*one) for one in zip(refs, ids, names, strict=True)]


def _drawing_names(refs: Sequence[PictureRef]) -> list[str]:
    """Unique paths below the output folder; a PNG stays one, the rest become JPEG."""
    taken: set[str] = set()
    names = []
    for ref in refs:
        path = PurePosixPath(*(part for part in PurePosixPath(ref.name).parts if part != ".."))
        ending = ".png" if path.suffix.lower() == ".png" else ".jpg"
        stem = str(path.with_suffix("")).lstrip("/")
        name, count = f"{stem}{ending}", 1
        # Case is ignored, as it is by the file systems of two of three laptops.
        while name.lower() in taken:
            count += 1
            name = f"{stem}-{count}{ending}"
        taken.add(name.lower())
        names.append(name)
    return names


def _load(entry: _Numbered, size: PictureInput) -> _Loaded | LeftOutPicture:
    try:
        content = read_bytes(entry.ref.url)
        return _Loaded(entry, content, prepare(decode_picture(content), size))
    except FileNotFoundError:
        return LeftOutPicture(without_credentials(entry.ref.url), "no such file")
    except (BrokenPicture, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return LeftOutPicture(without_credentials(entry.ref.url), reason)


def _usable(
    loads: Iterable[_Loaded | LeftOutPicture], left_out: list[LeftOutPicture]
) -> Iterator[_Loaded]:
    """The pictures that could be loaded; the others are put on `left_out`."""
    for load in loads:
        if isinstance(load, LeftOutPicture):
            left_out.append(load)
        else:
            yield load


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


def _draw(one: _Loaded, answer: Predictions, out: Path) -> None:
    captions = [
        f"{name} {score:.2f}" for name, score in zip(answer.names, answer.scores, strict=True)
    ]
    picture = decode_picture(one.content)
    drawn = draw_boxes(picture, answer.boxes_xyxy, answer.labels, captions)
    save_picture(drawn, out / one.entry.drawn)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture in the format of its ending; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=JPEG_QUALITY)


def _results(entries: Sequence[_Numbered], found: dict[int, Predictions]) -> list[CocoResult]:
    answered = (entry.image_id for entry in entries if entry.image_id in found)
    return [box for image_id in answered for box in found[image_id].to_coco(image_id)]


def _key(
    detector: LoadedDetector,
    entries: Sequence[_Numbered],
    found: dict[int, Predictions],
    left_out: Sequence[LeftOutPicture],
) -> dict[str, object]:
    """What the numbers of the results mean."""
    images = [
        {
            "id": entry.image_id,
            "file_name": entry.ref.name,
            "url": without_credentials(entry.ref.url),
            "width": found[entry.image_id].width,
            "height": found[entry.image_id].height,
            "drawn": entry.drawn,
        }
        for entry in entries
        if entry.image_id in found
    ]
    classes = zip(detector.classes.ids, detector.classes.names, strict=True)
    return {
        "images": images,
        "categories": [{"id": id, "name": name} for id, name in classes],
        "left_out": [{"url": one.url, "reason": one.reason} for one in left_out],
    }


def _a_box_a_line(results: Sequence[CocoResult]) -> str:
    lines = ",\n".join(json.dumps(box, separators=(",", ":")) for box in results)
    return f"[\n{lines}\n]"


def _write_whole(path: Path, text: str) -> None:
    """The file, or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(path)
