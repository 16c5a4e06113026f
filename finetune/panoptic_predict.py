"""`querypatch predict` with a mask head: pictures in; segments drawn, as PNGs and as json, out.

In the output folder: each picture with its segments, `segments/` with a panoptic PNG of each
(segment id R + 256 G + 65536 B, 0 for void, at the size of the picture), `panoptic.json` (COCO's
panoptic results format with the class ids of the data, and what was left out). One picture at a
time goes through the model at its own size, so nothing is padded.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.panoptic_maps import encode_segment_ids
from data.pictures import decode_picture
from finetune.artefacts import open_weights
from finetune.panoptic_drawing import draw_panoptic
from finetune.panoptic_postprocess import SegmentSettings, panoptic_maps
from finetune.panoptic_quality import PanopticMap
from finetune.panoptic_weights import build_panoptic
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
    Device,
    PreparedPicture,
    check_request,
    classes_of,
    device_of,
    for_inference,
    prepared_images,
)
from finetune.predict_pictures import check_free, save_picture
from models.artefact import PictureInput
from models.backbone import frozen_dtype
from models.mask_head import PanopticDetector
from models.structures import Classes

RESULTS = "panoptic.json"
SEGMENTS = "segments"

_AHEAD = 8
"""Pictures that are read before the one that is used, and drawn after it."""


@dataclass(frozen=True)
class LoadedPanoptic:
    """A detector with a mask head that is ready to be asked."""

    model: PanopticDetector
    classes: Classes
    input: PictureInput
    device: torch.device
    is_mixed: bool
    """Computes in bfloat16; scores and masks are float32."""

    @torch.inference_mode()
    def segments(self, picture: PreparedPicture, settings: SegmentSettings) -> PanopticMap:
        """The segments of a picture at its own size."""
        images = prepared_images([picture], self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
            (found,) = panoptic_maps(
                self.model, images, [(picture.height, picture.width)], self.classes, settings
            )
        return found


@dataclass(frozen=True)
class PanopticReport:
    """What became of the pictures."""

    num_pictures: int
    """Pictures with an answer."""
    num_segments: int
    left_out: tuple[LeftOutPicture, ...]
    """Not empty: the command ends with status 1."""
    out: Path


@dataclass(frozen=True)
class _Answer:
    """What was found in a picture."""

    entry: NumberedPicture
    found: PanopticMap


def load_panoptic_detector(source: str, device: Device = "auto") -> LoadedPanoptic:
    """The detector and mask head in a file of weights, an exported folder or a run's folder.

    `auto` is a GPU where there is one. Raises WeightsError where there is no mask head.
    """
    artefact = open_weights(source)
    target = device_of(device)
    is_mixed = target.type == "cuda" and frozen_dtype("auto", target) is torch.bfloat16
    model = build_panoptic(for_inference(artefact, is_mixed)).requires_grad_(False).to(target)
    return LoadedPanoptic(model, classes_of(artefact), artefact.input, target, is_mixed)


def predict_panoptic(
    weights: str,
    sources: Sequence[str],
    out: Path,
    *,
    settings: SegmentSettings | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    listed: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> PanopticReport:
    """Segments the pictures of `sources` (see `find_pictures`) and writes them to `out`.

    `listed` are the lines that `-` stands for; `progress` is told (done, total). A picture that
    cannot be used is left out and named in the report. Raises ValueError before anything is loaded
    where `out` holds files already, unless `overwrite`, or where there are no pictures.
    """
    chosen = settings or SegmentSettings()
    check_request(chosen.threshold, 1)
    check_free(out, overwrite)
    refs = find_pictures(sources, listed)
    if not refs:
        raise ValueError("no pictures: name files, folders, globs, URLs, or - for a list on stdin")
    return write_segments(load_panoptic_detector(weights, device), refs, out, chosen, progress)


def write_segments(
    detector: LoadedPanoptic,
    refs: Sequence[PictureRef],
    out: Path,
    settings: SegmentSettings,
    progress: Callable[[int, int], None] | None = None,
) -> PanopticReport:
    """The same with a detector that is loaded."""
    entries = numbered_pictures(refs)
    described: list[dict[str, object]] = []
    left_out: list[LeftOutPicture] = []
    num_segments = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        drawings: deque[Future[None]] = deque()
        for one in loaded_pictures(pool, entries, detector.input, _AHEAD, left_out):
            answer = _Answer(one.entry, detector.segments(one.prepared, settings))
            described.append(_described(answer, detector.classes))
            num_segments += len(answer.found.labels)
            drawings.append(pool.submit(_write, one, answer, detector.classes, out))
            if len(drawings) > _AHEAD:
                drawings.popleft().result()
            if progress is not None:
                progress(len(described) + len(left_out), len(entries))
        for drawing in drawings:
            drawing.result()
    results = {
        "annotations": described,
        "categories": _categories(detector.classes),
        "left_out": [{"url": one.url, "reason": one.reason} for one in left_out],
    }
    write_whole(out / RESULTS, json.dumps(results, indent=1))
    return PanopticReport(len(described), num_segments, tuple(left_out), out)


def _write(one: LoadedPicture, answer: _Answer, classes: Classes, out: Path) -> None:
    drawn = draw_panoptic(decode_picture(one.content), answer.found, classes)
    save_picture(drawn, out / one.entry.drawn)
    folder = out / SEGMENTS
    folder.mkdir(parents=True, exist_ok=True)
    png = encode_segment_ids(answer.found.numbers.astype(np.int32))
    (folder / _png_name(one.entry)).write_bytes(png)


def _png_name(entry: NumberedPicture) -> str:
    """As COCO's; the ids are unique, whatever the pictures are called."""
    return f"{entry.image_id:012d}.png"


def _described(answer: _Answer, classes: Classes) -> dict[str, object]:
    """One annotation of COCO's panoptic results; `score` is ours."""
    found = answer.found
    assert found.scores is not None
    areas = np.bincount(found.numbers.ravel(), minlength=len(found.labels) + 1)[1:]
    segments = [
        {
            "id": place + 1,
            "category_id": classes.ids[label],
            "area": int(areas[place]),
            "score": float(found.scores[place]),
        }
        for place, label in enumerate(found.labels.tolist())
    ]
    return {
        "image_id": answer.entry.image_id,
        "file_name": _png_name(answer.entry),
        "picture": answer.entry.ref.name,
        "drawn": answer.entry.drawn,
        "segments_info": segments,
    }


def _categories(classes: Classes) -> list[dict[str, object]]:
    things = classes.things or (True,) * len(classes.names)
    return [
        {"id": id, "name": name, "isthing": int(is_thing)}
        for id, name, is_thing in zip(classes.ids, classes.names, things, strict=True)
    ]
