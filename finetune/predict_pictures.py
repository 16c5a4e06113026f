"""`querypatch predict`: pictures in, drawn pictures and COCO results out.

Threads read, decode, resize and draw while the model runs; a bounded number of pictures is on its
way at any time, so memory does not grow with their count. In the output folder: each picture with
its boxes, `predictions.json` (COCO's results format, the class ids of the data) and `images.json`
(which picture each `image_id` is, the classes, and what was left out).
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.pictures import decode_picture
from finetune.drawing import draw_boxes
from finetune.picture_loading import (
    LeftOutPicture,
    LoadedPicture,
    NumberedPicture,
    loaded_pictures,
    numbered_pictures,
    write_whole,
)
from finetune.picture_sources import PictureRef, find_pictures
from finetune.predict import (
    CocoResult,
    Device,
    LoadedDetector,
    Predictions,
    check_request,
    load_detector,
    predict_batch,
    same_size_batches,
)
from models.urls import public_url

PREDICTIONS = "predictions.json"
IMAGES = "images.json"
JPEG_QUALITY = 92


@dataclass(frozen=True)
class PredictionReport:
    """What became of the pictures."""

    num_pictures: int
    """Pictures with an answer."""
    num_boxes: int
    left_out: tuple[LeftOutPicture, ...]
    """Not empty: the command ends with status 1."""
    out: Path


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
    entries = numbered_pictures(refs)
    found: dict[int, Predictions] = {}
    left_out: list[LeftOutPicture] = []
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        usable = loaded_pictures(pool, entries, detector.input, 2 * batch_size, left_out)
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
    write_whole(out / PREDICTIONS, _a_box_a_line(_results(entries, found)))
    write_whole(out / IMAGES, json.dumps(_key(detector, entries, found, left_out), indent=1))
    num_boxes = sum(len(answer.scores) for answer in found.values())
    return PredictionReport(len(found), num_boxes, tuple(left_out), out)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ValueError where `out` holds anything, unless it may be written over."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for the drawn pictures")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name another folder, or allow it with --overwrite")


def _draw(one: LoadedPicture, answer: Predictions, out: Path) -> None:
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


def _results(entries: Sequence[NumberedPicture], found: dict[int, Predictions]) -> list[CocoResult]:
    answered = (entry.image_id for entry in entries if entry.image_id in found)
    return [box for image_id in answered for box in found[image_id].to_coco(image_id)]


def _key(
    detector: LoadedDetector,
    entries: Sequence[NumberedPicture],
    found: dict[int, Predictions],
    left_out: Sequence[LeftOutPicture],
) -> dict[str, object]:
    """What the numbers of the results mean."""
    images = [
        {
            "id": entry.image_id,
            "file_name": entry.ref.name,
            "url": public_url(entry.ref.url),
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
