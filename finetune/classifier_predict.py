"""`querypatch predict` with a classifier: pictures in; their likeliest classes, written on, out.

In the output folder: each picture with its first answer, and `classes.json`: of each picture the
likeliest classes with their probabilities, and what was left out.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from data.classification_content import judged_picture
from data.normalise import normalised_images
from data.pictures import decode_picture
from finetune.artefacts import open_weights
from finetune.classifier_evaluation import FEW
from finetune.classifier_weights import build_classifier, sizes_of
from finetune.drawing import draw_boxes
from finetune.picture_loading import (
    LeftOutPicture,
    LoadedPicture,
    loaded_pictures,
    numbered_pictures,
    write_whole,
)
from finetune.picture_sources import find_pictures
from finetune.predict import (
    Device,
    check_request,
    classes_of,
    device_of,
    for_inference,
    same_size_batches,
)
from finetune.predict_pictures import check_free, save_picture
from models.backbone import frozen_dtype
from models.urls import public_url

ANSWERS = "classes.json"


@dataclass(frozen=True)
class ClassReport:
    """What became of the pictures."""

    num_pictures: int
    """Pictures with an answer."""
    left_out: tuple[LeftOutPicture, ...]
    """Not empty: the command ends with status 1."""
    out: Path


def predict_classes(
    weights: str,
    sources: Sequence[str],
    out: Path,
    *,
    batch_size: int = 8,
    device: Device = "auto",
    overwrite: bool = False,
    listed: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ClassReport:
    """Says what is in the pictures of `sources`; arguments and errors as `predict_pictures`."""
    check_request(0.0, batch_size)
    check_free(out, overwrite)
    refs = find_pictures(sources, listed)
    if not refs:
        raise ValueError("no pictures: name files, folders, globs, URLs, or - for a list on stdin")
    artefact, target = open_weights(weights), device_of(device)
    is_mixed = target.type == "cuda" and frozen_dtype("auto", target) is torch.bfloat16
    model = build_classifier(for_inference(artefact, is_mixed)).to(target)
    names, sizes = classes_of(artefact).names, sizes_of(artefact.input)
    entries, left_out = numbered_pictures(refs), list[LeftOutPicture]()
    answers: list[dict[str, object]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        usable = loaded_pictures(pool, entries, artefact.input, 2 * batch_size, left_out)
        for batch in same_size_batches(usable, lambda _: (0, 0), batch_size):
            pictures = [decode_picture(one.content) for one in batch]
            levels = np.stack([judged_picture(picture, sizes) for picture in pictures])
            sides = torch.tensor([[sizes.crop, sizes.crop]] * len(batch), device=target)
            images = normalised_images(torch.from_numpy(levels).to(target), sides)
            mixed = torch.autocast(target.type, torch.bfloat16, enabled=is_mixed)
            with torch.inference_mode(), mixed:
                logits = model(images.pixels)
            found = logits.float().softmax(-1).cpu().topk(min(FEW, len(names)))
            said = zip(found.indices.tolist(), found.values.tolist(), strict=True)
            for one, picture, (labels, shares) in zip(batch, pictures, said, strict=True):
                _draw(one, picture, labels[0], f"{names[labels[0]]} {shares[0]:.2f}", out)
                likeliest = [
                    {"name": names[label], "probability": round(share, 5)}
                    for label, share in zip(labels, shares, strict=True)
                ]
                url, drawn = public_url(one.entry.ref.url), one.entry.drawn
                answers.append({"url": url, "classes": likeliest, "drawn": drawn})
            if progress is not None:
                progress(len(answers) + len(left_out), len(entries))
    broken = [{"url": one.url, "reason": one.reason} for one in left_out]
    write_whole(out / ANSWERS, json.dumps({"pictures": answers, "left_out": broken}, indent=1))
    return ClassReport(len(answers), tuple(left_out), out)


def _draw(
    one: LoadedPicture,
    picture: UInt8[np.ndarray, "height width 3"],
    label: int,
    caption: str,
    out: Path,
) -> None:
    height, width = picture.shape[:2]
    whole = np.array([[0, 0, width, height]], np.float32)
    drawn = draw_boxes(picture, whole, np.array([label], np.int64), [caption])
    save_picture(drawn, out / one.entry.drawn)
